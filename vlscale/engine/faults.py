"""What a run can't help, told in one line: a rank that is gone, a full disk."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from vlscale import distributed
from vlscale.engine.room import checkpoint_bytes, existing_parent, shown_size
from vlscale.errors import RunBroken, UserError
from vlscale.interop import layout

_FULL = (errno.ENOSPC, errno.EDQUOT)
_AGAIN = "go on with --resume auto"


@contextmanager
def told(run: Path) -> Iterator[None]:
    """Turn what breaks a run from outside into one line; everything else passes.

    Raises:
        RunBroken: another rank is gone.
        UserError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"{error.filename or run}: {error.strerror}; {_room(run)}") from None
    except RuntimeError as error:
        if reason := distributed.lost_rank(error):
            raise RunBroken(f"another rank is gone ({reason}), its own output says why; {_AGAIN}") from None
        raise


class Writes:
    """The writes of one checkpoint, which end on all ranks alike.

    DeepSpeed has barriers behind its writes: a rank that raised would leave the others there. So what can't be written
    is noted, and told once every rank has come to the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._failures: list[str] = []

    @contextmanager
    def of(self, engine: Any) -> Iterator[None]:
        """Note what DeepSpeed fails to write in the block."""
        files, save = engine.checkpoint_engine, engine.checkpoint_engine.save

        def save_or_note(state_dict: Any, path: str) -> None:
            # torch says RuntimeError, and mostly not why.
            self.attempt(path, lambda: save(state_dict, path), (OSError, RuntimeError))

        files.save = save_or_note
        try:
            yield
        finally:
            files.save = save

    def attempt(
        self,
        path: str | Path,
        write: Callable[[], Any],
        errors: tuple[type[Exception], ...] = (OSError, SafetensorError),
    ) -> None:
        """Write, or note why not."""
        try:
            write()
        except errors as error:
            self._failures.append(f"rank {distributed.rank()} can't write {Path(path).name}: {_first_line(error)}")

    def finish(self, needed: int) -> None:
        """Give the half checkpoint's room back if a rank failed; collective.

        Args:
            needed: bytes of a whole checkpoint, for the message.

        Raises:
            UserError: on every rank, when one of them failed.
        """
        failures = distributed.gather_list(self._failures)
        if failures:
            distributed.on_main(lambda: self._give_up(failures[0], needed))

    def _give_up(self, failure: str, needed: int) -> None:
        if not layout.is_complete(self.folder):
            shutil.rmtree(self.folder)
        run = self.folder.parent.parent
        raise UserError(f"{self.folder}: {failure}; a checkpoint takes {shown_size(needed)}, {_room(run, needed)}")


def checkpoint_size(engine: Any, system: nn.Module) -> int:
    """Bytes of a checkpoint."""
    masters = sum(partition.numel() for partition in engine.optimizer.single_partition_of_fp32_groups)
    width = next(system.parameters()).element_size()
    return checkpoint_bytes(system, width, masters * distributed.world_size())


def _room(run: Path, needed: float = math.inf) -> str:
    """How much is free, what a run that goes on will start from, and what to do before that."""
    complete = layout.complete_checkpoints(run)
    last = f"the last good checkpoint is {complete[-1].name}" if complete else "there is no checkpoint yet"
    free = shutil.disk_usage(existing_parent(run)).free
    advice = "make room (checkpoint.keep says how many are kept), then " if free < needed else ""
    return f"{shown_size(free)} are free; {last}; {advice}{_AGAIN}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
