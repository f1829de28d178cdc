"""What the solvers share: the problem, its slabs and potentials, and bounded scalings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALING_LIMIT = 1e26
"""Scalings stay within this factor of 1, so that no product of two of them and a kernel entry overflows."""
LOWEST_EXPONENT = -80.0
"""Floor of the kernel's exponent: zero columns would divide by zero, denormal entries are slow on a CPU."""
SLAB = 1 << 17
"""Entries of a slab of the kernel, half a MiB."""


class Transport(NamedTuple):
    """A plan and where its solver stood."""

    plan: Tensor
    """[..., G, K] float32, sums to 1."""
    row_potential: Tensor
    """f, [..., G] float32. Sinkhorn: plan = exp((f + g − C)/ε). IPOT: plan = plan before ∘ exp((f + g − C)/β)."""
    column_potential: Tensor
    """g, [..., K] float32."""
    iterations: int
    """How many ran, of any problem in the batch."""


Slabs = tuple[Tensor, ...]
"""A matrix in consecutive rows, views of one tensor: [h, K] each, or all of [..., G, K]."""


class Problem(NamedTuple):
    """What every solver is given."""

    cost: Tensor  # [..., G, K] float32
    rows: Tensor  # [..., G] or [G] float32
    columns: Tensor  # [..., K] or [K] float32
    iterations: int
    tolerance: float | None


def make_problem(
    cost: Tensor, rows: Tensor | None, columns: Tensor | None, iterations: int, tolerance: float | None = None
) -> Problem:
    """What was given, checked by shape, in fp32."""
    if cost.dim() < 2 or 0 in cost.shape or not cost.is_floating_point():
        raise ValueError(f"cost must be a float tensor [..., G, K] without empty sides, not {list(cost.shape)}")
    *leading, height, width = cost.shape
    marginals = []
    for name, given, size in (("rows", rows, height), ("columns", columns, width)):
        if given is None:
            given = torch.full((size,), 1 / size, device=cost.device)
        elif list(given.shape) not in ([size], [*leading, size]):
            raise ValueError(f"{name} must be [{size}] or {[*leading, size]}, not {list(given.shape)}")
        marginals.append(given.detach().float())
    return Problem(cost.float(), marginals[0], marginals[1], iterations, tolerance)


def reduced(cost: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f and g such that C − f − g is at least 0 and has a zero in every row; [..., G], [..., K].

    g is `start`, or else the column minima left by the row minima: then every column has a zero too.
    """
    lowest, left = [], []
    for part in slabs_of(cost):
        lowest.append(part.amin(-1, keepdim=True))
        shifted = part - lowest[-1]  # before anything else, so that offsets of the costs take no digits
        if start is None:
            left.append(shifted.amin(-2))
        else:
            lowest[-1] = lowest[-1] + shifted.sub_(start.unsqueeze(-2)).amin(-1, keepdim=True)
    g = torch.stack(left).amin(0) if start is None else start
    return torch.cat(lowest, -2).squeeze(-1), g


def slabs_of(matrix: Tensor) -> Slabs:
    """Rows in slabs that fit a CPU core's cache, so that what is done twice to a slab reads it once from memory."""
    if matrix.dim() > 2 or matrix.device.type != "cpu" or torch.is_grad_enabled():
        return (matrix,)
    return matrix.split(max(1, SLAB // matrix.shape[-1]))


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """[..., m, n] times [..., n] or [n] → [..., m]."""
    return matrix.mv(vector) if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def scaling(wanted: Tensor, mass: Tensor) -> Tensor:
    """What brings the mass to the wanted marginal, within bounds; also where the mass is zero."""
    return (wanted / mass).clamp(1 / SCALING_LIMIT, SCALING_LIMIT)


def close(mass: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether the L1 error of the worst problem is within the tolerance: waits for the device."""
    return bool((mass - wanted).abs().sum(-1).max() <= tolerance)
