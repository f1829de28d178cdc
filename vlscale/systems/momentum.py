"""What systems with a momentum teacher are composed of: teacher and queues, masked texts, negatives, matching.

Teacher and queues follow ALBEF (section 3.2 and 3.3). Nothing here knows which system it is part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.config import Teacher as TeacherOptions
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.bert import FusionEncoder, KeyValue, TextEncoder, concat_context, select_context
from vlscale.nn.queue import EMPTY, FeatureQueue, IdQueue
from vlscale.nn.teacher import Teacher
from vlscale.objectives import masking, matching
from vlscale.systems.protocol import Choices, Progress

TAUGHT = ("vision", "vision_proj", "text_encoder", "text_proj", "fusion_encoder", "mlm_head")
"""The student's modules that have a momentum copy."""


class MaskedTexts(NamedTuple):
    """Texts with words to predict."""

    input_ids: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64, −100 where not masked."""
    capacity: int
    """Rows C that hold the masked positions."""


class Taught(NamedTuple):
    """What the teacher says of a batch; no gradient."""

    image_feat: Tensor
    """[B, d] fp32, unit length."""
    text_feat: Tensor
    """[B, d] fp32, unit length."""
    mlm_logits: Tensor | None
    """[C, V], rows as `masking.gather_masked` orders them; None where α is 0, or no words are masked."""


class Momentum:
    """Teacher, queues of its features, and the step's features until they are pushed.

    Not a module: the teacher would be cast by native half precision. Its owner carries `state()`.
    """

    def __init__(self, student: nn.Module | None, options: TeacherOptions, embed_dim: int, ids: bool = False) -> None:
        """
        Args:
            student: has the modules of TAUGHT; None: nothing is taught, carried or kept.
            ids: remember which image each column of the queues is of, as the release's retrieval fine-tuning does and
                its pre-training does not.
        """
        self.options, self.taught = options, student is not None
        size, taught = (options.queue_size, TAUGHT) if self.taught else (0, ())
        self.teacher = Teacher({name: getattr(student, name) for name in taught}, options.momentum)
        self.image_queue = FeatureQueue(embed_dim, size, seed=0)
        self.text_queue = FeatureQueue(embed_dim, size, seed=1)
        self.id_queue = IdQueue(options.queue_size) if ids else None
        self.kept: list[Tensor] = []
        """[B, 2d] of each micro-batch: image and text features."""
        self.kept_ids: list[Tensor] = []
        """[B] of each micro-batch."""
        self._kept_step = -1

    @property
    def queue_ids(self) -> Tensor | None:
        """[Q] int64, image ids of both queues' columns; None where they are not remembered."""
        return None if self.id_queue is None else self.id_queue.ids

    def alpha(self, progress: Progress) -> float:
        """Weight of the teacher's targets: linear from 0 over epoch 0, then constant."""
        return self.options.alpha * min(1.0, progress.epoch)

    @torch.no_grad()
    def teach(self, batch: Batch, masked: MaskedTexts | None, alpha: float, student_dtype: torch.dtype) -> Taught:
        """The teacher's features of the batch and, where words are masked and α counts, its MLM logits."""
        teacher = self.teacher
        half = student_dtype != torch.float32  # native half precision has no autocast; the fp32 teacher takes its own
        with torch.autocast(batch.images.device.type, student_dtype) if half else nullcontext():
            images = teacher["vision"](batch.images if batch.second_images is None else batch.second_images)
            texts, masked_texts = encode_clean_and_masked(teacher["text_encoder"], batch, masked if alpha else None)
            image_feat = unit(teacher["vision_proj"](images[:, 0]))
            text_feat = unit(teacher["text_proj"](texts[:, 0]))
            if masked is None or masked_texts is None:
                return Taught(image_feat, text_feat, None)
            fusion = teacher["fusion_encoder"]
            fused = fusion(masked_texts, batch.attention_mask, fusion.project_context(images))
            rows = masking.gather_masked(fused, masked.labels, masked.capacity)
            logits = teacher["mlm_head"](rows.states, word_table(teacher["text_encoder"]))
        return Taught(image_feat, text_feat, logits)

    def keep(self, taught: Taught, image_ids: Tensor, progress: Progress) -> None:
        """Remember a micro-batch's features, and whose they are, until the step is done."""
        if progress.step != self._kept_step:  # a step that was skipped leaves features that must not be pushed
            self._forget()
            self._kept_step = progress.step
        self.kept.append(torch.cat([taught.image_feat, taught.text_feat], dim=1))  # [B, 2d]
        self.kept_ids.append(image_ids)

    def after_step(self) -> None:
        """Move the teacher, push the step's features of all ranks and micro-batches."""
        self.teacher.update()
        if self.kept:
            gathered = distributed.gather(torch.cat(self.kept))  # [G, 2d]
            images, texts = gathered.chunk(2, dim=1)
            self.image_queue.push(images)
            self.text_queue.push(texts)
            if self.id_queue is not None:
                self.id_queue.push(distributed.gather(torch.cat(self.kept_ids)))
            self._forget()

    def _forget(self) -> None:
        self.kept.clear()
        self.kept_ids.clear()

    def state(self) -> dict[str, Tensor]:
        """Teacher (fp32), queues (fp32, ids int64) and their pointers (int64), equal on every rank; not copies."""
        state = {f"teacher.{name}": value for name, value in self.teacher.state().items()}
        for name, queue in self._queues().items():
            state |= {f"{name}.{key}": value for key, value in queue.state().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Ids may be missing: nobody knows then whose the queues' columns are.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError, RuntimeError: a shape differs.
        """
        if self.id_queue is not None and "id_queue.ids" not in state:
            state = {**state, **self._unknown_ids(state)}
        require_names(self.state(), state)
        self.teacher.load_state(_inside(state, "teacher."))
        for name, queue in self._queues().items():
            queue.load_state(**_inside(state, f"{name}."))

    def start(self, state: Mapping[str, Tensor]) -> None:
        """Begin a fine-tuning with another run's teacher and queues, as the release does, where they are there and fit.

        Otherwise the teacher starts as the student is now, and the queues stay random. Whose the queues' columns are is
        known only where the other run knew it.

        Args:
            state: what `state` gave there, or a part of it, or nothing.
        """
        if not self.taught:
            return
        given = _inside(state, "teacher.")
        if _shapes(given) == _shapes(self.teacher.state()):
            self.teacher.load_state(given)
        else:
            self.teacher.copy_students()
        queues = {name: _inside(state, f"{name}.") for name in ("image_queue", "text_queue")}
        if all(_shapes(found) == _shapes(self._queues()[name].state()) for name, found in queues.items()):
            ids = _inside({**self._unknown_ids(state), **state}, "id_queue.")
            for name, queue in self._queues().items():
                queue.load_state(**queues.get(name, ids))

    def place(self, device: torch.device) -> None:
        """Move teacher and queues to `device`."""
        self.teacher.place(device)
        for queue in self._queues().values():
            queue.place(device)

    def _queues(self) -> dict[str, FeatureQueue | IdQueue]:
        if not self.taught:
            return {}
        queues: dict[str, FeatureQueue | IdQueue] = {"image_queue": self.image_queue, "text_queue": self.text_queue}
        return queues if self.id_queue is None else {**queues, "id_queue": self.id_queue}

    def _unknown_ids(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of features that somebody else pushed."""
        unknown = torch.full((self.options.queue_size,), EMPTY)
        return {"id_queue.ids": unknown, "id_queue.pointer": state["image_queue.pointer"]}


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def require_names(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises KeyError unless both have the same names."""
    if own.keys() != given.keys():
        missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise KeyError(f"carried state: missing {missing}, unknown {unknown}")


def mask_texts(
    batch: Batch, vocabulary: Vocabulary, probability: float, progress: Progress, choices: Choices
) -> MaskedTexts:
    """The batch's texts with words masked for MLM, or those that were chosen."""
    if choices.masked_input_ids is not None and choices.mlm_labels is not None:
        return MaskedTexts(choices.masked_input_ids, choices.mlm_labels, batch.input_ids.numel())
    ids, labels = masking.mask_tokens(batch.input_ids, vocabulary, probability, progress.generator)
    return MaskedTexts(ids, labels, masking.masking_capacity(len(ids), ids.shape[1], probability))


def encode_clean_and_masked(
    encoder: TextEncoder, batch: Batch, masked: MaskedTexts | None
) -> tuple[Tensor, Tensor | None]:
    """Both texts in one pass of the encoder, or the clean ones alone; [B, L, D] each."""
    if masked is None:
        return encoder(batch.input_ids, batch.attention_mask), None
    states = encoder(torch.cat([batch.input_ids, masked.input_ids]), batch.attention_mask.repeat(2, 1))
    clean, hidden = states.chunk(2)
    return clean, hidden


def choose_negatives(
    sim_t2i: Tensor, sim_i2t: Tensor, batch: Batch, progress: Progress, choices: Choices
) -> matching.Negatives:
    """Hard negatives by the local similarities [B, B], or those that were chosen."""
    if choices.negative_images is not None and choices.negative_texts is not None:
        return matching.chosen_negatives(choices.negative_images, choices.negative_texts, batch.image_ids)
    return matching.draw_negatives(sim_t2i, sim_i2t, batch.image_ids, progress.generator)


def match_states(
    encoder: FusionEncoder, texts: Tensor, mask: Tensor, context: list[KeyValue], negatives: matching.Negatives
) -> Tensor:
    """Fused states [3B, 1, D] of: the pairs, every text with its wrong image, every image with its wrong text."""
    queries = torch.cat([texts, texts, texts[negatives.texts]])  # [3B, L, D]
    query_mask = torch.cat([mask, mask, mask[negatives.texts]])
    images = concat_context(context, select_context(context, negatives.images), context)
    return encoder(queries, query_mask, images, cls_only=True)


def unit(features: Tensor) -> Tensor:
    """[B, d] → fp32, unit length."""
    return F.normalize(features.float(), dim=-1)


def word_table(encoder: TextEncoder) -> Tensor:
    """[V, D], tied to the MLM head."""
    return encoder.embeddings.word_embeddings.weight
