"""Pre-training: set up → steps → checkpoints. One step reads as in the house's style guide."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.config import LOSSES, Recipe
from vlscale.config.tasks import loss_names
from vlscale.data.captions import vocabulary_of
from vlscale.data.images import normalize_batch
from vlscale.data.order import layout_of
from vlscale.data.sample import Batch
from vlscale.data.stream import Stream
from vlscale.data.targets import make_targets
from vlscale.engine import best, build, checkpoint, faults, signals, start
from vlscale.engine.monitor import Monitor
from vlscale.engine.optim import has_backbone, set_learning_rate
from vlscale.engine.schedule import BatchPlan, batch_plan, draw_seed, learning_rate, total_steps
from vlscale.engine.tally import Tally
from vlscale.engine.watchdog import Watchdog
from vlscale.engine.writer import EngineWriter
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.origin import note_origin
from vlscale.interop.start import start_from
from vlscale.nn.statistics import moving_statistics
from vlscale.systems.protocol import Progress
from vlscale.systems.registry import build_system


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    out: Path
    step: int
    finished: bool
    """False when `stop_after` or a signal ended it before its last step."""
    checkpoint: Path | None
    metrics: dict[str, float | int]
    """The last step's row of metrics.jsonl; empty when there was nothing left to train."""
    seconds: float
    stopped: signal.Signals | None = None
    """The signal that ended it, after a checkpoint."""


@dataclass(slots=True)
class Run:
    """What the loop works with."""

    recipe: Recipe
    out: Path
    engine: Any
    system: nn.Module
    stream: Stream
    plan: BatchPlan
    total_steps: int
    state: checkpoint.State
    device: torch.device
    monitor: Monitor | None
    newest: Path | None
    """Newest checkpoint: the one that the run went on from, then the last one saved."""
    writer: EngineWriter = field(default_factory=EngineWriter)
    watchdog: Watchdog = field(default_factory=Watchdog)
    stop: signal.Signals | None = None
    """Signal that came to a rank: the step just done is the last one. The same on every rank."""

    def progress(self, generator: torch.Generator | None) -> Progress:
        """The schedule as the system sees it in the step that follows `state.step` finished ones."""
        return Progress(self.state.step, self.total_steps, self.stream.steps_per_epoch, generator)

    def say(self, message: str) -> None:
        if self.monitor is not None:
            self.monitor.say(message)


OnEpoch = Callable[[Run], Mapping[str, float]]
"""Called on every rank after an epoch, the system in evaluation mode → validation metrics, the same everywhere."""


