"""Checkpoints that survive SIGKILL at any moment of a save, and exact resume from the newest whole one.

A tag is written once, beside the others; its marker comes last and lists every file with size and checksum, then
`latest` is replaced. What has no marker, or another content than its marker says, is never resumed from.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import __version__, distributed
from vlscale.config import Recipe
from vlscale.engine import worlds
from vlscale.engine.faults import Writes, checkpoint_size
from vlscale.engine.writer import EngineWriter
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.export import read_tensors, write_tensors

_CHUNK = 1 << 22


@dataclass(slots=True)
class State:
    """What a restart must know besides tensors: `state.json`."""

    step: int
    world_size: int
    precision: str
    recipe_hash: str
    seed: int
    image_size: int
    threads: int
    skipped_steps: int = 0
    skipped_images: int = 0
    bad_in_a_row: int = 0
    total_steps: int = 0
    """Of the whole run; 0 where an older version wrote this."""
    data: str = ""
    """How many samples there were and how they lay together: another data set would go on at another place."""
    version: str = __version__


def save(engine: Any, system: nn.Module, run: Path, state: State, keep: int) -> Path:
    """Write the checkpoint of `state.step` and prune; collective. Returns its folder.

    Raises:
        UserError: the tag exists already, or a rank can't write its part: the ones before stay.
    """
    folder = run / layout.CHECKPOINTS / layout.checkpoint_name(state.step)
    _require_equal_ranks(system.carried_state())  # type: ignore[operator]
    distributed.on_main(lambda: _create(folder))
    writes, needed = Writes(folder), checkpoint_size(engine, system)
    with writes.of(engine):
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    weights = consolidated(system)
    if distributed.rank() == 0:
        metadata = {"step": str(state.step), "image_size": str(state.image_size), "vlscale": __version__}
        carried = system.carried_state()  # type: ignore[operator]
        writes.attempt(layout.MODEL, lambda: write_tensors(folder / layout.MODEL, weights, metadata))
        writes.attempt(layout.CARRIED, lambda: write_tensors(folder / layout.CARRIED, carried, metadata))
        writes.attempt(layout.STATE, lambda: layout.write_json(folder / layout.STATE, asdict(state)))
    writes.finish(needed)
    if distributed.rank() == 0:
        writes.attempt(layout.COMPLETE, lambda: _complete(folder))
    writes.finish(needed)
    if distributed.rank() == 0:
        _prune(run, keep)
    distributed.barrier()
    return folder


def consolidated(system: nn.Module) -> dict[str, Tensor]:
    """fp32 parameters (ZeRO's master values) and buffers under the system's names; collective.

    Tensors are on the CPU, and only on rank 0: other ranks take part in the gathering and get nothing.
    """
    writer, main = EngineWriter(), distributed.rank() == 0
    parameters = dict(system.named_parameters())
    result: dict[str, Tensor] = {}
    for name, value in system.state_dict().items():
        whole = writer.read(parameters[name]) if name in parameters else value
        if main:
            result[name] = whole.float().cpu() if torch.is_floating_point(whole) else whole.cpu()
    return result


def load(engine: Any, system: nn.Module, checkpoint: Path) -> None:
    """Put engine, system and carried state back to where the checkpoint left them; collective.

    The same number of ranks goes on to the bit, by DeepSpeed alone; for another one the optimizer state is cut anew.

    DeepSpeed unpickles its own files: resume from checkpoints that you trust. (`load_run` reads safetensors only.)
    """
    saved_by = read_state(checkpoint).world_size
    same = saved_by == distributed.world_size()
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_optimizer_states=same)
    if path is None:
        raise UserError(f"{checkpoint}: DeepSpeed found nothing to load in it; remove the folder to use an older one")
    if not same:
        worlds.load_optimizer(engine.optimizer, checkpoint, saved_by)
    system.load_carried_state(read_tensors(checkpoint / layout.CARRIED))  # type: ignore[operator]
    system.place(distributed.device())  # type: ignore[operator]


def read_state(checkpoint: Path) -> State:
    """`state.json` of a checkpoint.

    Raises:
        UserError: it is missing or not ours.
    """
    try:
        return State(**json.loads((checkpoint / layout.STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / layout.STATE}: cannot be read: {error}") from None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that has its marker; None when every file is as it was written."""
    try:
        expected = json.loads((checkpoint / layout.COMPLETE).read_text(encoding="utf-8"))
        for name, (size, checksum) in expected.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _checksum(path) != checksum:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{layout.COMPLETE} cannot be read: {error}"
    return None


def newest_sound(run: Path, say: Any = print) -> Path | None:
    """Newest complete and undamaged checkpoint; says which it passed over."""
    for checkpoint in reversed(layout.complete_checkpoints(run)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"{checkpoint.name}: {problem}; falling back to the one before")
    return None


def clear_after(run: Path, step: int, say: Any = print) -> None:
    """Make way for the steps after `step`: half-written tags go, complete ones are set aside under another name."""
    for checkpoint in layout.all_checkpoints(run):
        if not layout.is_complete(checkpoint):
            shutil.rmtree(checkpoint)
        elif (layout.step_of(checkpoint) or 0) > step:
            aside = _free_name(checkpoint)
            checkpoint.rename(aside)
            say(f"{checkpoint.name} lies after step {step}: set aside as {aside.name}")


def require_same(recipe: Recipe, previous: Recipe, source: Path) -> None:
    """Refuse to go on with a recipe that would change the result; names the first key that differs."""
    ours, theirs = _flat(_decisive(recipe)), _flat(_decisive(previous))
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{source}: the run was started with {key}={theirs.get(key)}, now it is {ours.get(key)}: "
                f"resume with --set {key}={json.dumps(theirs.get(key))}, or start anew in another --out"
            )


