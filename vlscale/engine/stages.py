"""A run in one stage or in several, each of which starts from the weights of the one before.

The last stage's run lies in the run folder itself, every other one's in `stage-1` … inside it: run folders like any
other.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlscale import distributed
from vlscale.config import Recipe
from vlscale.engine import checkpoint, loop, start
from vlscale.engine.loop import RunResult
from vlscale.errors import UserError
from vlscale.interop import layout


def pretrain(
    recipe: Recipe,
    *,
    ds_config: str = "auto",
    out: Path,
    resume: str | None = None,
    threads: int | None = None,
    stage: int | None = None,
) -> RunResult:
    """Train the recipe's system through all of its stages, or one of them; every rank calls this.

    Args:
        stage: from 1; the one before must lie finished in `out`. None: all.
        resume: None for a new run, `auto`, or a run or checkpoint folder; of several stages `auto` alone.

    Returns:
        The result of the last stage that ran: a signal ends the run, not only its stage.

    Raises:
        UserError: no such stage, the one before is not finished, or as `loop.pretrain`.
    """
    stages = len(recipe.stages)
    if stages == 1:
        if stage is not None:
            raise UserError(f"--stage {stage}: recipe {recipe.name} is trained in one stage; leave --stage out")
        return loop.pretrain(recipe.stages[0], ds_config=ds_config, out=out, resume=resume, threads=threads)
    if stage is not None and not 1 <= stage <= stages:
        raise UserError(f"--stage {stage}: recipe {recipe.name} has stages 1 to {stages}")
    if resume not in (None, "auto") and stage is None:
        raise UserError(f"--resume {resume}: say with --stage which of the {stages} stages goes on, or use auto")
    distributed.init_from_environment()
    wanted = [stage] if stage is not None else _left(out, stages, resume)
    for number in wanted:
        start.check_free(layout.stage_folder(out, number, stages), resume)
    for number in wanted:
        if distributed.rank() == 0:
            print(f"stage {number} of {stages}", flush=True)
        folder = layout.stage_folder(out, number, stages)
        again = resume if resume != "auto" or layout.holds_run(folder) else None
        weights = None
        if number > 1 and again is None:
            weights = distributed.on_main(partial(_finished, layout.stage_folder(out, number - 1, stages), number))
        result = loop.pretrain(
            recipe.stages[number - 1], ds_config=ds_config, out=folder, resume=again, threads=threads, weights=weights
        )
        if result.stopped is not None:
            return replace(result, finished=result.finished and number == wanted[-1])
        gc.collect()  # engine and system refer to each other in circles: free them before the next stage takes memory
    return result


def _left(out: Path, stages: int, resume: str | None) -> list[int]:
    """Stages that are still to run: from the last one on that has begun."""
    if resume is None:
        return list(range(1, stages + 1))

    def first() -> int:
        begun = [n for n in range(1, stages + 1) if layout.complete_checkpoints(layout.stage_folder(out, n, stages))]
        last = max(begun, default=1)
        done = last < stages and begun and _is_finished(layout.stage_folder(out, last, stages))
        return last + 1 if done else last

    return list(range(distributed.on_main(first), stages + 1))


def _finished(run: Path, stage: int) -> Path:
    """The last checkpoint of the stage before.

    Raises:
        UserError: there is none, or its run did not come to its end.
    """
    newest = checkpoint.newest_sound(run)
    if newest is None:
        raise UserError(f"--stage {stage}: {run}: no complete checkpoint; run --stage {stage - 1} first")
    if not _is_finished(run):
        raise UserError(f"--stage {stage}: {run} is not finished; go on with --stage {stage - 1} --resume auto")
    return newest


def _is_finished(run: Path) -> bool:
    newest = checkpoint.newest_sound(run, say=lambda message: None)
    if newest is None:
        return False
    state = checkpoint.read_state(newest)
    return state.step >= state.total_steps
