"""Sinkhorn's iterations in the exp and in the log domain, and the regularised cost as a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.transport.problem import (
    LOWEST_EXPONENT,
    Problem,
    Slabs,
    Transport,
    close,
    make_problem,
    product,
    reduced,
    scaling,
    slabs_of,
)

EXP_DOMAIN_FROM = 0.01
"""Smallest ε whose kernel is held as exp(−C/ε), for costs in [0, 2] such as 1 − cos; below it, logarithms."""
REBUILD_EVERY = 25
"""Iterations after which the exp domain moves the scalings into the kernel's exponent, below `ROOMY_FROM`."""
ROOMY_FROM = 1 / 30
"""From this ε on four times as many: exp(−2/ε) and the scalings for costs in [0, 2] are within `SCALING_LIMIT`."""


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    epsilon: float,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    iterations: int = 50,
    tolerance: float | None = None,
    warm: Transport | None = None,
) -> Transport:
    """argmin ⟨T, C⟩ − ε H(T) over plans with these marginals (Cuturi 2013, eq. 2 and algorithm 1).

    ε alone decides the form. From `EXP_DOMAIN_FROM` on: matrix-vector products with exp(−C/ε), whose exponent is
    shifted by C's minima at first and by the current potentials later, on a fixed schedule (Schmitzer 2019, section
    3.2). Below: log-sum-exp. The rows come last in an iteration: their marginal is exact, the columns' converges.

    Args:
        cost: [..., G, K], any float dtype. ε is meant relative to costs that span about [0, 2]; offsets don't matter.
        epsilon: regularisation.
        rows, columns: [G] or [..., G] and [K] or [..., K], uniform if None.
        iterations: how many, at most if there is a tolerance.
        tolerance: stop when the columns' L1 error, of the worst problem in the batch, is at most this. It waits for
            the device in every iteration: leave it out in training.
        warm: start from its `column_potential`; the rows may be others, also in number.
    """
    with torch.autocast(cost.device.type, enabled=False):
        problem = make_problem(cost, rows, columns, iterations, tolerance)
        return _sinkhorn(problem, epsilon, None if warm is None else warm.column_potential)


