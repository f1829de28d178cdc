"""`vlscale pretrain`: recipe → engine, on as many ranks as the machine or the launcher gives."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import launch, terminal

if TYPE_CHECKING:
    from vlscale.config import Recipe

DEFAULT_RECIPE = "cb_vila_tiny"


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")] = DEFAULT_RECIPE,
    ds_config: Annotated[
        str, typer.Option(help="DeepSpeed config: a shipped name, a JSON file, or auto (what this machine can do).")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Annotations, shards, tars or a data recipe (.yaml); default: the embedded scenes."
        ),
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder that image paths are relative to.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<recipe>.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks on this machine; default: one per GPU, else one.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per rank; default: the cores shared out.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as train.lr=1e-4; repeatable."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from the newest complete checkpoint, or from PATH.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="Of a recipe with train.stages this one alone; default: all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and build nothing big.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Pre-train RECIPE through DeepSpeed."""
    from vlscale.config import load_recipe

    resolved = load_recipe(recipe, overrides_of(overrides, data, image_root))
    world = launch.world_size(nproc)
    if dry_run:
        _describe(resolved, ds_config, world, threads)
        return
    if world > 1 and not launch.joined():
        code = launch.start_ranks(sys.argv[1:], world)
        if code:
            sys.exit(code)
        return
    threads = launch.set_threads(threads, world)
    launch.settle(world)
    # DeepSpeed calls what torch has deprecated; whoever trains can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from vlscale.engine.stages import pretrain as run

    folder = out or Path("runs") / resolved.name
    result = run(resolved, ds_config=ds_config, out=folder, resume=resume, threads=threads, stage=stage)
    if launch.rank() == 0:
        print(f"{result.out}: {result.step} steps done, {result.seconds:.0f} s")


def overrides_of(pairs: list[str] | None, data: str | None, image_root: Path | None) -> list[str]:
    """`--set` pairs followed by the options that stand for a key."""
    result = list(pairs or [])
    for key, value in (("data.path", data), ("data.image_root", image_root)):
        if value is not None:
            result.append(f"{key}={json.dumps(str(value))}")
    return result


def _describe(recipe: Recipe, ds_config: str, world: int, threads: int | None) -> None:
    if launch.rank() > 0:
        return
    launch.set_threads(threads, world)
    from vlscale.engine.describe import describe

    terminal.print_description(describe(recipe, ds_config, world))
    terminal.print_recipe(recipe)
