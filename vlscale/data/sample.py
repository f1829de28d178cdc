"""The records that cross module borders: `Sample` (files), `Batch` (tensors) and `Vocabulary` (special ids)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its texts and whatever its source knows of it."""

    id: str
    """Unique in its data set; the image path where the source gives none."""
    image: Path
    captions: tuple[str, ...] = ()
    split: str = "train"
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """x1, y1, x2, y2 as shares of the image's width and height."""
    tags: tuple[str, ...] = ()
    """One per box."""
    tuples: tuple[tuple[str, ...], ...] = ()
    """Scene-graph tuples: (object,), (attribute, object) or (subject, relation, object)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the source that vlscale has no name for, kept as they are."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Size and special ids of the tokenizer: all that a system knows of text."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int


@dataclass(slots=True)
class Batch:
    """B pairs of image and text on one device."""

    images: Tensor
    """[B, 3, H, W]: uint8 as loaded, float32 once normalised."""
    input_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64, 1 = attend; rows end in padding."""
    image_ids: Tensor
    """[B] int64, equal where the image is the same."""
    sample_ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Unreadable images that were replaced by the next good one in the order: `path: reason`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return self.input_ids.shape[0]
