"""Optimal transport between G rows and K columns: Sinkhorn, IPOT, and the regularised cost as a loss.

Everything runs in fp32 on the cost's device, under autocast too, over any leading dimensions, and without a host sync
unless a `tolerance` asks for one. Marginals are uniform by default; given ones must be positive and sum to 1, which is
not looked at: only their shapes are. Plans carry no gradient; `sinkhorn_loss` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SOLVERS = ("ipot", "sinkhorn", "pot")
"""What `solve` knows."""
EXP_DOMAIN_FROM = 0.01
"""Smallest ε whose kernel is held as exp(−C/ε), for costs in [0, 2] such as 1 − cos; below it, logarithms."""
IPOT_EXP_DOMAIN_FROM = 0.04
"""The same for IPOT's β: exp(−2/0.04) is far from fp32's smallest number."""
REBUILD_EVERY = 25
"""Iterations after which the exp domain moves the scalings into the kernel's exponent, below `ROOMY_FROM`."""
ROOMY_FROM = 1 / 30
"""From this ε on four times as many: exp(−2/ε) and the scalings for costs in [0, 2] are within `SCALING_LIMIT`."""
FOLDED_RANGE = 40.0
"""Exponent that IPOT's kernel may reach, at costs in [0, 2], before the scalings are multiplied into the plan."""
LOWEST_EXPONENT = -80.0
"""Floor of the kernel's exponent: zero columns would divide by zero, denormal entries are slow on a CPU."""
SCALING_LIMIT = 1e26
"""Scalings stay within this factor of 1, so that no product of two of them and a kernel entry overflows."""
SLAB = 1 << 17
"""Entries of a slab of the kernel, half a MiB."""
SMALLEST_MASS = 1e-20
"""Floor of IPOT's plan between steps: an entry at zero could never come back."""


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


class _Problem(NamedTuple):
    """What every solver is given."""

    cost: Tensor  # [..., G, K] float32
    rows: Tensor  # [..., G] or [G] float32
    columns: Tensor  # [..., K] or [K] float32
    iterations: int
    tolerance: float | None


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
        problem = _problem(cost, rows, columns, iterations, tolerance)
        return _sinkhorn(problem, epsilon, None if warm is None else warm.column_potential)


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
        problem = _problem(cost, rows, columns, iterations, tolerance)
        run = _ipot_exp if beta >= IPOT_EXP_DOMAIN_FROM else _ipot_log
        return run(problem, beta, inner, warm)


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
        problem = _problem(cost, rows, columns, iterations)
        if through_iterations:
            return _objective(_sinkhorn(problem, epsilon))
        return _Envelope.apply(problem.cost, problem, epsilon)


class _Envelope(torch.autograd.Function):
    """The regularised cost, whose derivative by the cost is the plan."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: _Problem, epsilon: float) -> Tensor:
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


def _problem(
    cost: Tensor, rows: Tensor | None, columns: Tensor | None, iterations: int, tolerance: float | None = None
) -> _Problem:
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
    return _Problem(cost.float(), marginals[0], marginals[1], iterations, tolerance)


def _sinkhorn(problem: _Problem, epsilon: float, start: Tensor | None = None) -> Transport:
    """The iterations, differentiable where gradients are on; `start` is g, [..., K]."""
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    run = _sinkhorn_exp if epsilon >= EXP_DOMAIN_FROM else _sinkhorn_log
    return run(problem, epsilon, *_reduced(problem.cost, start))


def _reduced(cost: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f and g such that C − f − g is at least 0 and has a zero in every row; [..., G], [..., K].

    g is `start`, or else the column minima left by the row minima: then every column has a zero too.
    """
    lowest, left = [], []
    for part in _slabs(cost):
        lowest.append(part.amin(-1, keepdim=True))
        shifted = part - lowest[-1]  # before anything else, so that offsets of the costs take no digits
        if start is None:
            left.append(shifted.amin(-2))
        else:
            lowest[-1] = lowest[-1] + shifted.sub_(start.unsqueeze(-2)).amin(-1, keepdim=True)
    g = torch.stack(left).amin(0) if start is None else start
    return torch.cat(lowest, -2).squeeze(-1), g


