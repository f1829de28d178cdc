"""The whole recipe, and its parts that are neither system nor data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlscale.config.data import Data
from vlscale.config.section import Section
from vlscale.config.systems import LOSSES, SystemConfig


class Train(Section):
    """Length, batch, optimizer and schedule."""

    epochs: PositiveFloat | None = 30
    max_steps: PositiveInt | None = None
    """Optimizer steps; wins over `epochs`."""
    seed: NonNegativeInt = 0
    global_batch: PositiveInt = 512
    """Pairs per optimizer step over all ranks and accumulation steps."""
    micro_batch: PositiveInt | None = None
    """Pairs per rank and forward pass; default global_batch / ranks. The quotient is accumulated."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at step 0, rising linearly to `lr` …"""
    warmup_steps: NonNegativeInt = 1000
    """… in so many steps."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: NonNegativeFloat = 0.0
    """Largest gradient norm; 0 does not clip."""
    max_bad_steps: PositiveInt = 20
    """Stop after so many steps in a row with a non-finite loss or gradient."""


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""


class Evaluation(Section):
    """Defaults of `vlscale eval` for this recipe."""

    rerank: NonNegativeInt = 128
    """First-stage candidates per query that ITM re-ranks."""
    itm_score: Literal["logit", "odds"] = "logit"
    """Re-rank by the logit of class 1, as ALBEF's release, or by the odds of a match: class 1 minus class 0."""
    batch_size: PositiveInt = 64


class Recipe(Section):
    """Everything that a run depends on, besides the DeepSpeed config."""

    name: str
    system: SystemConfig
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each loss by name; a loss not named counts with weight 1."""
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        known = LOSSES[self.system.name]
        unknown = sorted(set(self.weights) - set(known))
        if unknown:
            raise ValueError(
                f"weights: {', '.join(unknown)} is no loss of {self.system.name}; it has {', '.join(known)}"
            )
        longest, rows = self.data.tokenizer.max_tokens, self.system.text.max_positions
        if longest > rows:
            raise ValueError(f"data.tokenizer.max_tokens: {longest} tokens, but system.text.max_positions is {rows}")
        return self
