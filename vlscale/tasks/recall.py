"""Recall at K by counting, in bounded memory.

The rank of a query is the number of wrong candidates that score at least as high as its best right one: ties count
against us, several right candidates count as one hit (Karpathy's protocol, as in ALBEF's release).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Rank of the best right candidate of every query, 0 = first.

    Args:
        scores: [Q, C] float, higher is better; -inf marks candidates that were never scored.
        relevant: [Q, C] bool, true where the candidate is right.

    Returns:
        [Q] int64; a query without a right candidate gets C, a miss at any cutoff.

    Raises:
        ValueError: a score is NaN; every comparison with it would be false and look like a perfect rank.
    """
    if scores.amax(dim=1).isnan().any():
        raise ValueError("scores hold NaN")
    best = torch.where(relevant, scores, -math.inf).amax(dim=1)  # [Q]
    count = ((scores >= best[:, None]) > relevant).sum(dim=1)  # above or equal, and not right
    return torch.where(relevant.any(dim=1), count, scores.shape[1])


def recall_at(rank: Tensor) -> dict[str, float]:
    """`r1`, `r5`, `r10` in per cent from ranks [Q] (0 = first)."""
    return {f"r{k}": 100.0 * float((rank < k).double().mean()) for k in CUTOFFS}


def recalls(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    """Recalls of a whole score matrix: [Q, C] and [Q, C] bool → `r1`, `r5`, `r10` in per cent."""
    return recall_at(ranks(scores, relevant))


def both_ways(text_to_image: Tensor, image_to_text: Tensor, prefix: str = "") -> dict[str, float]:
    """Metrics of both directions from their ranks: `t2i_r1` … `i2t_r10` and `rsum`, the sum of all six."""
    metrics = {f"{prefix}t2i_{name}": value for name, value in recall_at(text_to_image).items()}
    metrics |= {f"{prefix}i2t_{name}": value for name, value in recall_at(image_to_text).items()}
    return metrics | {f"{prefix}rsum": sum(metrics.values())}


def chance(captions_per_image: Tensor) -> dict[str, float]:
    """What a random order reaches, in per cent.

    Args:
        captions_per_image: [I] int64; images without captions ask no question but stand among the candidates.
    """
    images, captions = len(captions_per_image), int(captions_per_image.sum())
    level = {f"t2i_r{k}": 100.0 * min(1.0, k / images) for k in CUTOFFS}
    asking = captions_per_image[captions_per_image > 0].tolist()
    for k in CUTOFFS:
        draws = math.comb(captions, min(k, captions))  # exact integers up to the division
        hits = [(draws - math.comb(captions - right, min(k, captions))) / draws for right in asking]
        level[f"i2t_r{k}"] = 100.0 * sum(hits) / len(hits)
    return level | {"rsum": sum(level.values())}
