"""Ranks as forks of a process that has imported everything: a life takes seconds where imports take half a minute."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from vlscale.distributed import free_port


def import_everything() -> None:
    """What a rank needs; no process group, no thread, so that forks are as good as new processes."""
    from vlscale.engine import build, loop  # noqa: F401

    build.import_deepspeed()
    import vlscale.systems.albef
    import vlscale.systems.cb_vila
    import vlscale.systems.codis
    import vlscale.systems.soho  # noqa: F401


class Ranks:
    """`world` ranks that call `target`, which gives their exit code; output goes to `logs`/rank-N.txt."""

    def __init__(self, target: Callable[[], int], world: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank-{rank}.txt" for rank in range(world)]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._codes: list[int | None] = [None] * world
        self._pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _be_rank(target, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, self._logs[rank])
            self._pids.append(pid)

    def codes(self) -> list[int | None]:
        """Exit code of every rank (-9 after SIGKILL), None where it is still there."""
        for rank, pid in enumerate(self._pids):
            if self._codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                self._codes[rank] = os.waitstatus_to_exitcode(status) if found else None
        return self._codes

    def alive(self) -> bool:
        return None in self.codes()

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL."""
        for rank in ranks:
            if self.codes()[rank] is None:
                os.kill(self._pids[rank], signal.SIGKILL)

    def wait(self, seconds: float) -> list[tuple[int | None, str]]:
        """Exit code and output of every rank; those that don't end in time are killed and have None."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = list(self.codes())
        self.kill(list(range(len(codes))))
        while self.alive():
            time.sleep(0.02)
        return [(code, log.read_text(errors="replace")) for code, log in zip(codes, self._logs, strict=True)]


def _be_rank(target: Callable[[], int], environment: dict[str, str], log: Path) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        code = target()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