def pretrain(
    recipe: Recipe,
    *,
    ds_config: str = "auto",
    out: Path,
    resume: str | None = None,
    threads: int | None = None,
    stop_after: int | None = None,
    weights: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> RunResult:
    """Train the recipe's system; every rank calls this.

    Args:
        ds_config: `auto`, a shipped name or the path of a DeepSpeed JSON.
        out: the run folder.
        resume: None for a new run, `auto`, or a run or checkpoint folder.
        threads: CPU threads of this rank.
        stop_after: save and return after this step, as if interrupted there; the schedule stays the recipe's.
        weights: checkpoint of another run, whose weights, tokenizer and phrases a new run starts with.
        on_epoch: gives validation metrics after every epoch; the epoch that is best by `task.best` is kept.

    Raises:
        UserError: input that can't be trained on, `train.max_bad_steps` non-finite steps in a row, or a full disk.
        RunBroken: another rank or a process of the loader is gone.
    """
    started = time.monotonic()
    with faults.told(Path(out)):
        distributed.init_from_environment()
        run = set_up(start.absolute_paths(recipe), ds_config, Path(out), resume, start.set_threads(threads), weights)
        last = run.total_steps if stop_after is None else min(stop_after, run.total_steps)
        row = _train(run, last, on_epoch)
    finished, seconds = run.state.step >= run.total_steps, time.monotonic() - started
    return RunResult(run.out, run.state.step, finished, run.newest, row, seconds, run.stop)


def set_up(recipe: Recipe, ds_config: str, out: Path, resume: str | None, threads: int, weights: Path | None) -> Run:
    """Everything up to the first step, as `pretrain`; every rank calls this.

    Args:
        threads: CPU threads of this rank, already set.
    """
    say = print if distributed.rank() == 0 else _silent
    if distributed.rank() > 0:
        logging.getLogger("vlscale").setLevel(logging.ERROR)  # what the data lacks is said once, not by every rank
    choice = build.choose(ds_config)
    plan = batch_plan(recipe.train, distributed.world_size())
    config = build.complete(choice, plan, recipe.train)
    say(choice.reason)
    say(f"batch: {plan}; {threads} CPU threads per rank")
    start.check_free(out, resume)
    with distributed.main_process_first():
        samples = start.training_examples(recipe)  # before the folder is made: a mistake leaves nothing behind
    data = layout_of(samples.parts())
    origin = start.find_origin(recipe, choice, out, resume, data, say)
    if origin.checkpoint is None:
        origin = replace(origin, weights=weights)
    tokenizer = start.make_tokenizer(recipe, samples, out, origin)
    section = start.own_phrases(recipe.data, samples, out, origin)

    torch.manual_seed(recipe.train.seed)
    device = distributed.device()
    answers = start.own_answers(recipe, samples, out, origin)
    system = build_system(recipe, vocabulary_of(tokenizer, section, answers))
    if origin.weights is not None:
        scratch = recipe.task is not None and recipe.task.from_scratch
        if not scratch:
            start_from(system, origin.weights / layout.MODEL)
        distributed.on_main(partial(note_origin, out, origin.weights, scratch))
        say(f"{'tokenizer alone' if scratch else 'weights'} of {origin.weights}")
    system.to(device).train()
    system.place(device)  # type: ignore[operator]
    engine = build.build_engine(system, config, choice, recipe.train, recipe.task)
    if origin.checkpoint is not None:
        checkpoint.load(engine, system, origin.checkpoint)
    stream = Stream(
        samples,
        section,
        tokenizer,
        seed=recipe.train.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=distributed.rank(),
        world=plan.world,
        start_step=origin.step,
        workers=recipe.data.workers,
        targets=None if recipe.task is None else make_targets(recipe.task, section, tokenizer, answers),
    )
    total = total_steps(recipe.train, stream.steps_per_epoch)
    state = origin.state or checkpoint.State(
        step=0,
        world_size=plan.world,
        precision=choice.precision,
        recipe_hash=checkpoint.recipe_hash(recipe),
        seed=recipe.train.seed,
        image_size=recipe.data.image_size,
        threads=threads,
        total_steps=total,
        data=data,
    )
    if state.threads != threads:
        say(f"the run had {state.threads} threads per rank, now {threads}: going on, but not to the last bit as before")
    say(f"{len(samples)} training images, {stream.steps_per_epoch:.1f} steps per epoch, {total} steps")
    monitor = None
    if distributed.rank() == 0:
        layout.write_json(out / layout.DS_CONFIG, config)
        names = LOSSES.get(recipe.system.name, ())
        monitor = Monitor(out, total, origin.step, names if recipe.task is None else loss_names(recipe.task, names))
    return Run(recipe, out, engine, system, stream, plan, total, state, device, monitor, origin.checkpoint)


def _train(run: Run, last: int, on_epoch: OnEpoch | None = None) -> dict[str, float | int]:
    """Steps up to `last`, or to a signal, saving on the way; returns the last row of the metrics."""
    row: dict[str, float | int] = {}
    batches = iter(run.stream)
    distributed.barrier()  # one rank alone would wait for a step's end that never comes
    try:
        with signals.training(), run.watchdog.watching(run.out):
            if on_epoch is not None and run.state.step > 0 and _ends_epoch(run) and not _is_judged(run):
                _judge(run, on_epoch)
            while run.state.step < last and run.stop is None:
                row = train_step(run, batches)
                judged = on_epoch is not None and _ends_epoch(run)
                ends = run.state.step == last or run.stop is not None
                if run.state.step % run.recipe.checkpoint.every == 0 or ends or judged:
                    keep = run.recipe.checkpoint.keep
                    run.watchdog.beat()
                    run.newest = checkpoint.save(run.engine, run.system, run.out, run.state, keep)
                if on_epoch is not None and judged and run.stop is None:  # else when the run goes on
                    _judge(run, on_epoch)
    finally:
        run.stream.close()
        if run.monitor is not None:
            run.monitor.close()
    distributed.barrier()  # the first rank to leave with an exit code has the others ended
    return row


def _ends_epoch(run: Run) -> bool:
    """Whether the step just done was the last one of an epoch, or of the run."""
    step, per_epoch = run.state.step, run.stream.steps_per_epoch
    return int(step / per_epoch) > int((step - 1) / per_epoch) or step == run.total_steps


def _is_judged(run: Run) -> bool:
    """Whether the epoch that the run went on from was judged: it may have ended between the save and that."""
    return distributed.on_main(lambda: best.knows(run.out, run.state.step))


def _judge(run: Run, on_epoch: OnEpoch) -> None:
    """Validation metrics of this epoch, on every rank; the best epoch's checkpoint is kept."""
    assert run.recipe.task is not None
    random, task = torch.get_rng_state(), run.recipe.task
    run.system.eval()
    with run.watchdog.resting():
        metrics = on_epoch(run)
    run.system.train()
    torch.set_rng_state(random)
    step, epoch = run.state.step, run.state.step / run.stream.steps_per_epoch
    is_best = distributed.on_main(lambda: best.record(run.out, task.best, step, epoch, metrics))
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    run.say(f"epoch {epoch:.2f}: {shown}{', the best so far' if is_best else ''}")


def train_step(run: Run, batches: Iterator[Batch]) -> dict[str, float | int]:
    """One optimizer step: forward and backward of every micro-batch, then the update; returns its metrics."""
    began = time.monotonic()
    state, seed = run.state, run.recipe.train.seed
    rates = _set_rates(run)
    tally = Tally(run.device)
    statistics = moving_statistics(run.system)
    before = [buffer.clone() for buffer in statistics]
    for micro in range(run.plan.accumulation):
        run.watchdog.beat()
        batch = _on_device(next(batches), run)
        generator = _seed_draws(seed, state.step, micro, distributed.rank())
        losses, metrics = run.engine(batch, run.progress(generator))
        total = weighted_sum(losses, run.recipe.weights)
        tally.add(batch, total, losses, metrics)
        run.engine.backward(total * poison(total))
        run.engine.step()
    if applied := run.engine.was_step_applied():  # False: non-finite loss or gradient, nothing was updated
        generator = _seed_draws(seed, state.step, "after step")
        run.system.after_step(run.progress(generator), run.writer)  # type: ignore[operator]
    else:
        for buffer, value in zip(statistics, before, strict=True):  # the forward moved them, each rank's for itself
            buffer.copy_(value)
    values = tally.reduce()
    run.stop = tally.stop
    state.step += 1
    row: dict[str, float | int] = {
        "step": state.step,
        "epoch": state.step / run.stream.steps_per_epoch,
        **values,
        **rates,
        **_gradient_facts(run),
        "images_per_s": run.plan.global_batch / (time.monotonic() - began),
    }
    _note_troubles(run, tally, row, applied)
    if run.monitor is not None:
        run.monitor.log(row)
    if state.bad_in_a_row >= run.recipe.train.max_bad_steps:
        _give_up(run, tally, row)
    return row


def _set_rates(run: Run) -> dict[str, float]:
    """Put the backbone to rest or wake it, and give every group the rate of this step; returns the rates by name.

    A system may toggle `requires_grad` here, between two steps: ZeRO-1/2 hooks every parameter that is trainable when
    the engine is built, for good, and takes a missing gradient for zeros, which the mark `resting` keeps out of the
    optimizer. What is frozen before that has no hook and never trains.
    """
    train, progress = run.recipe.train, run.progress(None)
    schedule = (progress.step, progress.total_steps, progress.steps_per_epoch)
    resting: bool = run.system.rest(progress)  # type: ignore[operator]
    rates = {"lr": learning_rate(train, *schedule)}
    if has_backbone(run.engine.optimizer):
        rates["lr_backbone"] = 0.0 if resting else learning_rate(train.backbone or train, *schedule)
    set_learning_rate(run.engine.optimizer, rates["lr"], rates.get("lr_backbone"), resting)
    return rates


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Σ weight·loss; a loss without a weight counts once, one of weight 0 is left out (0 · nan is nan)."""
    terms = [loss.float() * weights.get(name, 1.0) for name, loss in losses.items() if weights.get(name, 1.0) != 0]
    if not terms:
        raise UserError("weights: every loss has weight 0, nothing is left to train")
    return torch.stack(terms).sum()


def poison(total: Tensor) -> Tensor:
    """1, or nan where the loss is not finite: then every gradient is nan and ZeRO skips the step on all ranks.

    A loss can be infinite while its gradients are finite. No host sync: the factor stays on the device.
    """
    return torch.where(torch.isfinite(total.detach()), 1.0, math.nan)


def _on_device(batch: Batch, run: Run) -> Batch:
    return normalize_batch(batch.to(run.device), run.recipe.data)


def _seed_draws(*keys: int | str) -> torch.Generator:
    """Seed dropout and give the step's generator: both functions of the keys alone, so that resuming needs no state."""
    torch.manual_seed(draw_seed("dropout", *keys))
    return torch.Generator().manual_seed(draw_seed("choices", *keys))


def _gradient_facts(run: Run) -> dict[str, float]:
    """Norm of the unscaled gradient before clipping (inf in a skipped step), and the scale of native fp16."""
    norm = run.engine.get_global_grad_norm()
    facts = {} if norm is None else {"grad_norm": float(norm)}
    if run.state.precision == "fp16":
        facts["loss_scale"] = float(run.engine.optimizer.loss_scale)
    return facts


def _at_floor(run: Run) -> str:
    """The alarm of native fp16: the scale can't be lowered any more."""
    if run.state.precision != "fp16":
        return ""
    scaler = run.engine.optimizer.loss_scaler
    if scaler.cur_scale > getattr(scaler, "min_scale", 0):  # a static scale has no floor
        return ""
    return f"; the loss scale is at its floor {scaler.cur_scale:g}: lower train.lr, or use bfloat16"


def _note_troubles(run: Run, tally: Tally, row: dict[str, float | int], applied: bool) -> None:
    """Count skipped steps and images, and name them."""
    state = run.state
    if tally.skipped_images:  # the same number on every rank
        names = tally.gather_skipped()
        state.skipped_images += len(names)
        if run.monitor is not None:
            run.monitor.note_skipped_images(state.step, names)
    if applied:
        state.bad_in_a_row = 0
    else:
        state.skipped_steps += 1
        state.bad_in_a_row += 1
        what = tally.non_finite(row) or "the gradient"
        run.say(f"step {state.step}: {what} is not finite: skipped, {state.bad_in_a_row} in a row{_at_floor(run)}")
    row["skipped_images"], row["skipped_steps"] = state.skipped_images, state.skipped_steps


def _give_up(run: Run, tally: Tally, row: dict[str, float | int]) -> None:
    """Stop with a report: every rank comes here in the same step."""
    samples = tally.gather_samples()
    report = run.out / layout.NON_FINITE
    if distributed.rank() == 0:
        values = {key: repr(value) for key, value in row.items()}
        layout.write_json(report, {"step": run.state.step, "values": values, "sample_ids": samples})
    shown = ", ".join(samples[:8]) + (f" … ({len(samples)} in all)" if len(samples) > 8 else "")
    raise UserError(
        f"stopped at step {run.state.step}: {run.state.bad_in_a_row} steps in a row were not finite "
        f"(train.max_bad_steps); last: {tally.non_finite(row) or 'the gradient'}; samples {shown}; "
        f"all values and sample ids in {report}; lower train.lr or look at these samples"
    )


def _silent(message: str) -> None:
    """Ranks other than 0 say nothing."""