def recipe_hash(recipe: Recipe) -> str:
    """Checksum of the part of the recipe that the result depends on."""
    return f"{zlib.crc32(json.dumps(_decisive(recipe), sort_keys=True).encode()):08x}"


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what leaves the result alone: when to save, when to give up, loader processes, evaluation."""
    tree = recipe.model_dump(mode="json", exclude={"name", "checkpoint", "eval"})
    del tree["data"]["workers"], tree["train"]["max_bad_steps"]
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result


def _require_equal_ranks(carried: dict[str, Tensor]) -> None:
    """Rank 0's carried state is what every rank gets back: stop rather than lose another rank's."""
    if distributed.world_size() == 1 or not carried:
        return
    sums = torch.stack([value.double().nan_to_num().sum() for value in carried.values()])
    ranks = distributed.gather(sums.unsqueeze(0))  # [R, T]
    differing = [name for name, equal in zip(carried, (ranks == ranks[0]).all(0).tolist(), strict=True) if not equal]
    if differing:
        raise RuntimeError(f"carried state differs between ranks: {', '.join(differing[:5])}")


def _create(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; a checkpoint is never overwritten")
    folder.mkdir(parents=True)


def _complete(folder: Path) -> None:
    """From here on it is the newest one; not before every file is on the disk."""
    layout.write_json(folder / layout.COMPLETE, _fingerprints(folder))
    layout.write_text(folder.parent / layout.LATEST, folder.name + "\n")


def _prune(run: Path, keep: int) -> None:
    """Remove all but the best and the newest `keep` complete checkpoints; the marker goes first, a kill leaves no half
    one."""
    best = layout.best_checkpoint(run)
    for checkpoint in layout.complete_checkpoints(run)[: -max(1, keep)]:
        if checkpoint == best:
            continue
        (checkpoint / layout.COMPLETE).unlink()
        shutil.rmtree(checkpoint)


def _fingerprints(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file, each flushed to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, _checksum(path, flush=True)) for path in files}


def _checksum(path: Path, flush: bool = False) -> int:
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
        if flush:
            os.fsync(stream.fileno())
    return value


def _free_name(checkpoint: Path) -> Path:
    names = (checkpoint.with_name(f"{checkpoint.name}.set-aside-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())
