"""The recipe's `task`: what a fine-tuning teaches a pre-trained system (systems.md, section 6)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlscale.config.section import PositiveShare, Section, Share


class Distill(Section):
    """Momentum distillation: a moving average of the tuned model softens the targets (ALBEF, section 3.3)."""

    momentum: Share = 0.995
    alpha: Share = 0.4
    """Weight of the teacher's targets."""
    ramp: bool = True
    """Rise linearly from 0 over epoch 0."""


class _Task(Section):
    """What every task has."""

    layer_decay: PositiveShare = 1.0
    """Factor of the learning rate per layer downwards; 1 trains all layers alike."""
    best: str
    """Metric of the validation split by which the best epoch is kept."""
    from_scratch: bool = False
    """Leave the weights of the pre-trained run unread, its tokenizer and vocabularies taken: what pre-training is worth
    shows in the difference."""


class _Headed(_Task):
    """What tasks have that put something new on the system."""

    head_lr: PositiveFloat = 1.0
    """Factor of the learning rate for what is new: the task's head."""
    distill: Distill | None = None


class RetrievalTask(_Task):
    """Image-text retrieval: the system's own contrast and matching, targets aware of the image."""

    name: Literal["retrieval"] = "retrieval"
    best: str = "rsum"


class VqaTask(_Headed):
    """Visual question answering: a decoder that ranks answers, or a classifier over them."""

    name: Literal["vqa"] = "vqa"
    mode: Literal["generate", "classify"] = "generate"
    answers: str | None = None
    """Vocabulary of answers written by `vlscale data answers`; none: made of the training questions."""
    min_count: PositiveInt = 9
    """Questions that an answer made here needs …"""
    size: PositiveInt | None = None
    """… or take so many, the most frequent ones."""
    decoder_layers: PositiveInt = 6
    """Of the decoder (`generate`), which starts from the fusion layers where there are as many."""
    candidates: PositiveInt = 128
    """Answers that are scored whole, chosen by their first word (`generate`)."""
    max_answer: Annotated[int, Field(ge=3)] = 10
    """Tokens of an answer, [CLS] and [SEP] among them (`generate`)."""
    head: Literal["mlp", "words"] = "mlp"
    """Classifier (`classify`): two layers, or MVPTR's one, whose rows start from the answers' words."""
    dropout: Share = 0.1
    """Of the two-layer classifier."""
    best: str = "accuracy"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.mode == "classify" and self.distill is not None:
            raise ValueError("distill: soft scores have no teacher: remove it, or use `mode: generate`")
        return self


class EntailmentTask(_Headed):
    """SNLI-VE: does the image entail, contradict or leave open what a sentence says?"""

    name: Literal["snli-ve"] = "snli-ve"
    hidden: PositiveFloat = 1.0
    """Width of the classifier's hidden layer, in widths of the text encoder."""
    dropout: Share = 0.0
    best: str = "accuracy"


class Nlvr2Task(_Headed):
    """NLVR2: is a sentence true of a pair of images?"""

    name: Literal["nlvr2"] = "nlvr2"
    mode: Literal["paired", "passes"] = "passes"
    """`paired`: fusion layers doubled, each pair of them reads both images (ALBEF). `passes`: each image in a pass of
    its own, both [CLS] states joined (SOHO)."""
    hidden: PositiveFloat = 1.0
    dropout: Share = 0.0
    assignment_steps: NonNegativeInt = 0
    """Steps of text-assignment pre-training before the task (`paired`), of those that `train` counts."""
    best: str = "accuracy"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.assignment_steps and self.mode != "paired":
            raise ValueError("assignment_steps: only layers that read two images learn it: use `mode: paired`, or 0")
        return self


class GroundingTask(_Task):
    """Flickr30k Entities: regions that a phrase means."""

    name: Literal["grounding"] = "grounding"
    loss: Literal["mse", "bce"] = "mse"
    """Between scores and IoU as soft labels."""
    layer: NonNegativeInt | None = None
    """Multimodal layer whose states are compared; none: the one of WPG."""
    best: str = "any_r1"


TaskConfig = Annotated[
    RetrievalTask | VqaTask | EntailmentTask | Nlvr2Task | GroundingTask, Field(discriminator="name")
]
TASKS: tuple[str, ...] = ("retrieval", "vqa", "nlvr2", "snli-ve", "grounding")


def loss_names(task: TaskConfig, system: tuple[str, ...]) -> tuple[str, ...]:
    """Names that `weights` may use: the system's own losses for retrieval, else the task's one."""
    return system if task.name == "retrieval" else (task.name,)
