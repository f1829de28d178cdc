"""`vlscale finetune`: a pre-trained run and a task → engine, each epoch judged by the task's own evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlscale.engine import signals

from . import launch, meeting, options
from .pretrain import describe, leave_if_stopped, overrides_of


def finetune(
    task: Annotated[str, typer.Argument(help="retrieval, vqa, nlvr2, snli-ve or grounding.")],
    source: Annotated[
        str, typer.Option("--from", metavar="RUN|CHECKPOINT", help="The pre-trained run, or one of its checkpoints.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Annotations, shards, tars or a data recipe (.yaml); default: the pre-trained run's."
        ),
    ] = None,
    image_root: options.ImageRoot = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Sections of a recipe, for the task; default: what ships for the run's recipe."
        ),
    ] = None,
    overrides: options.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<name of the run>-<task>.")] = None,
    ds_config: options.DsConfig = "auto",
    nproc: options.Nproc = None,
    nnodes: options.Nnodes = None,
    node_rank: options.NodeRank = None,
    rdzv: options.Rdzv = None,
    rdzv_timeout: options.RdzvTimeout = 300.0,
    threads: options.RankThreads = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    local_rank: options.LocalRank = None,
) -> None:
    """Teach a pre-trained run TASK; the epoch that does best on the validation split counts."""
    from vlscale.config import load_recipe
    from vlscale.config.tuning import tuning_recipe
    from vlscale.interop import layout

    folder, checkpoint = layout.find_checkpoint(Path(source))
    base = load_recipe(str(folder / layout.RECIPE))
    if data is not None and image_root is None:
        overrides = ["data.image_root=null", *(overrides or [])]  # the run's own belongs to the run's own data
    resolved = tuning_recipe(base, task, recipe, overrides_of(overrides, data, image_root))
    nodes = meeting.nodes(nnodes, node_rank, rdzv, rdzv_timeout)
    world = launch.world_size(nproc, nodes.count)
    if dry_run:
        describe(resolved, ds_config, world, threads)
        return
    threads = launch.become_rank(world, threads, nodes)
    if threads is None:
        return
    with signals.heeded():
        from vlscale import distributed
        from vlscale.engine.loop import pretrain
        from vlscale.tasks.validation import make_validation

        distributed.init_from_environment()
        validation = make_validation(resolved, print if launch.rank() == 0 else lambda line: None)
        result = pretrain(
            resolved,
            ds_config=ds_config,
            out=out or Path("runs") / f"{folder.resolve().name}-{task}",
            resume=resume,
            threads=threads,
            weights=checkpoint.resolve(),
            on_epoch=None if validation is None else lambda run: validation(run.system, run.out),
        )
    leave_if_stopped(result)
    if launch.rank() == 0:
        best = layout.best_checkpoint(result.out)
        print(f"{result.out}: {result.step} steps done, {result.seconds:.0f} s")
        print(f"{best or result.checkpoint}: {'the best epoch' if best else 'the last step'}")
