"""Checks of the run folder's file system, of the disk and of memory against what the recipe's system takes."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from vlscale.config import Recipe
from vlscale.engine.checks_finding import Case, Finding
from vlscale.engine.room import checkpoint_bytes, existing_parent, memory_parts, shown_size
from vlscale.errors import UserError
from vlscale.interop import layout

_OF_ONE_MACHINE = frozenset({"tmpfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "ramfs"})


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that do not depend on the batch."""

    checkpoint: int
    """One checkpoint: DeepSpeed's shards of all ranks and the safetensors beside them."""
    memory: int
    """Of one rank: parameters, gradients, its share of masters and moments, teacher and queues."""


def run_folder(case: Case) -> list[Finding]:
    """Writing, renaming into place and flushing to the disk, where the run will lie."""
    name, folder = "run folder", existing_parent(case.out)
    fix = "another --out, on a file system that every node shares"
    out = case.out.absolute()
    if in_the_way := next((path for path in (out, *out.parents) if path.is_file()), None):
        return [Finding(name, "failed", f"{in_the_way} is a file", "another --out")]
    try:
        _write_and_rename(folder)
    except OSError as error:
        return [Finding(name, "failed", f"{folder}: {error.strerror}: {error.filename}", fix)]
    kind = file_system(folder)
    found = f"{out}: writable, renames and fsync work ({kind})"
    if case.nodes > 1 and (kind in _OF_ONE_MACHINE or folder.is_relative_to("/tmp")):
        found += f"; {case.nodes} machines, and this looks like a folder of one of them"
        return [Finding(name, "warning", found, fix)]
    if layout.holds_run(out):
        fix = "go on with --resume auto, or another --out"
        return [Finding(name, "warning", f"{found}; holds a run already", fix)]
    if folder.is_relative_to("/tmp"):
        return [Finding(name, "warning", f"{found}; /tmp is emptied at times", "another --out")]
    return [Finding(name, "ok", found)]


def _write_and_rename(folder: Path) -> None:
    """As checkpoints are written: beside, flushed, renamed over what is there, the folder flushed too."""
    trial = folder / f".vlscale-doctor-{uuid.uuid4().hex[:8]}"
    trial.mkdir()
    try:
        for content in (b"first", b"second"):
            beside = trial / "file.tmp"
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, trial / "file")
            if (trial / "file").read_bytes() != content:
                raise OSError(0, "renaming did not replace the file", str(trial / "file"))
        number = os.open(trial, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    finally:
        shutil.rmtree(trial)


def file_system(folder: Path) -> str:
    """Type of the file system by /proc/mounts, such as ext4, nfs4 or lustre; `unknown` elsewhere than on Linux."""
    best, kind = Path(), "unknown"
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    resolved = folder.resolve()
    for line in lines:
        _, place, this, *_ = line.split()
        mounted = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place))
        if resolved.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, this
    return kind


def needs(recipe: Recipe, ds_config: str, world: int) -> Needs:
    """What a system takes, from its parameters, built without storage.

    ZeRO-1/2 shares masters and moments among the ranks; every checkpoint holds all of them.
    """
    from vlscale.engine import build, describe

    choice = build.choose(ds_config)
    system = describe.on_meta(recipe)
    trained = sum(parameter.numel() for parameter in system.parameters() if parameter.requires_grad)
    return Needs(
        checkpoint=checkpoint_bytes(system, choice.parameter_bytes, trained),
        memory=round(sum(memory_parts(system, choice.parameter_bytes, world).values())),
    )


def disk(case: Case) -> list[Finding]:
    """Free space against the checkpoints that are there at once: those kept, and the one being written."""
    assert case.recipe is not None
    # Stages before the last keep their checkpoints in folders of their own; a fine-tuning keeps its best epoch too.
    kept = case.recipe.checkpoint.keep + (0 if case.recipe.task is None else 1)
    try:
        stages = [needs(stage, case.ds_config, case.world).checkpoint for stage in case.recipe.stages]
    except UserError as error:  # of the recipe or --ds-config, whose own checks tell
        return [Finding("disk", "unknown", f"no size of a checkpoint: {error}")]
    total = sum(stages) * kept + max(stages)
    folder = existing_parent(case.out)
    free = shutil.disk_usage(folder).free
    found = f"{shown_size(free)} free; a checkpoint takes up to {shown_size(max(stages))}, {kept} kept"
    found += f" in each of {len(stages)} stages" if len(stages) > 1 else ""
    found += f" and one being written {shown_size(total)}"
    if total > free:
        fix = "another --out, or fewer checkpoint.keep: --set checkpoint.keep=1"
        return [Finding("disk", "failed", found, fix)]
    return [Finding("disk", "ok", found)]


def memory(case: Case) -> list[Finding]:
    """Memory against what the system takes before any batch."""
    try:
        problem, found = too_large(case)
    except UserError as error:
        return [Finding("memory", "unknown", f"no size of the system: {error}")]
    if problem:
        fix = "more machines, a smaller system, or on a GPU --ds-config zero2_bf16"
        return [Finding("memory", "failed", found, fix)]
    return [Finding("memory", "ok", f"{found}; the batch comes on top, see the dry step")]


def too_large(case: Case) -> tuple[bool, str]:
    """Whether the system, without a batch, is more than this machine holds; and both numbers in words."""
    import torch

    assert case.recipe is not None
    each = max(needs(stage, case.ds_config, case.world).memory for stage in case.recipe.stages)
    shown = f"parameters, optimizer, teacher and queues take {shown_size(each)} a rank"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return each > total, f"{shown}, the GPU has {shown_size(total)}"
    free, whole = free_memory(), each * case.local_world
    if free is None:
        return False, f"{shown}; what is free is unknown here"
    return whole > free, f"{shown}, {shown_size(whole)} in all; {shown_size(free)} are free"


def free_memory() -> int | None:
    """Bytes of host memory that can still be had: of the machine, or of a cgroup (a Slurm job's) where it has less.

    None where nothing tells (no Linux).
    """
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    available = 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    return min([available, *_left_in_cgroups()])


def _left_in_cgroups() -> list[int]:
    """Of this process' cgroup (version 2) and those above it that have a limit."""
    root, result = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / own.lstrip("/")
    while group.is_relative_to(root):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                used = int((group / "memory.current").read_text()) - _cached(group)
                result.append(max(0, int(limit) - used))
        except (OSError, ValueError):
            pass  # no such file at the root, or in version 1
        group = group.parent
    return result


def _cached(group: Path) -> int:
    """Bytes of files in memory, which make way for a program."""
    rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(rows.get("inactive_file", 0))
