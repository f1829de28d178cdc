"""Text assignment: which of two images does the text belong to, or neither (ALBEF, section 3.4, before NLVR2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST, SECOND, NEITHER = range(3)
"""Classes: the image that the text belongs to."""
TEMPERATURE = 0.07
"""Divisor of the similarities that other images are drawn by; constant in the release."""


class Draws(NamedTuple):
    """Random choices for every text."""

    neither: Tensor
    """[B] bool: two wrong images; drawn with probability ⅓."""
    second: Tensor
    """[B] bool: else, the right image is the second one; drawn with probability ½."""
    others: Tensor
    """[B, 2] int64: wrong images, two different ones. The first alone is used where the right image is shown."""


class Assignment(NamedTuple):
    """Two images for every text."""

    first: Tensor
    """[B] int64, rows of the batch's images."""
    second: Tensor
    """[B] int64."""
    labels: Tensor
    """[B] int64: FIRST, SECOND or NEITHER."""
    valid: Tensor
    """[B] bool: false where the batch has too few other images; the indices mean nothing there."""


def draw_images(sim: Tensor, image_ids: Tensor, generator: torch.Generator | None = None) -> Draws:
    """Draw other images in proportion to softmax(similarities), without replacement.

    Args:
        sim: [B, B], images against images, over `TEMPERATURE`.
        image_ids: [B]; images with equal ids are never the wrong ones.
        generator: on the CPU, so that the draw does not depend on the device.
    """
    size = len(image_ids)
    coins = torch.rand(2, size, generator=generator).to(image_ids.device, non_blocking=True)
    uniform = torch.rand(size, size, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    noise = -(-uniform.log()).log().to(image_ids.device, non_blocking=True)  # Gumbel: the two highest are such a draw
    same = image_ids[:, None] == image_ids[None, :]
    noisy = (sim.detach().float() + noise).masked_fill(same, -torch.inf)
    others = noisy.topk(min(2, size), dim=1).indices
    return Draws(coins[0] <= 1 / 3, coins[1] <= 0.5, F.pad(others, (0, 2 - others.shape[1])))


def assign(draws: Draws, image_ids: Tensor) -> Assignment:
    """Put the right image and the wrong ones in their places.

    Args:
        draws: by `draw_images`, or chosen elsewhere.
        image_ids: [B]; row b is text b's own image.
    """
    own = torch.arange(len(image_ids), device=image_ids.device)
    other, another = draws.others.unbind(1)
    first = torch.where(draws.neither | draws.second, other, own)
    second = torch.where(draws.neither, another, torch.where(draws.second, own, other))
    labels = torch.where(draws.neither, NEITHER, torch.where(draws.second, SECOND, FIRST))
    wrong, also_wrong = image_ids[other] != image_ids, (image_ids[another] != image_ids) & (other != another)
    return Assignment(first, second, labels, wrong & (also_wrong | ~draws.neither))


def assignment_loss(logits: Tensor, assignment: Assignment) -> Tensor:
    """Mean cross-entropy over the valid texts; logits [B, 3] → scalar, 0 where none is valid."""
    each = F.cross_entropy(logits.float(), assignment.labels, reduction="none")
    return torch.where(assignment.valid, each, 0.0).sum() / assignment.valid.sum().clamp(min=1)


def assignment_accuracy(logits: Tensor, assignment: Assignment) -> Tensor:
    """Share of the valid texts that are assigned right; arguments as in `assignment_loss`."""
    right = (logits.detach().argmax(1) == assignment.labels) & assignment.valid
    return right.sum() / assignment.valid.sum().clamp(min=1)
