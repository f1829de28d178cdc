"""Hungarian matching of many problems against trying every order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from vlscale.transport import assign


def ragged(sizes: list[int], columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Problems behind one another, with rows that belong to none in between."""
    numbers = [number for number, size in enumerate(sizes) for number in [*[number] * size, -1]]
    costs = torch.rand(len(numbers), columns, generator=torch.Generator().manual_seed(seed))
    return costs, torch.tensor(numbers)


@pytest.mark.parametrize("seed", range(3))
def test_against_every_order(seed: int) -> None:
    sizes = [3, 1, 0, 7, 2, 5]
    costs, numbers = ragged(sizes, columns=7, seed=seed)
    chosen = assign(costs, numbers)
    for number, size in enumerate(sizes):
        rows = numbers == number
        cost, columns = costs[rows], chosen[rows].tolist()
        assert sorted(columns) == list(range(size))
        best = min(sum(float(cost[r, c]) for r, c in enumerate(order)) for order in permutations(range(size)))
        assert sum(float(cost[r, c]) for r, c in enumerate(columns)) == pytest.approx(best, abs=1e-6)
    assert not chosen[numbers < 0].any()


def test_one_copy_whatever_the_number_of_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, cpu = [], Tensor.cpu

    def counting(tensor: Tensor) -> Tensor:
        copies.append(tensor.shape)
        return cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", counting)
    assign(*ragged([4] * 50, columns=4))
    assert copies == [(250, 5)]


def test_overflow_is_left_to_the_finite_check() -> None:
    bad = torch.tensor([[torch.nan, torch.inf], [torch.inf, torch.nan], [-torch.inf, torch.inf], [torch.inf, 0.0]])
    assert assign(bad, torch.tensor([0, 0, 1, 1])).tolist() == [0, 1, 0, 1]
    assert assign(torch.full((2, 2), torch.inf), torch.zeros(2).long()).sort().values.tolist() == [0, 1]


def test_half_precision_and_nothing_at_all() -> None:
    cost = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.bfloat16)
    assert assign(cost, torch.tensor([7, 7])).tolist() == [1, 0]
    assert assign(torch.zeros(0, 3), torch.zeros(0).long()).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a problem has 3 rows, but costs have 2 columns"):
        assign(torch.zeros(3, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match="must follow one another"):
        assign(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
