"""The whole recipe, and its parts that are neither system nor data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from vlscale.config.data import Data
from vlscale.config.section import PositiveShare, Section, Share
from vlscale.config.systems import LOSSES, SystemConfig
from vlscale.config.tasks import GroundingTask, Nlvr2Task, TaskConfig, loss_names


class Rate(Section):
    """Learning rate over the run: a linear warm-up, then a cosine, a line or steps."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at step 0, rising linearly to `lr` …"""
    warmup_steps: NonNegativeInt = 1000
    """… in so many steps …"""
    warmup_share: Share | None = None
    """… or in this share of the run, which wins."""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end of the cosine or line."""
    milestones: tuple[PositiveFloat, ...] = ()
    """Epochs at which `steps` lowers the rate …"""
    factor: PositiveShare = 0.1
    """… to this share of itself."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("milestones: `schedule: steps` needs the epochs at which the rate falls, such as [25, 35]")
        if self.schedule != "steps" and self.milestones:
            raise ValueError(f"milestones: `schedule: {self.schedule}` does not read them: remove them or take `steps`")
        return self


class Sgd(Rate):
    """A second optimizer, SGD, for the system's backbone; the rest stays with AdamW."""

    lr: PositiveFloat = 1e-2
    warmup_lr: NonNegativeFloat = 1e-2 / 3
    momentum: Share = 0.9
    weight_decay: NonNegativeFloat = 5e-4


class Train(Rate):
    """Length, batch, optimizer and schedule."""

    epochs: PositiveFloat | None = 30
    max_steps: PositiveInt | None = None
    """Optimizer steps, of each stage; wins over `epochs`."""
    stages: tuple[PositiveFloat, ...] = ()
    """Epochs of each stage, for a system that is trained in several: every one starts from the weights of the one
    before, optimizer and schedule afresh. Wins over `epochs`; none: `system.stage` alone."""
    seed: NonNegativeInt = 0
    global_batch: PositiveInt = 512
    """Images per optimizer step over all ranks and accumulation steps."""
    micro_batch: PositiveInt | None = None
    """Images per rank and forward pass; default global_batch / ranks. The quotient is accumulated."""
    weight_decay: NonNegativeFloat = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    backbone: Sgd | None = None
    """SGD for the parameters of `system.backbone`; none: AdamW for all."""
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
    validation: NonNegativeInt | None = 2000
    """Of a fine-tuning: examples (retrieval, grounding: images) of the validation split, the first ones, by which every
    epoch is judged; none: all of them, 0: no epoch is judged."""


class Recipe(Section):
    """Everything that a run depends on, besides the DeepSpeed config."""

    name: str
    system: SystemConfig
    task: TaskConfig | None = None
    """What a fine-tuning teaches; none: pre-training."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each loss by name; a loss not named counts with weight 1."""
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        known = LOSSES[self.system.name]
        if self.task is not None:
            known = loss_names(self.task, known)
        unknown = sorted(set(self.weights) - set(known))
        if unknown:
            raise ValueError(
                f"weights: {', '.join(unknown)} is no loss of {self.system.name}; it has {', '.join(known)}"
            )
        self._texts_fit()
        self._system_reads_it()
        self._stages_fit()
        self._task_fits()
        return self

    @property
    def stages(self) -> list[Recipe]:
        """The recipe of each stage alone, in order; itself where there are no `train.stages`."""
        epochs = self.train.stages
        if not epochs:
            return [self]
        if self.system.skips_to_last:
            return [self._of_stage(len(epochs), sum(epochs))]
        return [self._of_stage(number, own) for number, own in enumerate(epochs, start=1)]

    def _of_stage(self, stage: int, epochs: float) -> Recipe:
        system = self.system.model_copy(update={"stage": stage})
        train = self.train.model_copy(update={"stages": (), "epochs": epochs})
        return self.model_copy(update={"system": system, "train": train})

    def _texts_fit(self) -> None:
        rows, concepts = self.system.text.max_positions, self.data.concepts
        longest = self.data.tokenizer.max_tokens if concepts is None else concepts.positions
        if longest > rows:
            key = "data.tokenizer.max_tokens" if concepts is None else "data.concepts"
            raise ValueError(f"{key}: {longest} tokens, but system.text.max_positions is {rows}")

    def _stages_fit(self) -> None:
        stages, most = len(self.train.stages), self.system.stages
        if stages and stages != most:
            what = f"it has {most}" if most > 1 else "it has one: remove it, and set train.epochs"
            raise ValueError(f"train.stages: {stages} stages of {self.system.name}, but {what}")

    def _task_fits(self) -> None:
        """What the system cannot be tuned for."""
        task, system = self.task, self.system
        if isinstance(task, Nlvr2Task):
            if system.concepts:
                raise ValueError(
                    f"task: {task.name} shows two images, and {system.name} reads regions of one: take another system"
                )
            if task.mode == "paired" and not system.asks_images:
                raise ValueError(
                    f"task.mode: paired doubles layers that let texts ask images, {system.name} has none: use passes"
                )
        if isinstance(task, GroundingTask) and not system.concepts:
            raise ValueError(
                f"task: {task.name} teaches which region a phrase means, and {system.name} reads no regions: take a "
                "system that does, such as mvptr"
            )

    def _system_reads_it(self) -> None:
        """Keys that only some systems read are errors elsewhere."""
        system = self.system
        if self.data.aspect is not None and not system.padded_inputs:
            raise ValueError(f"data.aspect: {system.name} takes square images only: remove it")
        if self.data.texts.per_image > 1 and not system.many_texts:
            raise ValueError(f"data.texts: {system.name} takes one text per image: remove it")
        texts = self.data.texts
        matches = (self.task is None or self.task.name == "retrieval") and self.weights.get("itm", 1.0) != 0
        if system.many_texts and not (texts.negative or texts.coin) and matches:
            raise ValueError(
                f"data.texts: {system.name} learns to match from texts of other images: set data.texts.negative (2 in "
                "the paper, with data.texts.positive 2), or weights.itm to 0"
            )
        if self.data.concepts is not None and not system.concepts:
            raise ValueError(f"data.concepts: {system.name} reads no phrases, tags or regions: remove it")
        if self.data.concepts is None and system.concepts:
            raise ValueError(f"data.concepts: {system.name} reads phrases, tags and regions: give it, see mvptr_tiny")
        if self.data.second_view and not system.second_view:
            raise ValueError(f"data.second_view: {system.name} has no use for another crop: remove it")
        if self.train.backbone is not None and not hasattr(system, "backbone"):
            raise ValueError(f"train.backbone: {system.name} has no backbone of its own: remove it")
