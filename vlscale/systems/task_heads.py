"""What a task puts on a system (systems.md, section 6): it reads the system's states through `System` alone.

A head asks whichever system it is handed, so that a teacher's copies are asked as the student is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from vlscale.config.tasks import EntailmentTask, GroundingTask, Nlvr2Task
from vlscale.data.examples import ENTAILMENT, TRUTH
from vlscale.data.sample import Batch
from vlscale.nn.bert import KeyValue, select_context
from vlscale.nn.heads import ClassHead
from vlscale.nn.paired import PairedFusionEncoder
from vlscale.objectives.assignment import TEMPERATURE, assign, assignment_accuracy, assignment_loss, draw_images
from vlscale.objectives.classification import classification_accuracy, classification_loss
from vlscale.objectives.contrastive import similarities
from vlscale.objectives.grounding import overlap_loss, overlap_recall
from vlscale.systems.encoding import PairEncoding
from vlscale.systems.protocol import System

Scalars = dict[str, Tensor]


class TaskHead(nn.Module):
    """A task's own parameters, its loss and its prediction."""

    def reads(self, system: System) -> tuple[str, ...]:
        """Dotted names of the system's modules that `logits` reads, see `System.joint_parts`."""
        return system.joint_parts()

    def start(self, system: System) -> None:
        """Begin from parts of the system, which has its weights by now; a head of random weights has nothing to do."""

    def logits(self, system: System, batch: Batch) -> Tensor:
        """What the loss compares with the targets, and a teacher's with its student's."""
        raise NotImplementedError

    def loss(self, logits: Tensor, batch: Batch, taught: Tensor | None, alpha: float) -> tuple[Tensor, Scalars]:
        """Scalar loss against `batch.targets`, and metrics; `taught` are a teacher's logits, of weight `alpha`."""
        raise NotImplementedError

    def predict(self, system: System, batch: Batch) -> Tensor:
        """[B, C] fp32: a score per class or answer."""
        return self.logits(system, batch).float()


class _Classes(TaskHead):
    """One class out of a few: `targets["labels"]` [B] int64."""

    def loss(self, logits: Tensor, batch: Batch, taught: Tensor | None, alpha: float) -> tuple[Tensor, Scalars]:
        labels = batch.targets["labels"]
        accuracy = classification_accuracy(logits, labels)
        return classification_loss(logits, labels, taught, alpha), {"accuracy": accuracy}


class EntailmentHead(_Classes):
    """SNLI-VE: a classifier over the pair's feature."""

    def __init__(self, task: EntailmentTask, width: int) -> None:
        super().__init__()
        self.classifier = ClassHead(width, len(ENTAILMENT), round(task.hidden * width), task.dropout)

    def logits(self, system: System, batch: Batch) -> Tensor:
        return self.classifier(pair_feature(system, batch))


class TwoPassesHead(_Classes):
    """NLVR2: the text with each image in a pass of its own, a classifier over both features (SOHO, section 4.2.3)."""

    def __init__(self, task: Nlvr2Task, width: int) -> None:
        super().__init__()
        self.classifier = ClassHead(2 * width, len(TRUTH), round(task.hidden * width), task.dropout)

    def logits(self, system: System, batch: Batch) -> Tensor:
        text = system.encode_text(batch)
        images = system.encode_image(batch), system.encode_image(right_images(batch))
        return self.classifier(torch.cat([system.joint_feature(system.fuse(text, image)) for image in images], dim=1))


