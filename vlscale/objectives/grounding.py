"""Phrase grounding of MVPTR: weakly supervised (WPG, section 3.3.2) and by boxes (section 4.2.3), and the cosines that
both learn and evaluation reads."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.precision import full_precision

NEAREST = 3
"""Regions that the release picks from."""

Pool = Literal["max", "top3"]

SHARPNESS = 10.0
"""Of the map from cosines to probabilities with `bce`: σ(10 · (cos − ½)) makes 0.007, ½ and 0.993 of 0, ½ and 1."""
FOUND = 0.5
"""IoU from which a region counts as the phrase's."""


class Grounded(NamedTuple):
    """How well the phrases of each text are found in an image."""

    similarity: Tensor
    """[B] fp32, S^wpg of eq. 6; 0 where there is nothing to ground."""
    valid: Tensor
    """[B] bool: the text has a phrase, and the image has regions enough."""


def phrase_masks(phrases: Tensor, most: int) -> Tensor:
    """Phrases of one position each as the masks that `phrase_region_similarity` takes.

    Args:
        phrases: [B, L] bool, true at the position of a phrase.
        most: P, phrases of a text at most; what is beyond is left out.

    Returns:
        [B, P, L] bool: row p is true at the p-th phrase, or nowhere.
    """
    number = phrases.cumsum(1) - 1  # [B, L]
    wanted = torch.arange(most, device=phrases.device)[:, None]
    return phrases[:, None] & (number[:, None] == wanted)


def phrase_region_similarity(states: Tensor, phrases: Tensor, regions: Tensor) -> Tensor:
    """Cosine of every phrase, the mean of its tokens, with every region. fp32, under autocast too.

    Args:
        states: [B, T, D] of the multimodal encoder: the text's L first, the R regions last.
        phrases: [B, P, L] bool or 0/1, the tokens of each phrase; none: no phrase, all its cosines are 0.
        regions: [B, R] bool or 0/1, 0 where a region is padding.

    Returns:
        [B, P, R], −inf at regions that are padding.
    """
    with full_precision(states):
        states = states.float()
        text, seen = states[:, : phrases.shape[2]], states[:, states.shape[1] - regions.shape[1] :]
        tokens = phrases.float()
        # The mean, not the sum, so that the length of a phrase does not decide whether `normalize` divides.
        mean = tokens @ text / tokens.sum(2, keepdim=True).clamp(min=1)  # [B, P, D]
        cosine = F.normalize(mean, dim=2) @ F.normalize(seen, dim=2).mT
        return cosine.masked_fill(~regions.bool()[:, None], -torch.inf)


def draw_picks(similarity: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which of its nearest three regions each phrase takes, 0 the nearest; similarity [B, P, R] → [B, P] int64.

    Drawn on the CPU, so that it does not depend on the device.
    """
    picks = torch.randint(NEAREST, tuple(similarity.shape[:2]), generator=generator)
    return picks.to(similarity.device, non_blocking=True)


def ground(similarity: Tensor, phrases: Tensor, picks: Tensor | None = None) -> Grounded:
    """S^wpg: mean over the phrases of their region's cosine (eq. 6).

    Args:
        similarity: [B, P, R] of `phrase_region_similarity`.
        phrases: [B, P] bool, false where there is none, or where a masked one is left out.
        picks: [B, P] of `draw_picks`, for the release's form (`pool: top3`), read where there is a phrase; an image
            with fewer than three regions then grounds nothing. None: the nearest region, of one at least.
    """
    needed = 1 if picks is None else NEAREST
    # Not `> −inf`: what overflowed must reach the loss, where the finite check sees it.
    counted = phrases & ((similarity != -torch.inf).sum(2) >= needed)  # [B, P]
    if similarity.shape[2] < needed:
        best = similarity.new_zeros(phrases.shape)
    elif picks is None:
        best = similarity.amax(2)
    else:
        best = similarity.topk(NEAREST, dim=2).values.gather(2, picks.clamp(min=0)[:, :, None])[:, :, 0]
    total = torch.where(counted, best, 0.0).sum(1)
    return Grounded(total / counted.sum(1).clamp(min=1), counted.any(1))


def wpg_loss(positive: Grounded, negative: Grounded, margin: float = 0.2, valid: Tensor | None = None) -> Tensor:
    """Mean of max(0, margin + s(V', S) − s(V, S)) over the texts that count (eq. 7, which prints min); 0 if none does.

    Args:
        positive: each text in its own image.
        negative: each text in another image, row by row.
        margin: of the hinge.
        valid: [B] bool, false where the batch has no other image.
    """
    counted = positive.valid & negative.valid
    if valid is not None:
        counted = counted & valid
    hinge = (margin + negative.similarity - positive.similarity).clamp(min=0)
    return torch.where(counted, hinge, 0.0).sum() / counted.sum().clamp(min=1)


def overlap_loss(scores: Tensor, overlaps: Tensor, grounded: Tensor, kind: Literal["mse", "bce"] = "mse") -> Tensor:
    """Cosines of phrases and regions against their IoU as soft labels; mean over the pairs that count, 0 if none does.

    `mse` is the mean of (cos − IoU)², the release's first form and the paper's better one (appendix A.3.4). `bce` reads
    the IoU as a probability; a cosine, which may be negative, becomes one by a fixed map that keeps the order, so that
    what is learned is still ranked by cosines: see `SHARPNESS`.

    Args:
        scores: [B, S, R] of `phrase_region_similarity`, −inf where a region is padding.
        overlaps: [B, S, R] in [0, 1].
        grounded: [B, S] bool, false where there is no phrase, or it has no box.
    """
    counted = grounded[:, :, None] & (scores != -torch.inf)  # what is not finite otherwise must reach the loss
    cosines = torch.where(counted, scores.float(), 0.0)
    if kind == "mse":
        each = (cosines - overlaps).square()
    else:
        each = F.binary_cross_entropy_with_logits(SHARPNESS * (cosines - 0.5), overlaps, reduction="none")
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1)


def overlap_recall(scores: Tensor, overlaps: Tensor, grounded: Tensor) -> Tensor:
    """Share of the phrases with a box whose best region overlaps it by half; arguments as in `overlap_loss`."""
    best = scores.detach().argmax(2, keepdim=True)
    found = (overlaps.gather(2, best)[:, :, 0] >= FOUND) & grounded
    return found.sum() / grounded.sum().clamp(min=1)
