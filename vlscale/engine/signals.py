"""SIGUSR1 and SIGTERM ask a run to save and end; this is who listens. Imports no torch.

While training they are only noted: the loop asks all ranks at the end of every step. Before and after that there is
nothing to save, and the process ends a moment later, wherever it is. That takes a thread: a handler of Python's waits
until the main thread is back from C++, where a rank may spend hours at a barrier.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 85
"""Exit code after SIGUSR1: all is saved, start again with `--resume auto`. Slurm's scripts requeue the job."""
EXIT_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: 128 + signal.SIGTERM}
STOPS = tuple(EXIT_CODES)
GRACE_SECONDS = 2.0
"""Ranks get a signal at almost the same time, some of them twice (srun and its daemon both send SIGTERM): so long
nobody leaves, and a second SIGTERM is the first one."""

_received: dict[signal.Signals, float] = {}
"""When each came first."""
_training = False


@contextmanager
def heeded() -> Iterator[None]:
    """From now on this process ends by `EXIT_CODES`; entered on the main thread, before torch is imported."""
    _install()
    try:
        yield
    except Exception:
        if _received and not _training:
            # The signal may have ended a process of a pool, or another rank: no mistake of ours, and we leave as well.
            time.sleep(2 * GRACE_SECONDS)
        raise


@contextmanager
def training() -> Iterator[None]:
    """While the block runs, signals wait for the loop to ask for them; a second SIGTERM ends the process at once."""
    global _training
    _training = True
    try:
        yield
    finally:
        _training = False


def received() -> list[bool]:
    """Whether each of `STOPS` came to this process."""
    return [number in _received for number in STOPS]


def chosen(came: list[bool]) -> signal.Signals | None:
    """The signal to end by, of those that came to any rank: SIGTERM leaves no time, and Slurm requeues by itself."""
    return next((number for number in reversed(STOPS) if came[STOPS.index(number)]), None)


def _install() -> None:
    if signal.getsignal(STOPS[0]) is _noted:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in STOPS:
        signal.signal(number, _noted)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_listen, args=(read,), name="signals", daemon=True).start()


def _listen(pipe: int) -> None:
    while data := os.read(pipe, 64):
        for number in data:
            if number in STOPS:
                _take(signal.Signals(number))


def _take(number: signal.Signals) -> None:
    now, first = time.monotonic(), _received.get(number)
    if first is None:
        _received[number] = now
        threading.Thread(target=_leave_unless_training, args=(number,), daemon=True).start()
    elif number == signal.SIGTERM and now - first > GRACE_SECONDS:
        _exit(number, "at the second signal: what came after the last checkpoint is lost")


def _leave_unless_training(number: signal.Signals) -> None:
    time.sleep(GRACE_SECONDS)
    if not _training:
        _exit(number, "with nothing to save: go on with --resume auto")


def _exit(number: signal.Signals, how: str) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1)  # the main thread may hold the stream, stuck in a write
        print(f"vlscale: ended by {number.name} {how}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(EXIT_CODES[number])


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler of Python's must exist for the number to be written to the pipe."""


def _forget() -> None:
    """A forked child would write its signals to our pipe."""
    signal.set_wakeup_fd(-1)
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