class PairedHead(_Classes):
    """NLVR2: fusion layers doubled, each pair of them reads both images (ALBEF, section 3.4).

    Before it may come text assignment, which trains the same layers: see `assign_texts`.
    """

    def __init__(self, task: Nlvr2Task, system: PairEncoding) -> None:
        super().__init__()
        fusion, config = system.fusion_encoder, cast(Any, system).config.text
        self.encoder = PairedFusionEncoder(config, system.vision.width, fusion.checkpointing)
        self.classifier = ClassHead(config.width, len(TRUTH), round(task.hidden * config.width), task.dropout)
        if task.assignment_steps:
            self.assignment = nn.Linear(config.width, 3)

    def reads(self, system: System) -> tuple[str, ...]:
        return tuple(name for name in system.joint_parts() if name != "fusion_encoder")

    def start(self, system: System) -> None:
        self.encoder.start_from(cast(PairEncoding, system).fusion_encoder)

    def logits(self, system: System, batch: Batch) -> Tensor:
        both = replace(batch, images=torch.cat([batch.images, right_images(batch).images]))
        context = self.encoder.project_context(system.encode_image(both).tokens)  # of 2B images
        first = [KeyValue(kv.key[: len(batch)], kv.value[: len(batch)]) for kv in context]
        second = [KeyValue(kv.key[len(batch) :], kv.value[len(batch) :]) for kv in context]
        return self.classifier(self._feature(system, batch, first, second))

    def assign_texts(
        self, system: System, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Scalars]:
        """Text assignment: which of two left images of the batch does the text belong to, or neither? Loss, metrics."""
        image = system.encode_image(batch)
        features, ids = image.pooled.detach(), batch.image_ids
        divisor = torch.full((), TEMPERATURE, device=features.device)
        pairs = assign(draw_images(similarities(features, features, divisor), ids, generator), ids)
        context = self.encoder.project_context(image.tokens)
        shown = select_context(context, pairs.first), select_context(context, pairs.second)
        logits = self.assignment(self._feature(system, batch, *shown))
        return assignment_loss(logits, pairs), {"assignment_accuracy": assignment_accuracy(logits, pairs)}

    def _feature(self, system: System, batch: Batch, first: list[KeyValue], second: list[KeyValue]) -> Tensor:
        text = system.encode_text(batch)
        return system.joint_feature(self.encoder(text.tokens, text.mask, first, second, cls_only=True))


class ScoresPhrases(Protocol):
    """A system that compares phrases with regions so that it can be trained."""

    def phrase_region_scores(self, batch: Batch, spans: Tensor, layer: int | None = None) -> Tensor: ...

    def phrase_parts(self, layer: int | None = None) -> tuple[str, ...]:
        """Dotted names of the modules that `phrase_region_scores` reads."""
        ...


class GroundingHead(TaskHead):
    """Flickr30k Entities: the system's own cosines of phrases and regions learn their IoU (MVPTR, section 4.2.3).

    It has no parameters, so that a tuned system is asked by `phrase_region_scores` as any other.
    """

    def __init__(self, task: GroundingTask) -> None:
        super().__init__()
        self.layer, self.kind = task.layer, task.loss

    def reads(self, system: System) -> tuple[str, ...]:
        return cast(ScoresPhrases, system).phrase_parts(self.layer)

    def logits(self, system: System, batch: Batch) -> Tensor:
        return cast(ScoresPhrases, system).phrase_region_scores(batch, batch.targets["spans"], self.layer)

    def loss(self, logits: Tensor, batch: Batch, taught: Tensor | None, alpha: float) -> tuple[Tensor, Scalars]:
        overlaps, grounded = batch.targets["overlaps"], batch.targets["grounded"]
        recall = overlap_recall(logits, overlaps, grounded)
        return overlap_loss(logits, overlaps, grounded, self.kind), {"region_accuracy": recall}

    def predict(self, system: System, batch: Batch) -> Tensor:
        raise TypeError("grounding has no classes: ask phrase_region_scores")


def pair_feature(system: System, batch: Batch) -> Tensor:
    """[B, D] of each text with its image."""
    return system.joint_feature(system.fuse(system.encode_text(batch), system.encode_image(batch)))


def right_images(batch: Batch) -> Batch:
    """Of pairs."""
    assert batch.right is not None
    return batch.right
