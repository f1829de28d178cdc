"""Masked language modelling (ALBEF, section 3.2 and 3.3; masks as in BERT and ALBEF's release)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlscale.data.sample import Vocabulary
from vlscale.objectives.classification import distilled_cross_entropy

IGNORED = -100
"""Label of a position that is not predicted."""


class MaskedTokens(NamedTuple):
    """Texts with words to predict."""

    input_ids: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64: the original id where the word is to be predicted, else −100."""


class MaskedStates(NamedTuple):
    """The rows that the vocabulary projection has to see."""

    states: Tensor
    """[C, D]."""
    labels: Tensor
    """[C] int64, −100 in the rows that fill up."""


def mask_tokens(
    input_ids: Tensor, vocabulary: Vocabulary, probability: float, generator: torch.Generator | None = None
) -> MaskedTokens:
    """Select every word with `probability`; 80 % become [MASK], 10 % a random id, 10 % stay.

    PAD, CLS and SEP are never selected. The draws are made on the CPU, so that they do not depend on the device.
    """
    draws = torch.rand(3, *input_ids.shape, generator=generator).to(input_ids.device, non_blocking=True)
    words = torch.randint(vocabulary.size, input_ids.shape, generator=generator)
    words = words.to(input_ids.device, non_blocking=True)
    special = (input_ids == vocabulary.pad) | (input_ids == vocabulary.cls) | (input_ids == vocabulary.sep)
    selected = (draws[0] < probability) & ~special
    masked = selected & (draws[1] < 0.8)
    replaced = selected & ~masked & (draws[2] < 0.5)
    ids = torch.where(replaced, words, input_ids).masked_fill(masked, vocabulary.mask)
    return MaskedTokens(ids, torch.where(selected, input_ids, IGNORED))


def masking_capacity(batch: int, length: int, probability: float) -> int:
    """Rows that hold the selected words of a batch: six standard deviations above their mean, at most B · L."""
    count = batch * length
    mean = count * probability
    return min(count, math.ceil(mean + 6 * math.sqrt(mean * (1 - probability))) + 1)


def gather_masked(states: Tensor, labels: Tensor, capacity: int) -> MaskedStates:
    """The states of the selected positions, in a shape that is known without asking the device.

    Args:
        states: [B, L, D].
        labels: [B, L], −100 where not selected.
        capacity: rows C of the result; what is selected beyond them is left out, what is missing is filled up with
            unselected positions, whose label −100 leaves them out of the loss.
    """
    flat = labels.flatten()
    first_selected = (flat == IGNORED).to(torch.uint8).argsort(stable=True)[:capacity]
    return MaskedStates(states.flatten(0, 1).index_select(0, first_selected), flat.index_select(0, first_selected))


def mlm_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """(1 − α) · cross-entropy + α · distillation, a mean over the selected rows (ALBEF, eq. 7); 0 where there is none.

    Args:
        logits: [C, V].
        labels: [C], −100 in rows that do not count.
        teacher_logits: [C, V]; their softmax is the soft target.
        alpha: weight of the distillation, 0 without a teacher.
    """
    selected = labels != IGNORED
    each = distilled_cross_entropy(logits, labels.clamp(min=0), teacher_logits, alpha)  # [C]
    return torch.where(selected, each, 0.0).sum() / selected.sum().clamp(min=1)


def masked_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the selected rows whose highest logit is the label; arguments as in `mlm_loss`."""
    selected = labels != IGNORED
    right = (logits.detach().argmax(1) == labels) & selected
    return right.sum() / selected.sum().clamp(min=1)
