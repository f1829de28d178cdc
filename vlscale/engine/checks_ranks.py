"""Checks that every rank takes part in: collectives, a file system seen from everywhere, one step of training."""

from __future__ import annotations

import gc
import itertools
import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

from vlscale import distributed
from vlscale.config import LOSSES, Recipe
from vlscale.data.sample import Batch
from vlscale.engine import loop, start
from vlscale.engine.checks_finding import Case, Finding, shown_names
from vlscale.engine.checks_storage import too_large
from vlscale.engine.loop import Run
from vlscale.engine.room import shown_size
from vlscale.engine.schedule import batch_plan
from vlscale.errors import UserError

_NUMBERS = 1 << 22
"""fp32 values of the timed reduction: 16 MiB."""
_REPEATS = 3
_APPEAR_SECONDS = 10.0
"""How long a file may take to be seen by another node: NFS caches folders for some seconds."""


def collective() -> list[Finding]:
    """Sum, gather and broadcast with known results, and the time of a reduction."""
    began = time.monotonic()
    distributed.init_from_environment()
    met = time.monotonic() - began
    rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
    hosts = sorted(set(distributed.gather_list([socket.gethostname()])))
    if world == 1:
        return [Finding("collective", "unknown", "one rank: there is nothing to exchange")]
    own = torch.arange(5, device=device, dtype=torch.float32) + rank  # [5]
    tenfold = own * 10
    wanted = torch.stack([torch.arange(5, device=device, dtype=torch.float32) + r for r in range(world)])  # [R, 5]
    outcomes = {
        "all_reduce": distributed.all_reduce_sum(own).equal(wanted.sum(0)),
        "gather": distributed.gather(own.unsqueeze(0)).equal(wanted),
        "broadcast": distributed.broadcast(tenfold, world - 1).equal(wanted[-1] * 10),
    }
    wrong = [f"rank {rank}: {name}" for name, right in outcomes.items() if not right]
    wrong = distributed.gather_list(wrong)
    seconds = _reduction_seconds(device)
    backend = torch.distributed.get_backend()
    found = f"{world} ranks on {shown_names(hosts)} over {backend}"
    if wrong:
        fix = "the network or its driver alters data: try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1, and nccl-tests"
        return [Finding("collective", "failed", f"{found}: wrong values from {shown_names(wrong)}", fix)]
    speed = 4 * _NUMBERS / seconds / 1e9
    found += f": met after {met:.1f} s; sum, gather and broadcast are right"
    return [Finding("collective", "ok", f"{found}; 16 MiB summed in {1000 * seconds:.1f} ms ({speed:.2f} GB/s)")]


def _reduction_seconds(device: torch.device) -> float:
    numbers = torch.ones(_NUMBERS, device=device)
    times = []
    for _ in range(_REPEATS + 1):  # the first one sets connections up
        distributed.barrier()
        began = time.monotonic()
        distributed.all_reduce_sum(numbers)[0].item()
        times.append(time.monotonic() - began)
    return median(times[1:])


def shared_files(folder: Path) -> list[Finding]:
    """Whether every rank sees what the others write beside the run folder.

    Args:
        folder: made here by rank 0, whose choice counts.
    """
    distributed.init_from_environment()
    folder = _folder_of_rank_0(folder)
    name, world = "shared folder", distributed.world_size()
    fix = "another --out, on a file system that every node shares"
    files = [folder / f"rank-{rank}" for rank in range(world)]
    where, problem = f"rank {distributed.rank()} on {socket.gethostname()}", []
    try:
        files[distributed.rank()].write_text(where, encoding="utf-8")
    except OSError as error:
        problem.append(f"{where} can't write to {folder.parent} ({error.strerror})")
    problems = distributed.gather_list(problem)
    if not problems:
        unseen = _wait_for(files)
        problems = distributed.gather_list([f"{where} sees no file of ranks {shown_names(unseen)}"] if unseen else [])
    if problems:
        return [Finding(name, "failed", shown_names(problems, 3), fix)]
    return [Finding(name, "ok", f"{folder.parent}: all {world} ranks see one another's files")]


def _folder_of_rank_0(folder: Path) -> Path:
    """Made where it is not there yet."""

    def make() -> Path:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder.parent}: {error.strerror}") from None
        return folder

    return distributed.on_main(make)


