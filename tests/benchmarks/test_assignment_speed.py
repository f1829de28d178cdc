"""Hungarian matching of a step's problems at once against one copy and one call per image."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.benchmarks.timing import interleaved, ratio
from vlscale.transport import assign

pytestmark = pytest.mark.slow

PROBLEMS, SIZE = 256, 8


def test_256_problems_of_8_by_8() -> None:
    """On a CPU a copy costs nothing, so that packing must pay for itself (1.17 was measured); a GPU waits per copy."""
    costs = torch.rand(PROBLEMS * SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(PROBLEMS).repeat_interleave(SIZE)

    def one_by_one() -> torch.Tensor:
        parts = [linear_sum_assignment(part.cpu().numpy())[1] for part in costs.split(SIZE)]
        return torch.cat([torch.from_numpy(part) for part in parts])

    assert torch.equal(assign(costs, numbers), one_by_one())
    taken = interleaved({"at once": lambda: assign(costs, numbers), "one by one": one_by_one}, repeats=11)
    assert ratio(taken, "one by one", "at once") >= 0.8
