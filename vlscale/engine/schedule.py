"""Learning rate, gradient accumulation and seeds: pure functions of the recipe and the step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from vlscale.config import Rate, Train
from vlscale.errors import UserError


def learning_rate(rate: Rate, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Rate of the optimizer step that follows `step` finished ones.

    Linear from `warmup_lr` to `lr` over the warm-up; then a cosine or a line to `min_lr` at `total_steps`, or, with
    `steps`, `lr` times `factor` from each of the `milestones` on.
    """
    warmup = rate.warmup_steps if rate.warmup_share is None else round(rate.warmup_share * total_steps)
    if step < warmup:
        return rate.warmup_lr + (rate.lr - rate.warmup_lr) * step / warmup
    if rate.schedule == "steps":
        passed = sum(step >= round(milestone * steps_per_epoch) for milestone in rate.milestones)
        return rate.lr / (1 / rate.factor) ** passed  # 1 / 0.1 is 10 exactly, 0.1 is not a tenth
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - done if rate.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return rate.min_lr + (rate.lr - rate.min_lr) * left


def total_steps(train: Train, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run; `max_steps` wins over `epochs`."""
    if train.max_steps is not None:
        return train.max_steps
    if train.epochs is None:
        raise UserError("train: set max_steps or epochs")
    return max(1, round(train.epochs * steps_per_epoch))


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """global_batch = micro_batch × world × accumulation."""

    global_batch: int
    micro_batch: int
    world: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} images per step = {self.micro_batch} per rank and pass "
            f"× {self.world} ranks × {self.accumulation} accumulated"
        )


def batch_plan(train: Train, world: int) -> BatchPlan:
    """Split the global batch over ranks and passes.

    Raises:
        UserError: it does not divide; the arithmetic is in the message.
    """
    total = train.global_batch
    if train.micro_batch is None:
        if total % world:
            raise UserError(
                f"train.global_batch={total} over {world} ranks leaves {total % world} images: "
                f"take a multiple of {world}, such as {total - total % world or world}"
            )
        return BatchPlan(total, total // world, world, 1)
    per_pass = train.micro_batch * world
    if per_pass < 1 or total % per_pass:
        raise UserError(
            f"train.global_batch={total} is not a multiple of micro_batch × ranks = {train.micro_batch} × {world} = "
            f"{per_pass}: change train.global_batch or train.micro_batch"
        )
    return BatchPlan(total, train.micro_batch, world, total // per_pass)


def draw_seed(*keys: int | str) -> int:
    """63-bit seed that is a function of the keys alone, such as (seed, step, micro step, rank)."""
    text = "/".join(str(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
