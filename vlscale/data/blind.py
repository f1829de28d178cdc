"""Batches without their pictures: what a model makes of the words alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlscale.data.sample import Batch


def hide_images(batch: Batch) -> Batch:
    """The batch with every image of the mean colour, one empty region in place of an image's, and of the tags [CLS].

    Sizes and numbers of regions go too: they tell of the image.

    Args:
        batch: with normalised images, whose mean colour is 0.
    """
    regions, mask, boxes = batch.regions, batch.region_mask, batch.region_boxes
    tags = batch.tag_mask
    return replace(
        batch,
        images=torch.zeros_like(batch.images),
        image_sizes=None,
        second_images=_zeros(batch.second_images),
        regions=_zeros(regions),
        region_mask=None if mask is None else _first_only(mask),
        region_boxes=_zeros(boxes),
        tag_mask=None if tags is None else _first_only(tags),
        tag_places=_zeros(batch.tag_places),
        right=None if batch.right is None else hide_images(batch.right),
    )


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _first_only(mask: Tensor) -> Tensor:
    """Attention and pooling need something to read."""
    first = torch.zeros_like(mask)
    first[:, :1] = 1
    return first
