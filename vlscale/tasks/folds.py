"""Folds of a retrieval: consecutive parts of the images, each a retrieval of its own (COCO's 1k from its 5k)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import UserError
from vlscale.tasks.stages import Subset


def fold_size(folds: str | None, images: int) -> int | None:
    """Images of a fold, from what the user gave: `1k` or `1000`; None where nothing was.

    Raises:
        UserError: it is no such number, or there are not so many images.
    """
    if folds is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(k?)", folds)
    if match is None:
        raise UserError(f"--folds {folds}: expected the images of a fold, such as 1k or 1000")
    size = int(match[1]) * (1000 if match[2] else 1)
    if size > images:
        raise UserError(f"--folds {folds}: there are {images} images only")
    return size


def subsets(kept: Sequence[int], image_of_text: Tensor, size: int, images: int) -> list[Subset]:
    """The folds: images `size` at a time by their place in the split. What is left over at its end is in none.

    Args:
        kept: place of each image that could be read, ascending.
        image_of_text: [T] int64, the image of every caption, numbered as `kept` is.
        images: how many the split has, read or not.

    Raises:
        UserError: no image of a fold has captions.
    """
    places = torch.tensor(kept)
    found = []
    for start in range(0, images + 1 - size, size):
        inside = (places >= start) & (places < start + size)  # [I]
        fold = Subset(inside.nonzero()[:, 0], inside[image_of_text].nonzero()[:, 0])
        if not len(fold.texts):
            raise UserError(f"--folds: images {start + 1} to {start + size} of the split have no captions")
        found.append(fold)
    return found


def mean_of(size: int, each: Sequence[Mapping[str, float]], chance: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the result file says of the folds: their number, the mean of every metric, and each fold's."""
    return {
        "images": size,
        "count": len(each),
        "metrics": _means(each),
        "chance": _means(chance),
        "each": list(each),
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
