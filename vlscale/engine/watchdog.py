"""A rank that stands still for long is ended, and leaves the stacks of all its threads behind.

One rank that hangs has all others wait for it: every rank's watchdog barks, and every rank tells where it stands.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlscale import distributed

GRACE_SECONDS = 10.0
"""Between the stacks and the end: ranks began to wait at almost the same time, and the first one's end would end the
others before they have told where they stand."""
HUNG = 1
"""Exit code."""


class Watchdog:
    """Ends the process when nobody calls `beat` for `distributed.hang_seconds()`."""

    def __init__(self) -> None:
        self._limit = distributed.hang_seconds()
        self._idle = 0.0
        self._resting = False

    @contextmanager
    def watching(self, run: Path) -> Iterator[None]:
        """Watch over the block; stacks go to `run`/hang-rank-N.txt."""
        if not self._limit:
            yield
            return
        self.beat()
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(run, done), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def beat(self) -> None:
        """There is progress."""
        self._idle = 0.0

    @contextmanager
    def resting(self) -> Iterator[None]:
        """For a block that may take as long as it likes."""
        self._resting = True
        try:
            yield
        finally:
            self.beat()
            self._resting = False

    def _watch(self, run: Path, done: threading.Event) -> None:
        tick = min(1.0, self._limit / 4)
        while not done.wait(tick):
            # Own ticks, not the clock: a job that Slurm suspended for hours has not hung.
            self._idle += tick
            if self._idle > self._limit and not self._resting:
                self._end(run)

    def _end(self, run: Path) -> None:
        stacks = run / f"hang-rank-{distributed.rank()}.txt"
        print(
            f"vlscale: error: rank {distributed.rank()}: no progress for {self._limit:g} s (VLSCALE_HANG_SECONDS), it "
            f"stands in {_place()}; stacks of all threads: {stacks}; go on with --resume auto",
            file=sys.stderr,
            flush=True,
        )
        with stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(min(GRACE_SECONDS, self._limit))
        os._exit(HUNG)  # the main thread hears nothing any more


def _place() -> str:
    """Where the main thread is: file, line and function."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
