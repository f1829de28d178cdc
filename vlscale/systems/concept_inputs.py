"""MVPTR's inputs: where words, phrases and tags stand, and which of them a step hides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.config.mvptr import MvptrSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.objectives.concepts import mask_concepts
from vlscale.objectives.masking import IGNORED


class MaskedInputs(NamedTuple):
    """Both sides of the batch with words, phrases and tags hidden, and what was."""

    text_ids: Tensor
    """[B, L] int64."""
    word_labels: Tensor
    """[B, L] int64, −100 where nothing is to be predicted."""
    phrase_labels: Tensor
    """[B, L] int64, numbers of phrases, not ids."""
    grounded: Tensor
    """[B, P] bool: phrases that can be read, which WPG grounds."""
    tag_ids: Tensor
    """[B, Lt] int64."""
    tag_labels: Tensor
    """[B, Lt] int64."""


def mask_inputs(
    batch: Batch, config: MvptrSystem, vocabulary: Vocabulary, phrases: int, generator: torch.Generator | None = None
) -> MaskedInputs:
    """Hide words (in stage 2), phrases and tags, BERT-style.

    A phrase that contains a hidden word would give it away: it becomes [MASK] too, and is not asked for. Hidden phrases
    are left out of WPG.
    """
    places, special = given(batch.phrase_places), (vocabulary.pad, vocabulary.cls, vocabulary.sep)
    plain = torch.stack([batch.input_ids == identity for identity in special]).any(0)
    probability = config.mlm_probability if config.stage == 2 else 0.0
    everything = (0, vocabulary.size)
    words = mask_concepts(batch.input_ids, ~plain & (places == 0), vocabulary.mask, everything, probability, generator)
    rows = (vocabulary.size, vocabulary.size + max(phrases, 1))
    concepts = mask_concepts(words.input_ids, places > 0, vocabulary.mask, rows, config.mcr.phrases, generator)
    away = phrases_saying(batch, words.labels != IGNORED)
    labels = torch.where(away | (concepts.labels == IGNORED), IGNORED, concepts.labels - vocabulary.size)
    hidden = (concepts.labels != IGNORED) | away
    tag_places = given(batch.tag_places) > 0
    tags = mask_concepts(given(batch.tag_ids), tag_places, vocabulary.mask, everything, config.mcr.tags, generator)
    return MaskedInputs(
        text_ids=concepts.input_ids.masked_fill(away, vocabulary.mask),
        word_labels=words.labels,
        phrase_labels=labels,
        grounded=phrase_slots(batch) & ~_at_slots(hidden, batch),
        tag_ids=tags.input_ids,
        tag_labels=tags.labels,
    )


def phrases_saying(batch: Batch, words: Tensor) -> Tensor:
    """Where phrases stand that contain one of these words, which they would give away; [B, L] bool → [B, L] bool."""
    touched = (words[:, None] & given(batch.phrase_words)).any(2)  # [B, P]
    return F.pad(touched, (1, 0)).gather(1, given(batch.phrase_places))


def given(field: Tensor | None) -> Tensor:
    """A field of the batch that `data.concepts` fills."""
    assert field is not None
    return field


def own(batch: Batch) -> Tensor:
    """[B] int64: every text, and its own image."""
    return torch.arange(len(batch), device=batch.input_ids.device)


def image_mask(batch: Batch) -> Tensor:
    """[B, Lt + R] int64."""
    return torch.cat([given(batch.tag_mask), given(batch.region_mask)], dim=1)


def phrase_masks(batch: Batch) -> Tensor:
    """[B, P, L] bool: where each phrase stands."""
    slots = torch.arange(1, given(batch.phrase_words).shape[1] + 1, device=batch.input_ids.device)
    return given(batch.phrase_places)[:, None] == slots[:, None]


def phrase_slots(batch: Batch) -> Tensor:
    """[B, P] bool: which of the slots hold a phrase."""
    return phrase_masks(batch).any(2)


def _at_slots(places: Tensor, batch: Batch) -> Tensor:
    """Of every phrase what is true at its place; [B, L] bool → [B, P] bool."""
    return (phrase_masks(batch) & places[:, None]).any(2)
