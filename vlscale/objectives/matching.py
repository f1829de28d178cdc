"""Image-text matching with hard negatives (ALBEF, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Negatives(NamedTuple):
    """A wrong image for every text and a wrong text for every image."""

    images: Tensor
    """[B] int64: image for text b."""
    texts: Tensor
    """[B] int64: text for image b."""
    images_valid: Tensor
    """[B] bool: false where the batch holds no other image, the drawn index means nothing there."""
    texts_valid: Tensor
    """[B] bool."""


def draw_negatives(
    sim_t2i: Tensor, sim_i2t: Tensor, image_ids: Tensor, generator: torch.Generator | None = None
) -> Negatives:
    """Draw negatives in proportion to softmax(similarities); zeros draw uniformly.

    Pairs with equal image ids get −inf before the softmax. The draw is Gumbel-max, argmax(sim + noise), which never
    fails whatever the row holds and needs no copy to the host.

    Args:
        sim_t2i: [B, B], texts against images, over the temperature.
        sim_i2t: [B, B], images against texts.
        image_ids: [B].
        generator: on the CPU, so that the draw does not depend on the device.
    """
    size = image_ids.shape[0]
    uniform = torch.rand(2, size, size, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    noise = -(-uniform.log()).log().to(image_ids.device, non_blocking=True)  # [2, B, B] Gumbel
    same = image_ids[:, None] == image_ids[None, :]  # [B, B]
    sims = torch.stack([sim_t2i, sim_i2t]).detach().float()
    images, texts = (sims + noise).masked_fill(same, -torch.inf).argmax(2)
    valid = ~same.all(1)
    return Negatives(images, texts, valid, valid)


def chosen_negatives(images: Tensor, texts: Tensor, image_ids: Tensor) -> Negatives:
    """Negatives that were chosen elsewhere; valid where they belong to another image. All arguments [B]."""
    return Negatives(images, texts, image_ids[images] != image_ids, image_ids[texts] != image_ids)


def valid_rows(negatives: Negatives) -> Tensor:
    """[3B] bool for `itm_loss`: a pair without negatives is left out whole, else it would only teach to say yes."""
    both = negatives.images_valid & negatives.texts_valid
    return torch.cat([both, negatives.images_valid, negatives.texts_valid])


def negative_weights(sim: Tensor, image_ids: Tensor) -> Tensor:
    """The distribution that `draw_negatives` draws from; sim [B, B] → [B, B], rows sum to 1 (or are all 0)."""
    same = image_ids[:, None] == image_ids[None, :]
    return sim.detach().float().masked_fill(same, -torch.inf).softmax(1).nan_to_num(0.0)


def itm_labels(rows: int, device: torch.device) -> Tensor:
    """[3B] int64: the first third is 1 = match, the rest 0."""
    return (torch.arange(rows, device=device) < rows // 3).long()


def itm_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy over the valid rows.

    Args:
        logits: [3B, 2]; first the B true pairs, then the 2B negatives. Class 1 = match.
        valid: [3B] bool; rows without are skipped.
    """
    each = F.cross_entropy(logits.float(), itm_labels(len(logits), logits.device), reduction="none")
    return torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)


def itm_accuracy(logits: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid rows that are classified right; arguments as in `itm_loss`."""
    right = (logits.detach().argmax(1) == itm_labels(len(logits), logits.device)) & valid
    return right.sum() / valid.sum().clamp(min=1)


def pair_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Mean cross-entropy of pairs that come labelled (SOHO, eq. 8); logits [B, 2], matched [B] int64, 1 = match."""
    return F.cross_entropy(logits.float(), matched)


def pair_accuracy(logits: Tensor, matched: Tensor) -> Tensor:
    """Share of the pairs that are classified right; arguments as in `pair_loss`."""
    return (logits.detach().argmax(1) == matched).float().mean()


class HalfNegatives(NamedTuple):
    """n negative pairs for n matched ones (MVPTR, section 3.3.3): half have a wrong image, half a wrong text."""

    order: Tensor
    """[B] int64, a permutation: negative r was made from matched pair order[r]."""
    images: Tensor
    """[B] int64: image of negative r."""
    texts: Tensor
    """[B] int64: text of negative r."""
    valid: Tensor
    """[B] bool: false where the batch holds no other image."""
    with_wrong_image: int
    """The first so many negatives are text order[r] with a wrong image, the rest image order[r] with a wrong text."""


def draw_order(size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A permutation of `size` pairs, [B] int64, drawn on the CPU: its first half gets wrong images."""
    return torch.randperm(size, generator=generator).to(device, non_blocking=True)


def hardest_negatives(sim_t2i: Tensor, sim_i2t: Tensor, image_ids: Tensor) -> Negatives:
    """The most similar wrong image and text, not a draw (MVPTR's release); arguments as in `draw_negatives`."""
    same = image_ids[:, None] == image_ids[None, :]  # [B, B]
    sims = torch.stack([sim_t2i, sim_i2t]).detach().float()
    images, texts = sims.masked_fill(same, -torch.inf).argmax(2)
    valid = ~same.all(1)
    return Negatives(images, texts, valid, valid)


def half_and_half(negatives: Negatives, order: Tensor) -> HalfNegatives:
    """Of every pair one negative: a wrong image for the first ⌊B/2⌋ pairs of `order`, a wrong text for the others.

    WPG's V' of a text that got a wrong image is that image, `negatives.images`, so its pass is ITM's.

    Args:
        negatives: a wrong image and a wrong text for every pair, drawn or hardest.
        order: [B] int64 of `draw_order`.
    """
    half = len(order) // 2
    first, rest = order[:half], order[half:]
    images = torch.cat([negatives.images[first], rest])
    texts = torch.cat([first, negatives.texts[rest]])
    valid = torch.cat([negatives.images_valid[first], negatives.texts_valid[rest]])
    return HalfNegatives(order, images, texts, valid, half)


def half_labels(rows: int, device: torch.device) -> Tensor:
    """[2B] int64: the first half is 1 = match, the rest 0."""
    return (torch.arange(rows, device=device) < rows // 2).long()


def half_valid_rows(negatives: HalfNegatives) -> Tensor:
    """[2B] bool for `half_loss`: a matched pair counts if its negative does, else it would only teach to say yes."""
    matched = torch.empty_like(negatives.valid).scatter(0, negatives.order, negatives.valid)
    return torch.cat([matched, negatives.valid])


def half_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy over the valid rows (MVPTR, eq. 8).

    Args:
        logits: [2B, 2]; first the B true pairs, then the B negatives. Class 1 = match.
        valid: [2B] bool.
    """
    each = F.cross_entropy(logits.float(), half_labels(len(logits), logits.device), reduction="none")
    return torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)


def half_accuracy(logits: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid rows that are classified right; arguments as in `half_loss`."""
    right = (logits.detach().argmax(1) == half_labels(len(logits), logits.device)) & valid
    return right.sum() / valid.sum().clamp(min=1)
