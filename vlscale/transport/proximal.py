"""IPOT: inexact proximal point steps to the unregularised plan."""

from __future__ import annotations

import torch
from torch import Tensor

from vlscale.transport.problem import (
    LOWEST_EXPONENT,
    SCALING_LIMIT,
    Problem,
    Transport,
    close,
    make_problem,
    product,
    reduced,
    scaling,
    slabs_of,
)

IPOT_EXP_DOMAIN_FROM = 0.04
"""The same for IPOT's β: exp(−2/0.04) is far from fp32's smallest number."""
FOLDED_RANGE = 40.0
"""Exponent that IPOT's kernel may reach, at costs in [0, 2], before the scalings are multiplied into the plan."""
SMALLEST_MASS = 1e-20
"""Floor of IPOT's plan between steps: an entry at zero could never come back."""


@torch.no_grad()
def ipot(
    cost: Tensor,
    beta: float = 0.5,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    iterations: int = 50,
    inner: int = 1,
    tolerance: float | None = None,
    warm: Transport | None = None,
) -> Transport:
    """argmin ⟨T, C⟩, unregularised, by inexact proximal point steps (Xie et al. 2020, algorithm 1, IPOT).

    T starts at ones; a step multiplies it by exp(−C/β) and scales its rows (δ), then its columns (σ), `inner` times;
    σ is carried from step to step. The columns' marginal is exact, the rows' converges. Compare its cost with that of
    a linear programme, not its plan with Sinkhorn's. β alone decides between products and logarithms.

    Args:
        cost: [..., G, K], any float dtype. β is meant relative to costs that span about [0, 2].
        beta: proximal weight: the smaller, the farther a step goes; below about 0.1 it needs `inner` > 1.
        rows, columns: [G] or [..., G] and [K] or [..., K], uniform if None.
        iterations: proximal steps, at most if there is a tolerance.
        inner: scalings per step, L in the paper.
        tolerance: stop when the rows' L1 error, of the worst problem in the batch, is at most this: feasible, not
            necessarily optimal. It waits for the device in every step.
        warm: go on from its plan and σ; of the same shape.
    """
    with torch.autocast(cost.device.type, enabled=False):
        problem = make_problem(cost, rows, columns, iterations, tolerance)
        run = _ipot_exp if beta >= IPOT_EXP_DOMAIN_FROM else _ipot_log
        return run(problem, beta, inner, warm)


def _ipot_exp(problem: Problem, beta: float, inner: int, warm: Transport | None) -> Transport:
    """T is held as diag(d) P diag(s): P takes the kernel in every step, d and s are folded in every few."""
    exponent, lowest, below, log_sigma = _ipot_start(problem.cost, beta, warm)
    factor, sigma = exponent.clamp_(min=LOWEST_EXPONENT).exp_(), log_sigma.exp()
    plan = torch.ones_like(factor) if warm is None else warm.plan.clamp(min=SMALLEST_MASS)
    step = _Step(plan, factor, problem.rows)
    fold_every = max(1, int(FOLDED_RANGE * beta / 2))
    delta = d_before = torch.ones_like(lowest)
    s_before = torch.ones_like(sigma)
    done, stop = 0, False
    while done < problem.iterations and not stop:
        if done and done % fold_every == 0:
            mass = step(sigma, folded=s_before)
            d_before, s_before = torch.ones_like(d_before), torch.ones_like(s_before)
        else:
            mass = step(s_before * sigma)
        s = scaling(problem.columns, mass)
        for _ in range(inner - 1):
            s = scaling(problem.columns, step(s, takes_factor=False))
        delta, sigma = step.d / d_before, s / s_before
        d_before, s_before = step.d.clone(), s
        done += 1
        if problem.tolerance is not None:
            stop = close(step.d * product(plan, s), problem.rows, problem.tolerance)
    if done:
        step.fold(s_before)
    return Transport(plan, lowest + beta * delta.log(), below + beta * sigma.log(), done)


class _Step:
    """IPOT's work on P, which it changes in place, slab by slab so that each is read from memory once.

    `d`, [..., G], are the rows' scalings; calls return the columns' mass Pᵀ d, [..., K].
    """

    def __init__(self, plan: Tensor, factor: Tensor, rows: Tensor) -> None:
        self.d = torch.ones_like(plan[..., 0])
        slabs = slabs_of(plan)
        height = slabs[0].shape[-2]
        transposed = [slab.mT for slab in slabs]  # views made once: they cost as much as the products
        wanted, d = rows.split(height, -1), self.d.split(height, -1)
        self.parts = list(zip(slabs, transposed, slabs_of(factor), wanted, d, strict=True))

    def __call__(self, s: Tensor, folded: Tensor | None = None, *, takes_factor: bool = True) -> Tensor:
        """P takes the factor and its rows are scaled against s, [..., K]; d and `folded` are multiplied in before."""
        mass = torch.zeros_like(s)
        for plan, transposed, factor, wanted, d in self.parts:
            if folded is not None:
                _fold(plan, d, folded)
            if takes_factor:
                plan.mul_(factor)
            torch.div(wanted, product(plan, s), out=d).clamp_(1 / SCALING_LIMIT, SCALING_LIMIT)
            mass = mass.addmv_(transposed, d) if mass.dim() == 1 else mass + product(transposed, d)
        return mass

    def fold(self, s: Tensor) -> None:
        """P becomes diag(d) P diag(s)."""
        for plan, _, _, _, d in self.parts:
            _fold(plan, d, s)


def _fold(plan: Tensor, d: Tensor, s: Tensor) -> None:
    plan.mul_(d.unsqueeze(-1)).mul_(s.unsqueeze(-2)).clamp_(min=SMALLEST_MASS)


def _ipot_log(problem: Problem, beta: float, inner: int, warm: Transport | None) -> Transport:
    exponent, lowest, below, sigma = _ipot_start(problem.cost, beta, warm)
    logs = torch.zeros_like(exponent) if warm is None else warm.plan.clamp(min=torch.finfo(torch.float32).tiny).log()
    rows, columns = problem.rows.log(), problem.columns.log()
    delta, done, stop = torch.zeros_like(lowest), 0, False
    while done < problem.iterations and not stop:
        logs.add_(exponent)
        for _ in range(inner):
            delta = rows - (logs + sigma.unsqueeze(-2)).logsumexp(-1)
            sigma = columns - (logs + delta.unsqueeze(-1)).logsumexp(-2)
        logs.add_(delta.unsqueeze(-1)).add_(sigma.unsqueeze(-2))
        done += 1
        stop = problem.tolerance is not None and close(logs.logsumexp(-1).exp(), problem.rows, problem.tolerance)
    return Transport(logs.exp_(), lowest + beta * delta, below + beta * sigma, done)


def _ipot_start(cost: Tensor, beta: float, warm: Transport | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """−(C − f − g)/β, the minima f and g taken out of it, and log σ; [..., G, K], [..., G], [..., K], [..., K]."""
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if warm is not None and warm.plan.shape != cost.shape:
        raise ValueError(f"the warm start's plan is {list(warm.plan.shape)}, the cost {list(cost.shape)}")
    lowest, below = reduced(cost)
    exponent = (cost - lowest.unsqueeze(-1)).sub_(below.unsqueeze(-2)).mul_(-1 / beta)
    flat = torch.full_like(below, 1 / cost.shape[-1]).log()
    return exponent, lowest, below, flat if warm is None else (warm.column_potential - below) / beta
