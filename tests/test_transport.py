"""Transport against POT, which is the judge of plans, costs and marginals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vlscale.transport import SOLVERS, ipot, proximal, sinkhorn, sinkhorn_loss, solve
from vlscale.transport import problem as problem_module

SIZES = [(1, 1), (1, 7), (7, 1), (16, 16), (8, 60), (60, 8), (64, 200)]
EPSILONS = [0.003, 0.01, 0.05, 0.5]


def cosine_cost(height: int, columns: int, *, seed: int = 0, leading: tuple[int, ...] = (), width: int = 6) -> Tensor:
    """1 − cos between random directions, which spread over [0, 2] if of few dimensions; [..., G, K]."""
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(*leading, height, width, generator=generator), dim=-1)
    codes = normalize(torch.randn(*leading, columns, width, generator=generator), dim=-1)
    return 1 - features @ codes.mT


def uneven(size: int, *, seed: int = 0, leading: tuple[int, ...] = ()) -> Tensor:
    """A marginal whose shares differ tenfold; [..., size]."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(*leading, size, generator=generator) + 0.1
    return shares / shares.sum(-1, keepdim=True)


def as_marginal(given: Tensor | None, size: int) -> np.ndarray:
    shares = np.full(size, 1 / size) if given is None else given.double().numpy()
    return shares / shares.sum()