def sinkhorn_loss(
    cost: Tensor,
    epsilon: float,
    *,
    iterations: int = 50,
    through_iterations: bool = False,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """⟨T, C⟩ − ε H(T) with H(T) = −Σ T log T at Sinkhorn's T, with gradient to the cost only; [..., G, K] → [...].

    It is `ot.solve(C, a, b, reg=ε, reg_type="entropy").value`, without the ε that H(T) = −Σ T (log T − 1) would
    subtract. By the envelope theorem the gradient at the optimum is T itself (Feydy et al. 2019, section 2): nothing
    of the iterations is kept, and they should have converged to the accuracy that the gradient needs.

    Args:
        cost: [..., G, K], any float dtype, costs in about [0, 2] (see `sinkhorn`).
        epsilon: regularisation.
        through_iterations: differentiate what the iterations computed, converged or not. The exp domain keeps a few
            kernels for that, the log domain two matrices per iteration.
        rows, columns: [G] or [..., G] and [K] or [..., K], uniform if None; without gradient.
    """
    with torch.autocast(cost.device.type, enabled=False):
        problem = make_problem(cost, rows, columns, iterations)
        if through_iterations:
            return _objective(_sinkhorn(problem, epsilon))
        return _Envelope.apply(problem.cost, problem, epsilon)


class _Envelope(torch.autograd.Function):
    """The regularised cost, whose derivative by the cost is the plan."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: Problem, epsilon: float) -> Tensor:
        result = _sinkhorn(problem, epsilon)
        ctx.save_for_backward(result.plan)
        return _objective(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad[..., None, None], None, None


def _objective(result: Transport) -> Tensor:
    """Σ T C + ε Σ T log T = Σ T (f + g), for any T = exp((f + g − C)/ε), converged or not."""
    plan, f, g, _ = result
    return (f * plan.sum(-1)).sum(-1) + (g * plan.sum(-2)).sum(-1)


def _sinkhorn(problem: Problem, epsilon: float, start: Tensor | None = None) -> Transport:
    """The iterations, differentiable where gradients are on; `start` is g, [..., K]."""
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    run = _sinkhorn_exp if epsilon >= EXP_DOMAIN_FROM else _sinkhorn_log
    return run(problem, epsilon, *reduced(problem.cost, start))


def _sinkhorn_exp(problem: Problem, epsilon: float, f: Tensor, g: Tensor) -> Transport:
    """diag(u) K diag(v), u and v at 1 after every rebuild of K = exp((f + g − C)/ε), whose entries are at most 1."""
    cost, rows, columns, iterations, tolerance = problem
    kernel = None if torch.is_grad_enabled() else torch.empty_like(cost)
    every = 4 * REBUILD_EVERY if epsilon >= ROOMY_FROM else REBUILD_EVERY
    done, stop = 0, False
    while True:
        slabs = _kernel(cost, f, g, epsilon, kernel)
        v = torch.ones_like(g)  # [..., K]
        sweep = _Sweep(slabs, rows)
        u, mass = sweep(v)
        for _ in range(min(every, iterations - done)):
            stop = tolerance is not None and close(v * mass, columns, tolerance)
            if stop:
                break
            v = scaling(columns, mass)
            u, mass = sweep(v)
            done += 1
        f, g = f + epsilon * u.log(), g + epsilon * v.log()
        if stop or done >= iterations:
            return Transport(_scaled(slabs, kernel, u, v), f, g, done)


def _kernel(cost: Tensor, f: Tensor, g: Tensor, epsilon: float, out: Tensor | None) -> Slabs:
    """exp((f + g − C)/ε) in slabs of `out`, or in a new tensor."""
    parts = slabs_of(cost)
    shifts = f.unsqueeze(-1).split(parts[0].shape[-2], -2)
    targets: list[Tensor | None] = [None] if out is None else [*slabs_of(out)]
    slabs = []
    for part, shift, target in zip(parts, shifts, targets, strict=True):
        exponent = torch.sub(part, shift, out=target).sub_(g.unsqueeze(-2)).mul_(-1 / epsilon)
        slabs.append(exponent.clamp_(min=LOWEST_EXPONENT).exp_())
    return tuple(slabs)


class _Sweep:
    """u = rows / (K v) and Kᵀ u for a fixed K, reading every slab of it once; v [..., K] → [..., G], [..., K]."""

    def __init__(self, slabs: Slabs, rows: Tensor) -> None:
        self.slabs, self.rows, self.u = slabs, rows, torch.empty_like(rows)
        if len(slabs) > 1:  # views made once: they cost as much as the products
            height = slabs[0].shape[0]
            transposed = [slab.mT for slab in slabs]
            self.parts = list(zip(slabs, transposed, rows.split(height), self.u.split(height), strict=True))

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The u returned is overwritten by the next call where there are several slabs."""
        if len(self.slabs) == 1:
            u = self.rows / product(self.slabs[0], v)
            return u, product(self.slabs[0].mT, u)
        mass = torch.zeros_like(v)
        for slab, transposed, wanted, u in self.parts:
            torch.div(wanted, torch.mv(slab, v, out=u), out=u)
            mass.addmv_(transposed, u)
        return self.u, mass


def _scaled(slabs: Slabs, kernel: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    """diag(u) K diag(v), [..., G, K], in place of the kernel that the slabs are views of, if there is one."""
    if kernel is None:
        return slabs[0] * u.unsqueeze(-1) * v.unsqueeze(-2)
    for slab, part in zip(slabs, u.unsqueeze(-1).split(slabs[0].shape[-2], -2), strict=True):
        slab.mul_(part).mul_(v.unsqueeze(-2))
    return kernel


def _sinkhorn_log(problem: Problem, epsilon: float, shift: Tensor, start: Tensor) -> Transport:
    cost, rows, columns, iterations, tolerance = problem
    logits = (cost - shift.unsqueeze(-1)).sub_(start.unsqueeze(-2)).mul_(-1 / epsilon)  # [..., G, K]
    rows, columns, g = rows.log(), columns.log(), torch.zeros_like(start)
    f = rows - logits.logsumexp(-1)
    done = 0
    while done < iterations:
        mass = (logits + f.unsqueeze(-1)).logsumexp(-2)
        if tolerance is not None and close((g + mass).exp(), columns.exp(), tolerance):
            break
        g = columns - mass
        f = rows - (logits + g.unsqueeze(-2)).logsumexp(-1)
        done += 1
    plan = (logits + g.unsqueeze(-2)).add_(f.unsqueeze(-1)).exp_()
    return Transport(plan, shift + epsilon * f, start + epsilon * g, done)
