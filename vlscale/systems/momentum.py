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
from vlscale.nn.queue import FeatureQueue
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
    """[C, V], rows as `masking.gather_masked` orders them; None where α is 0."""


class Momentum:
    """Teacher, queues of its features, and the step's features until they are pushed.

    Not a module: the teacher would be cast by native half precision. Its owner carries `state()`.
    """

    def __init__(self, student: nn.Module, options: TeacherOptions, embed_dim: int) -> None:
        """`student` has the modules of TAUGHT."""
        self.options = options
        self.teacher = Teacher({name: getattr(student, name) for name in TAUGHT}, options.momentum)
        self.image_queue = FeatureQueue(embed_dim, options.queue_size, seed=0)
        self.text_queue = FeatureQueue(embed_dim, options.queue_size, seed=1)
        self.kept: list[Tensor] = []
        """[B, 2d] of each micro-batch: image and text features."""
        self._kept_step = -1

    def alpha(self, progress: Progress) -> float:
        """Weight of the teacher's targets: linear from 0 over epoch 0, then constant."""
        return self.options.alpha * min(1.0, progress.epoch)

    @torch.no_grad()
    def teach(self, batch: Batch, masked: MaskedTexts, alpha: float, student_dtype: torch.dtype) -> Taught:
        """The teacher's features of the batch and, where α counts, its MLM logits."""
        teacher = self.teacher
        half = student_dtype != torch.float32  # native half precision has no autocast; the fp32 teacher takes its own
        with torch.autocast(batch.images.device.type, student_dtype) if half else nullcontext():
            images = teacher["vision"](batch.images if batch.second_images is None else batch.second_images)
            if alpha:
                texts, masked_texts = encode_clean_and_masked(teacher["text_encoder"], batch, masked)
            else:
                texts = teacher["text_encoder"](batch.input_ids, batch.attention_mask)
            image_feat = unit(teacher["vision_proj"](images[:, 0]))
            text_feat = unit(teacher["text_proj"](texts[:, 0]))
            if not alpha:
                return Taught(image_feat, text_feat, None)
            fusion = teacher["fusion_encoder"]
            fused = fusion(masked_texts, batch.attention_mask, fusion.project_context(images))
            rows = masking.gather_masked(fused, masked.labels, masked.capacity)
            logits = teacher["mlm_head"](rows.states, word_table(teacher["text_encoder"]))
        return Taught(image_feat, text_feat, logits)

    def keep(self, taught: Taught, progress: Progress) -> None:
        """Remember a micro-batch's features until the step is done."""
        if progress.step != self._kept_step:  # a step that was skipped leaves features that must not be pushed
            self.kept.clear()
            self._kept_step = progress.step
        self.kept.append(torch.cat([taught.image_feat, taught.text_feat], dim=1))  # [B, 2d]

    def after_step(self) -> None:
        """Move the teacher, push the step's features of all ranks and micro-batches."""
        self.teacher.update()
        if self.kept:
            gathered = distributed.gather(torch.cat(self.kept))  # [G, 2d]
            images, texts = gathered.chunk(2, dim=1)
            self.image_queue.push(images)
            self.text_queue.push(texts)
            self.kept.clear()

    def state(self) -> dict[str, Tensor]:
        """Teacher (fp32), queues (fp32) and their pointers (int64), equal on every rank; not copies."""
        state = {f"teacher.{name}": value for name, value in self.teacher.state().items()}
        for name, queue in self._queues().items():
            state |= {f"{name}.{key}": value for key, value in queue.state().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError, RuntimeError: a shape differs.
        """
        require_names(self.state(), state)
        prefix = "teacher."
        self.teacher.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        for name, queue in self._queues().items():
            queue.load_state(state[f"{name}.features"], state[f"{name}.pointer"])

    def place(self, device: torch.device) -> None:
        """Move teacher and queues to `device`."""
        self.teacher.place(device)
        for queue in self._queues().values():
            queue.place(device)

    def _queues(self) -> dict[str, FeatureQueue]:
        return {"image_queue": self.image_queue, "text_queue": self.text_queue}


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


def encode_clean_and_masked(encoder: TextEncoder, batch: Batch, masked: MaskedTexts) -> tuple[Tensor, Tensor]:
    """Both texts in one pass of the encoder; [B, L, D] each."""
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
