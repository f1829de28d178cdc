"""Hits of phrases against a slow loop, both protocols, baselines and their edge cases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from vlscale.tasks.box_recall import (
    MEASURES,
    at_random,
    largest_first,
    mean_hits,
    no_hits,
    possible,
    ranked,
    right_regions,
)

Quad = tuple[float, float, float, float]
NAMES = [f"{p}_{name}" for p in ("any", "merged") for name in ("r1", "r5", "r10", "pointing")]


def iou(a: Quad, b: Quad) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union else 0.0


def slow(order: Sequence[Quad], boxes: Sequence[Quad]) -> dict[str, float]:
    """Hits of regions that stand in an order without ties."""
    around = tuple(f(box[side] for box in boxes) for side, f in enumerate((min, min, max, max)))
    hits: dict[str, float] = {}
    for name, true in (("any", list(boxes)), ("merged", [around])):
        good = [any(iou(region, box) >= 0.5 for box in true) for region in order]
        for k in (1, 5, 10):
            hits[f"{name}_r{k}"] = float(any(good[:k]))
        x, y = (order[0][0] + order[0][2]) / 2, (order[0][1] + order[0][3]) / 2
        hits[f"{name}_pointing"] = float(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in true))
    return hits


def some(rng: random.Random, count: int) -> list[Quad]:
    """Boxes of a coarse grid: some are the same, none has an IoU near 0.5 by rounding."""
    found: list[Quad] = []
    while len(found) < count:
        x, y = (sorted(rng.sample(range(9), 2)) for _ in range(2))
        found.append((x[0] / 8, y[0] / 8, x[1] / 8, y[1] / 8))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_hits_against_a_slow_loop(seed: int) -> None:
    rng = random.Random(seed)
    regions, boxes = some(rng, rng.randint(1, 14)), some(rng, rng.randint(1, 3))
    right = right_regions(torch.tensor(regions), boxes)
    scores = rng.sample(range(100), len(regions))
    order = [region for _, region in sorted(zip(scores, regions, strict=True), reverse=True)]
    assert ranked(torch.tensor(scores).float(), right) == slow(order, boxes)
    best = {name: max(slow([region], boxes)[name.replace("r5", "r1").replace("r10", "r1")] for region in regions)
            for name in NAMES}  # fmt: skip
    assert possible(right) == best


@pytest.mark.parametrize("seed", range(12))
def test_a_random_region_is_the_mean_over_all_orders(seed: int) -> None:
    rng = random.Random(seed)
    regions, boxes = some(rng, rng.randint(1, 6)), some(rng, 2)
    every = [slow(order, boxes) for order in itertools.permutations(regions)]
    expected = {name: sum(one[name] for one in every) / len(every) for name in NAMES}
    assert at_random(right_regions(torch.tensor(regions), boxes)) == pytest.approx(expected)


def test_merged_asks_for_all_boxes_and_any_for_one() -> None:
    left, right_half, whole = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
    boxes = [(0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)]
    of_regions = right_regions(torch.tensor([left, right_half, whole]), boxes)
    assert of_regions["any"].tolist() == [True, True, False]
    assert of_regions["merged"].tolist() == [True, True, True]  # a half has an IoU of exactly 0.5
    assert of_regions["any_pointing"].tolist() == [True, True, False], "between the boxes is in none of them"
    assert of_regions["merged_pointing"].tolist() == [True, True, True]
    narrow = right_regions(torch.tensor([(0.0, 0.0, 0.4, 1.0), whole]), boxes)
    assert (narrow["any"].tolist(), narrow["merged"].tolist()) == ([True, False], [False, True])


def test_ties_count_against_us() -> None:
    regions = torch.tensor([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)])
    right = right_regions(regions, [(0.0, 0.0, 0.5, 1.0)])
    assert ranked(torch.ones(3), right)["any_r1"] == 0
    assert ranked(torch.ones(3), right)["any_pointing"] == 0
    assert ranked(torch.tensor([1.0, 0.0, 1.0]), right)["any_r1"] == 1, "two right ones may tie"


def test_the_largest_region_comes_first() -> None:
    regions = torch.tensor([(0.0, 0.0, 0.2, 0.2), (0.0, 0.0, 1.0, 1.0)])
    assert largest_first(regions, right_regions(regions, [(0.0, 0.0, 1.0, 0.9)]))["any_r1"] == 1
    assert largest_first(regions, right_regions(regions, [(0.0, 0.0, 0.2, 0.2)]))["any_r1"] == 0


def test_few_regions_none_and_boxes_without_area() -> None:
    far = right_regions(torch.tensor([(0.9, 0.9, 1.0, 1.0)]), [(0.0, 0.0, 0.1, 0.1)])
    assert ranked(torch.ones(1), far) == no_hits(), "one wrong region is no hit among ten"
    none = right_regions(torch.empty(0, 4), [(0.0, 0.0, 0.1, 0.1)])
    assert ranked(torch.empty(0), none) == at_random(none) == possible(none) == no_hits()
    point = (0.5, 0.5, 0.5, 0.5)
    same = right_regions(torch.tensor([point]), [point])
    assert not same["any"].any(), "a box without area overlaps nothing"
    assert same["any_pointing"].all()


def test_means_are_per_cent() -> None:
    assert list(MEASURES) == NAMES
    hits = [no_hits(), no_hits() | {"any_r5": 1.0}, no_hits(), no_hits() | {"any_r5": 1.0, "any_r10": 0.5}]
    assert mean_hits(hits)["any_r5"] == 50
    assert mean_hits(hits)["any_r10"] == 12.5