def _wait_for(files: list[Path]) -> list[str]:
    """Ranks whose file did not appear."""
    deadline = time.monotonic() + _APPEAR_SECONDS
    while missing := [file.name.removeprefix("rank-") for file in files if not file.is_file()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return missing


def dry_step(case: Case, folder: Path) -> list[Finding]:
    """One pass of one batch through the recipe's own system, engine, data and loader; the run folder stays untouched.

    Args:
        folder: takes what a run writes; rank 0's choice counts.
    """
    assert case.recipe is not None
    distributed.init_from_environment()
    folder = _folder_of_rank_0(folder)
    if any(distributed.gather_list([too_large(case)[0]])):
        return [Finding("dry step", "unknown", f"the system alone is too large: {too_large(case)[1]}")]
    findings: list[Finding] = []
    stages = case.recipe.stages
    for number, stage in enumerate(stages, start=1):
        of_stage = f", stage {number}" if len(stages) > 1 else ""
        findings += _dry_step(case, stage, folder / f"run-{number}", of_stage)
        gc.collect()  # engine and system refer to each other in circles
    return findings


def _dry_step(case: Case, stage: Recipe, folder: Path, of_stage: str) -> list[Finding]:
    recipe = start.absolute_paths(_one_pass(stage, distributed.world_size()))
    run = loop.set_up(recipe, case.ds_config, folder, None, start.set_threads(case.threads), None)
    reached = _watch_gradients(run.system)
    batches = iter(run.stream)
    try:
        return [_step(f"dry step{of_stage}", run, batches), _gradients(f"gradients{of_stage}", run, batches, reached)]
    finally:
        run.stream.close()
        if run.monitor is not None:
            run.monitor.close()


def _one_pass(recipe: Recipe, world: int) -> Recipe:
    """The recipe without accumulation: more passes take more time, and show nothing new."""
    micro = batch_plan(recipe.train, world).micro_batch
    train = recipe.train.model_copy(update={"global_batch": micro * world, "micro_batch": micro})
    return recipe.model_copy(update={"train": train})


def _step(name: str, run: Run, batches: Iterator[Batch]) -> Finding:
    """The step that a run begins with: its loss, its time, and the memory that it takes at most."""
    began = time.monotonic()
    batch = next(batches)
    loaded = time.monotonic()
    row = loop.train_step(run, itertools.chain([batch], batches))
    seconds = time.monotonic() - loaded
    keys = ("loss", *LOSSES[run.recipe.system.name])
    shown = ", ".join(f"{key} {row[key]:.4g}" for key in keys if key in row)
    found = f"{run.plan.micro_batch} images a rank: {shown}; batch loaded in {loaded - began:.1f} s, "
    found += f"step {seconds:.1f} s, at most {shown_size(_peak_memory())} a rank"
    if not math.isfinite(row["loss"]):
        return Finding(name, "failed", found, "lower train.lr, or look at the data: vlscale data validate")
    if not row["skipped_steps"]:
        return Finding(name, "ok", found)
    if run.state.precision == "fp16":
        return Finding(name, "ok", f"{found}; gradients overflow at fp16's first scale, which is usual")
    return Finding(name, "failed", f"{found}; the gradient is not finite", "another --ds-config: zero2_bf16")


def _peak_memory() -> float:
    """Bytes, of the rank that took most: on the GPU, else of the process."""
    if torch.cuda.is_available():
        own = torch.cuda.max_memory_allocated()
    else:
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(max(distributed.gather_list([own])))


def _watch_gradients(system: nn.Module) -> set[str]:
    """Names of trainable parameters as a gradient arrives at them; filled while backward runs."""
    reached: set[str] = set()
    for name, parameter in system.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: reached.add(name))
    return reached


def _gradients(name: str, run: Run, batches: Iterator[Batch], reached: set[str]) -> Finding:
    """Which parameters no gradient arrives at, at the first step and, as losses may join late, at the last one."""
    trainable = [key for key, parameter in run.system.named_parameters() if parameter.requires_grad]
    late = _without_gradient(trainable, reached)
    if late:
        run.state.step = run.total_steps - 1
        loop.train_step(run, batches)
    never = _without_gradient(late, reached)
    found = f"reach {len(trainable) - len(never)} of {len(trainable)} trainable parameters"
    if len(late) > len(never):
        found += f", {len(late) - len(never)} of them not from the first step on"
    if never:
        fix = "harmless, but they take memory: a loss of weight 0, or a part that the recipe does not use?"
        return Finding(name, "warning", f"{found}; none for {shown_names(never)}", fix)
    return Finding(name, "ok", found)


def _without_gradient(names: list[str], reached: set[str]) -> list[str]:
    """Those that no rank has a gradient for; the same list on every rank."""
    counts = Counter(distributed.gather_list([name for name in names if name not in reached]))
    return [name for name in names if counts[name] == distributed.world_size()]
