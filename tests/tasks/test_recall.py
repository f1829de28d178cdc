"""Recalls against slow obvious re-computations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vlscale.tasks.recall import both_ways, chance, ranks, recalls


def slow_rank(scores: list[float], relevant: list[bool]) -> int:
    """The place of the first right candidate when equal scores are sorted against us."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    hits = [place for place, index in enumerate(order) if relevant[index]]
    return hits[0] if hits else len(scores)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ranks_with_ties_and_several_right_answers(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (200, 17), generator=generator).float()
    scores[3] = -math.inf
    relevant = torch.rand(200, 17, generator=generator) < 0.15
    assert not relevant.any(dim=1).all()
    expected = [slow_rank(s, r) for s, r in zip(scores.tolist(), relevant.tolist(), strict=True)]
    assert ranks(scores, relevant).tolist() == expected
    found = recalls(scores, relevant)
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(100 * sum(rank < k for rank in expected) / 200)


def test_a_constant_score_finds_nothing() -> None:
    relevant = torch.eye(20, dtype=torch.bool)
    assert recalls(torch.zeros(20, 20), relevant) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_nan_is_refused() -> None:
    scores = torch.zeros(2, 3)
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ranks(scores, torch.ones(2, 3, dtype=torch.bool))


def test_rsum_is_the_sum_of_both_ways() -> None:
    metrics = both_ways(torch.tensor([0, 4, 9]), torch.tensor([0, 20]), "itc_")
    assert metrics["itc_t2i_r1"] == pytest.approx(100 / 3)
    assert metrics["itc_i2t_r10"] == 50
    assert metrics["itc_rsum"] == pytest.approx(100 / 3 + 200 / 3 + 100 + 150)


def test_chance_is_the_mean_over_all_orders() -> None:
    """Three images with 2, 1 and no captions: every order of the candidates, counted."""
    level = chance(torch.tensor([2, 1, 0]))
    assert level["t2i_r1"] == pytest.approx(100 / 3)
    assert level["t2i_r5"] == 100
    orders = list(itertools.permutations(range(3)))  # captions 0 and 1 are of image 0, caption 2 of image 1
    first = sum(order[0] in {0, 1} for order in orders) / len(orders)
    second = sum(order[0] == 2 for order in orders) / len(orders)
    assert level["i2t_r1"] == pytest.approx(100 * (first + second) / 2)
    assert level["rsum"] == pytest.approx(sum(value for name, value in level.items() if name != "rsum"))
