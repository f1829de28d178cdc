"""Phrases and regions: which region is right, and what a ranking of the regions, or none, reaches.

A region is right for a phrase where its IoU with a true box is 0.5 or more; the pointing game asks whether the centre
of the best region lies in a true box (Zhang et al. 2016). A phrase with several boxes is judged by two protocols:
`any` of them will do, or they are `merged` into the smallest box around all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from vlscale.data.sample import Box
from vlscale.tasks.recall import CUTOFFS, ranks

MIN_IOU = 0.5
PROTOCOLS = ("any", "merged")
MEASURES = {
    f"{protocol}_{name}": (criterion, k)
    for protocol in PROTOCOLS
    for name, criterion, k in (*((f"r{k}", protocol, k) for k in CUTOFFS), ("pointing", f"{protocol}_pointing", 1))
}
"""Metrics, `any_r1` to `merged_pointing`: the criterion by which a region is right, and how many regions may try."""

Right = dict[str, Tensor]
"""[R] bool by criterion: IoU for `any` and `merged`, the centre for `any_pointing` and `merged_pointing`."""
Hits = dict[str, float]
"""Hit or miss, or the chance of a hit, in [0, 1] for each of MEASURES."""


def right_regions(regions: Tensor, boxes: Sequence[Box]) -> Right:
    """Which regions are right.

    Args:
        regions: [R, 4] float32, x1, y1, x2, y2 as shares of the image: quotients of areas are those in pixels.
        boxes: of the phrase, at least one.
    """
    each = torch.tensor(boxes, dtype=torch.float32)  # [T, 4]
    around = torch.cat([each[:, :2].amin(0), each[:, 2:].amax(0)])[None]
    centre = (regions[:, None, :2] + regions[:, None, 2:]) / 2  # [R, 1, 2]
    right: Right = {}
    for protocol, true in zip(PROTOCOLS, (each, around), strict=True):
        right[protocol] = (box_iou(regions, true) >= MIN_IOU).any(1)  # of two boxes without area it is NaN: no hit
        inside = (centre >= true[:, :2]) & (centre <= true[:, 2:])  # [R, T, 2]
        right[f"{protocol}_pointing"] = inside.all(2).any(1)
    return right


def ranked(scores: Tensor, right: Right) -> Hits:
    """Hits of the regions in the order of their scores [R]; of equal scores a wrong region's is the higher one."""
    rank = {name: _rank(scores, of_name) for name, of_name in right.items()}
    return {name: float(rank[criterion] < k) for name, (criterion, k) in MEASURES.items()}


def largest_first(regions: Tensor, right: Right) -> Hits:
    """Hits of the regions [R, 4] in the order of their areas."""
    return ranked(box_area(regions), right)


def at_random(right: Right) -> Hits:
    """Expected hits of the regions in random order, exactly."""
    hits: Hits = {}
    for name, (criterion, k) in MEASURES.items():
        count, wrong = len(right[criterion]), int((~right[criterion]).sum())
        tries = min(k, count)
        hits[name] = 1 - math.comb(wrong, tries) / math.comb(count, tries)
    return hits


def possible(right: Right) -> Hits:
    """Hits of whoever knows the true boxes: whether any region is right."""
    return {name: float(right[criterion].any()) for name, (criterion, _) in MEASURES.items()}


def no_hits() -> Hits:
    """Of a phrase that nothing is left of."""
    return dict.fromkeys(MEASURES, 0.0)


def mean_hits(hits: Sequence[Hits]) -> dict[str, float]:
    """Means in per cent, by name."""
    return {name: 100.0 * sum(one[name] for one in hits) / len(hits) for name in MEASURES}


def _rank(scores: Tensor, right: Tensor) -> float:
    """0: a right region is the best; infinite where no region is right, however few there are."""
    return float(ranks(scores[None], right[None])) if right.any() else math.inf
