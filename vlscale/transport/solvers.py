"""A solver by its name."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlscale.transport.entropic import sinkhorn
from vlscale.transport.proximal import ipot

SOLVERS = ("ipot", "sinkhorn", "pot")
"""What `solve` knows."""


@torch.no_grad()
def solve(cost: Tensor, solver: str, *, epsilon: float = 0.05, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """Plan between uniform marginals, detached; cost [..., G, K] → [..., G, K] float32.

    "ipot" reads `beta`, "sinkhorn" `epsilon`. "pot" is `ot.sinkhorn(method="sinkhorn_log")` at this ε, in double on
    the host, one problem after the other: a slow reference for "sinkhorn", not for training.
    """
    if solver == "ipot":
        return ipot(cost, beta, iterations=iterations).plan
    if solver == "sinkhorn":
        return sinkhorn(cost, epsilon, iterations=iterations).plan
    if solver == "pot":
        return _pot(cost, epsilon, iterations)
    raise ValueError(f"unknown transport solver {solver!r}; known: {', '.join(SOLVERS)}")


def _pot(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    import ot  # slow to import, and only the reference needs it

    options = {"method": "sinkhorn_log", "numItermax": iterations, "warn": False}
    problems = cost.double().cpu().numpy().reshape(-1, *cost.shape[-2:])
    plans = np.stack([ot.sinkhorn([], [], problem, epsilon, **options) for problem in problems])
    return torch.from_numpy(plans).view(cost.shape).to(cost.device, torch.float32)
