"""Sinkhorn against POT's on torch tensors: 512 × 4000, 50 iterations on both sides."""

from __future__ import annotations

import ot
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks.timing import interleaved, ratio
from vlscale.transport import ipot, sinkhorn, sinkhorn_loss

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")]

ROWS, COLUMNS, ITERATIONS = 512, 4000, 50
A, B = torch.full((ROWS,), 1 / ROWS), torch.full((COLUMNS,), 1 / COLUMNS)


def cosine_cost() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(ROWS, 256, generator=generator), dim=1)
    return 1 - features @ normalize(torch.randn(COLUMNS, 256, generator=generator), dim=1).T


def pot_sinkhorn(cost: Tensor, epsilon: float, method: str) -> Tensor:
    plan: Tensor = ot.sinkhorn(A, B, cost, epsilon, method=method, numItermax=ITERATIONS, stopThr=0, warn=False)
    return plan


@pytest.mark.parametrize(("epsilon", "over_plain"), [(0.01, 1.5), (0.02, 1.1), (0.05, 1.1)])
def test_sinkhorns_forward(epsilon: float, over_plain: float) -> None:
    """At 0.02 the kernel is rebuilt once on the way, which POT does not do; at 0.01 POT computes with denormals.

    The goal is 1.5 times POT's plain form everywhere; 1.2 to 1.6 were measured at 0.02, 1.2 to 1.7 at 0.05.
    """
    cost = cosine_cost()
    work = {
        "sinkhorn": lambda: sinkhorn(cost, epsilon),
        "POT, logarithms": lambda: pot_sinkhorn(cost, epsilon, "sinkhorn_log"),
        "POT, plain": lambda: pot_sinkhorn(cost, epsilon, "sinkhorn"),
        "ipot": lambda: ipot(cost),
    }
    taken = interleaved(work, repeats=11)
    logarithms, plain = (ratio(taken, peer, "sinkhorn") for peer in ("POT, logarithms", "POT, plain"))
    ratio(taken, "ipot", "sinkhorn")
    # The goal is 8; 6.8 to 12 were measured on idle machines. Below 6 something got slower.
    assert logarithms >= 6
    assert plain >= over_plain


def test_sinkhorns_gradient() -> None:
    cost = cosine_cost()

    def ours() -> None:
        sinkhorn_loss(cost.clone().requires_grad_(), 0.05).backward()

    def pots() -> None:
        leaf = cost.clone().requires_grad_()
        ot.solve(leaf, A, B, reg=0.05, reg_type="entropy", max_iter=ITERATIONS, tol=0).value.backward()

    def envelope() -> None:
        leaf = cost.clone().requires_grad_()
        ot.solve(leaf, A, B, reg=0.05, reg_type="entropy", max_iter=ITERATIONS, tol=0, grad="envelope").value.backward()

    taken = interleaved({"sinkhorn_loss": ours, "POT solve": pots, "POT solve, envelope": envelope}, repeats=7)
    unrolled, by_envelope = (ratio(taken, peer, "sinkhorn_loss") for peer in ("POT solve", "POT solve, envelope"))
    assert unrolled >= 6
    assert by_envelope >= 6