def pot_plan(cost: Tensor, epsilon: float, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """The converged plan in double; [G, K]."""
    a, b = as_marginal(rows, cost.shape[0]), as_marginal(columns, cost.shape[1])
    problem = cost.double().numpy()
    plan = ot.sinkhorn(a, b, problem, epsilon, method="sinkhorn_log", numItermax=6000, stopThr=1e-9, warn=False)
    return torch.from_numpy(plan)


def check_plan(cost: Tensor, epsilon: float, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    ours = sinkhorn(cost, epsilon, rows=rows, columns=columns, iterations=6000, tolerance=2e-6).plan.double()
    theirs = pot_plan(cost, epsilon, rows, columns)
    a, b = as_marginal(rows, cost.shape[0]), as_marginal(columns, cost.shape[1])
    assert (ours - theirs).abs().sum() < 2e-3
    spread = float(cost.max() - cost.min())
    centred = cost.double() - cost.double().min()
    assert abs((ours * centred).sum() - (theirs * centred).sum()) < 2e-4 * max(spread, 1e-6)
    assert np.abs(ours.sum(1).numpy() - a).sum() < 1e-4
    assert np.abs(ours.sum(0).numpy() - b).sum() < (1e-4 if epsilon >= 0.01 else 5e-4)  # it converges slowly there


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sinkhorn_is_pots(size: tuple[int, int], epsilon: float) -> None:
    check_plan(cosine_cost(*size), epsilon)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_sinkhorn_with_given_marginals(epsilon: float) -> None:
    check_plan(cosine_cost(12, 30), epsilon, uneven(12), uneven(30, seed=1))
    check_plan(cosine_cost(12, 30), epsilon, columns=uneven(30, seed=1))


def one_hot_cost(height: int, width: int) -> Tensor:
    """Every row likes one column and no other, several the same, so that mass has to go where it costs 2."""
    cost = torch.full((height, width), 2.0)
    cost[torch.arange(height), torch.arange(height) % (width // 3)] = 0
    return cost


HARD = {
    "offset": cosine_cost(12, 30) + 1e4,
    "row offsets": cosine_cost(12, 30) + torch.arange(12)[:, None] * 100.0,
    "column offsets": cosine_cost(12, 30) + torch.arange(30) * 1.0,
    "near-identical rows": cosine_cost(1, 30).repeat(12, 1) + 1e-5 * cosine_cost(12, 30),
    "one-hot": one_hot_cost(12, 30),
    "constant": torch.full((12, 30), 1.0),
}


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("name", HARD)
def test_sinkhorn_on_hard_costs(name: str, epsilon: float) -> None:
    check_plan(HARD[name], epsilon)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_scaled_costs_with_a_scaled_epsilon(epsilon: float) -> None:
    check_plan(cosine_cost(12, 30) * 1e3, epsilon * 1e3)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("size", [(16, 16), (8, 60), (60, 8)], ids=str)
@pytest.mark.parametrize("kind", ["cosine", "one-hot", "random"])
def test_costs_far_beyond_the_range_stay_finite(size: tuple[int, int], epsilon: float, kind: str) -> None:
    """ε is then so small beside the cost that no number of iterations would converge."""
    cost = {"cosine": cosine_cost(*size), "one-hot": one_hot_cost(*size), "random": torch.rand(size)}[kind] * 1e3
    result = sinkhorn(cost, epsilon)
    for value in result[:3]:
        assert value.isfinite().all()
    assert torch.allclose(result.plan.sum(-1), torch.full(size[:1], 1 / size[0]), rtol=1e-3)
    assert sinkhorn_loss(cost, epsilon).isfinite()
    assert all(value.isfinite().all() for value in ipot(cost, epsilon * 10)[:3])


def test_a_batch_is_its_problems() -> None:
    cost = cosine_cost(9, 20, leading=(2, 3))
    rows, columns = uneven(9, leading=(2, 3)), uneven(20, seed=1)
    for epsilon in (0.005, 0.05):
        batch = sinkhorn(cost, epsilon, rows=rows, columns=columns)
        assert batch.plan.shape == (2, 3, 9, 20)
        assert batch.row_potential.shape == (2, 3, 9)
        assert batch.column_potential.shape == (2, 3, 20)
        single = sinkhorn(cost[1, 2], epsilon, rows=rows[1, 2], columns=columns)
        torch.testing.assert_close(batch.plan[1, 2], single.plan, rtol=1e-4, atol=1e-8)
    for beta in (0.02, 0.5):
        batch, single = ipot(cost, beta, rows=rows), ipot(cost[1, 2], beta, rows=rows[1, 2])
        torch.testing.assert_close(batch.plan[1, 2], single.plan, rtol=1e-3, atol=1e-7)
    assert sinkhorn_loss(cost, 0.05).shape == (2, 3)


@pytest.mark.parametrize("slab", [1, 50, 1 << 17])
def test_slabs_do_not_change_the_plan(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cosine_cost(37, 20)
    whole = sinkhorn(cost[None], 0.05).plan[0]
    monkeypatch.setattr(problem_module, "SLAB", slab)
    torch.testing.assert_close(sinkhorn(cost, 0.05).plan, whole, rtol=1e-4, atol=1e-9)


def test_the_potentials_make_the_plan() -> None:
    cost = cosine_cost(9, 20)
    for epsilon in (0.005, 0.02, 0.05):
        result = sinkhorn(cost, epsilon)
        made = ((result.row_potential[:, None] + result.column_potential - cost) / epsilon).exp()
        torch.testing.assert_close(made, result.plan, rtol=2e-3, atol=1e-8)
    before, after = ipot(cost, iterations=12), ipot(cost, iterations=13)
    step = ((after.row_potential[:, None] + after.column_potential - cost) / 0.5).exp()
    torch.testing.assert_close(before.plan * step, after.plan, rtol=1e-3, atol=1e-8)


def emd_cost(cost: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> float:
    a, b = as_marginal(rows, cost.shape[0]), as_marginal(columns, cost.shape[1])
    return float(ot.emd2(a, b, cost.double().numpy()))


@pytest.mark.parametrize(("size", "width"), [*((size, 6) for size in SIZES), ((512, 1000), 256)], ids=str)
def test_ipot_has_the_cost_of_the_linear_programme(size: tuple[int, int], width: int) -> None:
    cost = cosine_cost(*size, width=width)
    plan = ipot(cost).plan.double()
    assert float((plan * cost).sum()) == pytest.approx(emd_cost(cost), rel=0.01)
    assert (plan.sum(1) - 1 / size[0]).abs().sum() < 0.005
    assert (plan.sum(0) - 1 / size[1]).abs().sum() < 0.005


@pytest.mark.parametrize(("beta", "inner"), [(0.02, 3), (0.1, 1), (0.1, 3), (0.5, 1)])
def test_ipot_in_both_domains_with_given_marginals(beta: float, inner: int) -> None:
    cost, rows, columns = cosine_cost(12, 30), uneven(12), uneven(30, seed=1)
    plan = ipot(cost, beta, rows=rows, columns=columns, inner=inner, iterations=200).plan.double()
    assert float((plan * cost).sum()) == pytest.approx(emd_cost(cost, rows, columns), rel=0.01)
    assert (plan.sum(1) - rows).abs().sum() < 0.005
    assert (plan.sum(0) - columns).abs().sum() < 0.005


def test_ipots_two_domains_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cosine_cost(12, 30)
    products = ipot(cost, 0.5, iterations=13).plan
    monkeypatch.setattr(proximal, "IPOT_EXP_DOMAIN_FROM", 9.0)
    torch.testing.assert_close(ipot(cost, 0.5, iterations=13).plan, products, rtol=1e-4, atol=1e-8)


def plain_ipot(cost: Tensor, beta: float, iterations: int) -> Tensor:
    """Xie et al. 2020, algorithm 1, word for word, in double."""
    cost = cost.double()
    height, width = cost.shape
    kernel, plan = (-cost / beta).exp(), torch.ones_like(cost)
    sigma = torch.full((width,), 1 / width, dtype=torch.float64)
    for _ in range(iterations):
        scaled = kernel * plan
        delta = 1 / (height * (scaled @ sigma))
        sigma = 1 / (width * (scaled.T @ delta))
        plan = delta[:, None] * scaled * sigma
    return plan


@pytest.mark.parametrize("iterations", [50, 200])
def test_ipot_is_the_papers_algorithm(iterations: int) -> None:
    """σ starts on the cost without its minima here, with them there: the same from where σ has settled."""
    cost = cosine_cost(12, 30)
    ours, paper = ipot(cost, iterations=iterations).plan.double(), plain_ipot(cost, 0.5, iterations)
    assert (ours - paper).abs().sum() < 5e-3
    assert float((ours * cost).sum()) == pytest.approx(float((paper * cost).sum()), rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.005, 0.03, 0.05])
def test_a_warm_start_needs_fewer_iterations(epsilon: float) -> None:
    cost = cosine_cost(20, 50)
    cold = sinkhorn(cost, epsilon, iterations=5000, tolerance=1e-4)
    near = cost + 0.001 * cosine_cost(20, 50, seed=3)
    again, warm = (
        sinkhorn(near, epsilon, iterations=5000, tolerance=1e-4, warm=state).iterations for state in (None, cold)
    )
    assert warm < again < 5000
    assert sinkhorn(cost, epsilon, iterations=5000, tolerance=1.1e-4, warm=cold).iterations == 0
    other_rows = cosine_cost(31, 50, seed=4)
    assert sinkhorn(other_rows, epsilon, warm=cold).plan.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.005, 0.03, 0.05])
def test_a_warm_start_goes_on(epsilon: float) -> None:
    cost = cosine_cost(20, 50)
    at_once = sinkhorn(cost, epsilon, iterations=60).plan
    halfway = sinkhorn(cost, epsilon, iterations=20)
    torch.testing.assert_close(sinkhorn(cost, epsilon, iterations=40, warm=halfway).plan, at_once, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("beta", [0.03, 0.5])
def test_ipot_goes_on_from_a_warm_start(beta: float) -> None:
    cost = cosine_cost(20, 50)
    halfway = ipot(cost, beta, iterations=20)
    more = ipot(cost, beta, iterations=13, warm=halfway)
    torch.testing.assert_close(more.plan, ipot(cost, beta, iterations=33).plan, rtol=1e-3, atol=1e-7)
    cold = ipot(cost, iterations=500, tolerance=1e-3)
    assert ipot(cost, iterations=500, tolerance=1e-3, warm=cold).iterations < cold.iterations < 500


def test_a_tolerance_stops_early() -> None:
    cost = cosine_cost(20, 50)
    for epsilon in (0.005, 0.05):
        loose, tight = (sinkhorn(cost, epsilon, iterations=5000, tolerance=error) for error in (1e-1, 1e-3))
        assert 0 < loose.iterations < tight.iterations < 5000
        assert (tight.plan.sum(0) - 1 / 50).abs().sum() < 1.1e-3
        assert sinkhorn(cost, epsilon, iterations=3, tolerance=1e-9).iterations == 3
        assert sinkhorn(cost, epsilon).iterations == 50
    stopped = ipot(cost, iterations=500, tolerance=1e-3)
    assert 0 < stopped.iterations < 500
    assert (stopped.plan.sum(1) - 1 / 20).abs().sum() < 1.1e-3


def test_half_precision_under_autocast_is_computed_in_full() -> None:
    cost = cosine_cost(20, 50).bfloat16()
    for one in (lambda c: sinkhorn(c, 0.05).plan, lambda c: sinkhorn(c[None], 0.05).plan, lambda c: ipot(c).plan):
        wanted = one(cost.float())
        with torch.autocast("cpu", torch.bfloat16):
            got = one(cost)
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)
    leaf = cost.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sinkhorn_loss(leaf, 0.05)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_the_input_is_left_alone() -> None:
    cost = cosine_cost(20, 50)
    kept = cost.clone()
    for solver in SOLVERS:
        solve(cost, solver)
    sinkhorn(cost, 0.005)
    ipot(cost, 0.01)
    sinkhorn_loss(cost, 0.05, through_iterations=True)
    assert torch.equal(cost, kept)


def test_rows_and_columns_have_no_order() -> None:
    cost, rows, columns = cosine_cost(20, 50), uneven(20), uneven(50, seed=1)
    generator = torch.Generator().manual_seed(0)
    over, across = torch.randperm(20, generator=generator), torch.randperm(50, generator=generator)
    moved = {"rows": rows[over], "columns": columns[across]}
    for one in (lambda c, **k: sinkhorn(c, 0.05, **k), lambda c, **k: sinkhorn(c, 0.005, **k), ipot):
        plan, permuted = one(cost, rows=rows, columns=columns).plan, one(cost[over][:, across], **moved).plan
        torch.testing.assert_close(permuted, plan[over][:, across], rtol=2e-3, atol=1e-7)


def test_solve_names_its_solvers() -> None:
    cost = cosine_cost(8, 12, leading=(2,)).requires_grad_()
    plans = {solver: solve(cost, solver, epsilon=0.1, iterations=2000) for solver in SOLVERS}
    for plan in plans.values():
        assert plan.dtype == torch.float32
        assert plan.shape == (2, 8, 12)
        assert not plan.requires_grad
        torch.testing.assert_close(plan.sum((-2, -1)), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plans["sinkhorn"], plans["pot"], rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="sinkhorm"):
        solve(cost, "sinkhorm")


def test_wrong_shapes_are_named() -> None:
    cost = cosine_cost(8, 12)
    for wrong in (cost[0], cost[:0], cost.long()):
        with pytest.raises(ValueError, match="cost must be"):
            sinkhorn(wrong, 0.05)
    with pytest.raises(ValueError, match="columns must be"):
        sinkhorn(cost, 0.05, columns=uneven(8))
    with pytest.raises(ValueError, match="rows must be"):
        ipot(cost, rows=uneven(8)[None])
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn(cost, 0.0)
    with pytest.raises(ValueError, match="beta"):
        ipot(cost, 0.0)
    with pytest.raises(ValueError, match="warm start"):
        ipot(cost[:4], warm=ipot(cost))


@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.05, 0.5])
def test_the_loss_is_pots_value_and_its_gradient_the_plan(epsilon: float) -> None:
    cost = cosine_cost(12, 30).requires_grad_()
    loss = sinkhorn_loss(cost, epsilon, iterations=5000)
    loss.backward()
    a, b = as_marginal(None, 12), as_marginal(None, 30)
    problem = cost.detach().double().numpy()
    judge = ot.solve(problem, a, b, reg=epsilon, reg_type="entropy", max_iter=20000, tol=1e-10)
    assert float(loss.detach()) == pytest.approx(float(judge.value), abs=2e-5)
    assert cost.grad is not None
    assert (cost.grad - torch.from_numpy(judge.plan)).abs().sum() < 1e-3
    assert torch.equal(cost.grad, sinkhorn(cost, epsilon, iterations=5000).plan)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("epsilon", [0.005, 0.02, 0.1])
def test_gradients_are_finite_differences(epsilon: float, through: bool) -> None:
    """Along random directions; the unrolled one after a few iterations, where the envelope does not hold."""
    cost = cosine_cost(12, 30).requires_grad_()
    rows, columns = uneven(12), uneven(30, seed=1)
    iterations = 4 if through else 5000

    def value(at: Tensor) -> Tensor:
        options = {"rows": rows, "columns": columns, "iterations": iterations, "through_iterations": through}
        return sinkhorn_loss(at, epsilon, **options)

    (gradient,) = torch.autograd.grad(value(cost), cost)
    generator = torch.Generator().manual_seed(0)
    step = epsilon / 20
    for _ in range(5):
        direction = torch.randn(cost.shape, generator=generator)
        with torch.no_grad():
            numerical = (value(cost + step * direction) - value(cost - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), abs=0.01)


def test_converged_unrolled_gradient_is_the_plan() -> None:
    cost = cosine_cost(2, 12, leading=(3,)).requires_grad_()
    (envelope,) = torch.autograd.grad(sinkhorn_loss(cost, 0.1, iterations=130).sum(), cost)
    loss = sinkhorn_loss(cost, 0.1, iterations=130, through_iterations=True)
    (unrolled,) = torch.autograd.grad(loss.sum(), cost)
    torch.testing.assert_close(unrolled, envelope, rtol=1e-3, atol=1e-5)


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in self.NAMES):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    cost = cosine_cost(20, 50).requires_grad_()
    with Syncs() as syncs:
        for solver in ("ipot", "sinkhorn"):
            solve(cost, solver)
        sinkhorn(cost, 0.005, rows=uneven(20), warm=sinkhorn(cost, 0.005))
        ipot(cost, 0.01, warm=ipot(cost, 0.01))
        for through in (False, True):
            sinkhorn_loss(cost, 0.05, through_iterations=through).backward()
    assert not syncs.seen
    with Syncs() as syncs:
        sinkhorn(cost, 0.05, tolerance=1e-3)
    assert syncs.seen["_local_scalar_dense"] > 0


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("leading", [(), (2,)], ids=str)
def test_every_tensor_is_made_on_the_costs_device(leading: tuple[int, ...]) -> None:
    with FakeTensorMode():
        cost = torch.empty(*leading, 20, 50, device="cuda", dtype=torch.bfloat16)
        results = [sinkhorn(cost, 0.05), sinkhorn(cost, 0.005), ipot(cost), ipot(cost, 0.01)]
        results += [sinkhorn(cost, 0.05, warm=results[0]), ipot(cost, warm=results[2])]
        values = [value for result in results for value in result[:3]]
        for through in (False, True):
            values.append(sinkhorn_loss(cost.requires_grad_(), 0.05, through_iterations=through))
    assert {value.device.type for value in values} == {"cuda"}
    assert {value.dtype for value in values} == {torch.float32}
