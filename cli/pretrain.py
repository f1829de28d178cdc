"""`vlscale pretrain`: recipe → engine, on as many ranks as the machine or the launcher gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlscale.engine import signals

from . import launch, meeting, options, terminal

if TYPE_CHECKING:
    from vlscale.config import Recipe
    from vlscale.engine.loop import RunResult

DEFAULT_RECIPE = "cb_vila_tiny"


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")] = DEFAULT_RECIPE,
    ds_config: options.DsConfig = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Annotations, shards, tars or a data recipe (.yaml); default: the embedded scenes."
        ),
    ] = None,
    image_root: options.ImageRoot = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<recipe>.")] = None,
    nproc: options.Nproc = None,
    nnodes: options.Nnodes = None,
    node_rank: options.NodeRank = None,
    rdzv: options.Rdzv = None,
    rdzv_timeout: options.RdzvTimeout = 300.0,
    threads: options.RankThreads = None,
    overrides: options.Overrides = None,
    resume: options.Resume = None,
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="Of a recipe with train.stages this one alone; default: all.")
    ] = None,
    dry_run: options.DryRun = False,
    local_rank: options.LocalRank = None,
) -> None:
    """Pre-train RECIPE through DeepSpeed."""
    from vlscale.config import load_recipe

    resolved = load_recipe(recipe, overrides_of(overrides, data, image_root))
    nodes = meeting.nodes(nnodes, node_rank, rdzv, rdzv_timeout)
    world = launch.world_size(nproc, nodes.count)
    if dry_run:
        describe(resolved, ds_config, world, threads)
        return
    threads = launch.become_rank(world, threads, nodes)
    if threads is None:
        return
    with signals.heeded():
        from vlscale.engine.stages import pretrain as run

        folder = out or Path("runs") / resolved.name
        result = run(resolved, ds_config=ds_config, out=folder, resume=resume, threads=threads, stage=stage)
    leave_if_stopped(result)
    if launch.rank() == 0:
        print(f"{result.out}: {result.step} steps done, {result.seconds:.0f} s")


def leave_if_stopped(result: RunResult) -> None:
    """End with the exit code that tells a launcher to start again, if a signal ended the run before its end."""
    if result.stopped is None or result.finished:
        return
    if launch.rank() == 0:
        print(f"{result.out}: ended by {result.stopped.name}, saved at step {result.step}; go on with --resume auto")
    raise typer.Exit(signals.EXIT_CODES[result.stopped])


def overrides_of(pairs: list[str] | None, data: str | None, image_root: Path | None) -> list[str]:
    """`--set` pairs followed by the options that stand for a key."""
    result = list(pairs or [])
    for key, value in (("data.path", data), ("data.image_root", image_root)):
        if value is not None:
            result.append(f"{key}={json.dumps(str(value))}")
    return result


def describe(recipe: Recipe, ds_config: str, world: int, threads: int | None) -> None:
    """Print what training the recipe would be."""
    if launch.rank() > 0:
        return
    launch.set_threads(threads, world)
    from vlscale.engine import describe as facts

    terminal.print_description(facts.describe(recipe, ds_config, world))
    terminal.print_recipe(recipe)