def _slabs(matrix: Tensor) -> Slabs:
    """Rows in slabs that fit a CPU core's cache, so that what is done twice to a slab reads it once from memory."""
    if matrix.dim() > 2 or matrix.device.type != "cpu" or torch.is_grad_enabled():
        return (matrix,)
    return matrix.split(max(1, SLAB // matrix.shape[-1]))


def _sinkhorn_exp(problem: _Problem, epsilon: float, f: Tensor, g: Tensor) -> Transport:
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
            stop = tolerance is not None and _close(v * mass, columns, tolerance)
            if stop:
                break
            v = _scaling(columns, mass)
            u, mass = sweep(v)
            done += 1
        f, g = f + epsilon * u.log(), g + epsilon * v.log()
        if stop or done >= iterations:
            return Transport(_scaled(slabs, kernel, u, v), f, g, done)


def _kernel(cost: Tensor, f: Tensor, g: Tensor, epsilon: float, out: Tensor | None) -> Slabs:
    """exp((f + g − C)/ε) in slabs of `out`, or in a new tensor."""
    parts = _slabs(cost)
    shifts = f.unsqueeze(-1).split(parts[0].shape[-2], -2)
    targets: list[Tensor | None] = [None] if out is None else [*_slabs(out)]
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
            u = self.rows / _product(self.slabs[0], v)
            return u, _product(self.slabs[0].mT, u)
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


def _sinkhorn_log(problem: _Problem, epsilon: float, shift: Tensor, start: Tensor) -> Transport:
    cost, rows, columns, iterations, tolerance = problem
    logits = (cost - shift.unsqueeze(-1)).sub_(start.unsqueeze(-2)).mul_(-1 / epsilon)  # [..., G, K]
    rows, columns, g = rows.log(), columns.log(), torch.zeros_like(start)
    f = rows - logits.logsumexp(-1)
    done = 0
    while done < iterations:
        mass = (logits + f.unsqueeze(-1)).logsumexp(-2)
        if tolerance is not None and _close((g + mass).exp(), columns.exp(), tolerance):
            break
        g = columns - mass
        f = rows - (logits + g.unsqueeze(-2)).logsumexp(-1)
        done += 1
    plan = (logits + g.unsqueeze(-2)).add_(f.unsqueeze(-1)).exp_()
    return Transport(plan, shift + epsilon * f, start + epsilon * g, done)


def _ipot_exp(problem: _Problem, beta: float, inner: int, warm: Transport | None) -> Transport:
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
        s = _scaling(problem.columns, mass)
        for _ in range(inner - 1):
            s = _scaling(problem.columns, step(s, takes_factor=False))
        delta, sigma = step.d / d_before, s / s_before
        d_before, s_before = step.d.clone(), s
        done += 1
        if problem.tolerance is not None:
            stop = _close(step.d * _product(plan, s), problem.rows, problem.tolerance)
    if done:
        step.fold(s_before)
    return Transport(plan, lowest + beta * delta.log(), below + beta * sigma.log(), done)


class _Step:
    """IPOT's work on P, which it changes in place, slab by slab so that each is read from memory once.

    `d`, [..., G], are the rows' scalings; calls return the columns' mass Pᵀ d, [..., K].
    """

    def __init__(self, plan: Tensor, factor: Tensor, rows: Tensor) -> None:
        self.d = torch.ones_like(plan[..., 0])
        slabs = _slabs(plan)
        height = slabs[0].shape[-2]
        transposed = [slab.mT for slab in slabs]  # views made once: they cost as much as the products
        wanted, d = rows.split(height, -1), self.d.split(height, -1)
        self.parts = list(zip(slabs, transposed, _slabs(factor), wanted, d, strict=True))

    def __call__(self, s: Tensor, folded: Tensor | None = None, *, takes_factor: bool = True) -> Tensor:
        """P takes the factor and its rows are scaled against s, [..., K]; d and `folded` are multiplied in before."""
        mass = torch.zeros_like(s)
        for plan, transposed, factor, wanted, d in self.parts:
            if folded is not None:
                _fold(plan, d, folded)
            if takes_factor:
                plan.mul_(factor)
            torch.div(wanted, _product(plan, s), out=d).clamp_(1 / SCALING_LIMIT, SCALING_LIMIT)
            mass = mass.addmv_(transposed, d) if mass.dim() == 1 else mass + _product(transposed, d)
        return mass

    def fold(self, s: Tensor) -> None:
        """P becomes diag(d) P diag(s)."""
        for plan, _, _, _, d in self.parts:
            _fold(plan, d, s)


def _fold(plan: Tensor, d: Tensor, s: Tensor) -> None:
    plan.mul_(d.unsqueeze(-1)).mul_(s.unsqueeze(-2)).clamp_(min=SMALLEST_MASS)


def _ipot_log(problem: _Problem, beta: float, inner: int, warm: Transport | None) -> Transport:
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
        stop = problem.tolerance is not None and _close(logs.logsumexp(-1).exp(), problem.rows, problem.tolerance)
    return Transport(logs.exp_(), lowest + beta * delta, below + beta * sigma, done)


def _ipot_start(cost: Tensor, beta: float, warm: Transport | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """−(C − f − g)/β, the minima f and g taken out of it, and log σ; [..., G, K], [..., G], [..., K], [..., K]."""
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if warm is not None and warm.plan.shape != cost.shape:
        raise ValueError(f"the warm start's plan is {list(warm.plan.shape)}, the cost {list(cost.shape)}")
    lowest, below = _reduced(cost)
    exponent = (cost - lowest.unsqueeze(-1)).sub_(below.unsqueeze(-2)).mul_(-1 / beta)
    flat = torch.full_like(below, 1 / cost.shape[-1]).log()
    return exponent, lowest, below, flat if warm is None else (warm.column_potential - below) / beta


def _pot(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    import ot  # slow to import, and only the reference needs it

    options = {"method": "sinkhorn_log", "numItermax": iterations, "warn": False}
    problems = cost.double().cpu().numpy().reshape(-1, *cost.shape[-2:])
    plans = np.stack([ot.sinkhorn([], [], problem, epsilon, **options) for problem in problems])
    return torch.from_numpy(plans).view(cost.shape).to(cost.device, torch.float32)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """[..., m, n] times [..., n] or [n] → [..., m]."""
    return matrix.mv(vector) if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _scaling(wanted: Tensor, mass: Tensor) -> Tensor:
    """What brings the mass to the wanted marginal, within bounds; also where the mass is zero."""
    return (wanted / mass).clamp(1 / SCALING_LIMIT, SCALING_LIMIT)


def _close(mass: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether the L1 error of the worst problem is within the tolerance: waits for the device."""
    return bool((mass - wanted).abs().sum(-1).max() <= tolerance)
