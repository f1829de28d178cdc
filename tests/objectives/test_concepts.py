"""Masked concept recovering against trying every order."""

from __future__ import annotations

from itertools import permutations
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.systems.test_albef import Calls
from vlscale.objectives import concepts
from vlscale.objectives.concepts import (
    Slots,
    gather_concepts,
    mask_concepts,
    recover,
    recover_loss,
)
from vlscale.objectives.masking import IGNORED

CLASSES = 12


def slots(sizes: list[int], fillers: int = 3, seed: int = 0, scale: float = 2.0) -> Slots:
    """Groups of given sizes in a mixed order, rows that fill up among them; labels may repeat."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((size,), 2 * group) for group, size in enumerate(sizes)])
    labels = torch.randint(CLASSES, groups.shape, generator=generator)
    groups = torch.cat([groups, torch.zeros(fillers).long()])  # what a filler says of its group is not read
    labels = torch.cat([labels, torch.full((fillers,), IGNORED)])
    mixed = torch.randperm(len(groups), generator=generator)
    logits = scale * torch.randn(len(groups), CLASSES, generator=generator)
    return Slots(logits, labels[mixed], groups[mixed], max(sizes))


def slow(given: Slots, cost: str) -> tuple[float, list[float]]:
    """Mean cross-entropy in the best order, and the least cost of every group, one group and order at a time."""
    total, count, least = 0.0, 0, []
    for group in given.groups.unique():
        rows = [r for r in range(len(given.labels)) if given.groups[r] == group and given.labels[r] >= 0]
        probability = given.logits[rows].double().softmax(1)
        price = 1 - probability if cost == "prob" else -probability.log()
        labels = given.labels[rows]
        orders = [torch.tensor(order, dtype=torch.int64) for order in permutations(range(len(rows)))]
        best = min(orders, key=lambda order: float(price.gather(1, labels[order][:, None]).sum()))
        least.append(float(price.gather(1, labels[best][:, None]).sum()))
        total -= float(probability.log().gather(1, labels[best][:, None]).sum())
        count += len(rows)
    return total / count, least


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cost", ["prob", "nll"])
def test_against_every_order_up_to_seven_masks(cost: Literal["prob", "nll"], seed: int) -> None:
    given = slots([1, 7, 2, 5], seed=seed)
    expected, least = slow(given, cost)
    (recovered,) = recover([given], "hungarian", cost)
    assert float(recovered.loss) == pytest.approx(expected, rel=1e-5)
    assert slow_costs(given, recovered.labels, cost) == pytest.approx(least, rel=1e-5)
    loss = recover_loss(*given, cost=cost)
    assert torch.equal(loss, recovered.loss)
    assert loss < recover_loss(*given, order="ordered")
    for group in given.groups.unique():  # dealt out, neither lost nor doubled
        rows = (given.groups == group) & (given.labels >= 0)
        assert torch.equal(recovered.labels[rows].sort().values, given.labels[rows].sort().values)
    assert torch.equal(recovered.labels < 0, given.labels < 0)


def slow_costs(given: Slots, labels: Tensor, cost: str) -> list[float]:
    """Cost of every group with these labels."""
    probability = given.logits.double().softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    price = 1 - probability if cost == "prob" else -probability.log()
    return [float(price[(given.groups == group) & (labels >= 0)].sum()) for group in given.groups.unique()]


def test_the_two_costs_can_disagree() -> None:
    """Eq. 1 adds probabilities, −log p multiplies them: 0.72 and 0.06 against 0.39 and 0.24."""
    probability = torch.tensor([[0.72, 0.24, 0.04], [0.39, 0.06, 0.55]])
    given = Slots(probability.log(), torch.tensor([0, 1]), torch.zeros(2).long(), 2)
    assert recover([given], cost="prob")[0].labels.tolist() == [0, 1]
    assert recover([given], cost="nll")[0].labels.tolist() == [1, 0]


def test_equal_labels() -> None:
    given = slots([4, 3])
    same = given._replace(labels=given.labels.clamp(max=5).where(given.labels < 0, 5))
    (recovered,) = recover([same])
    assert torch.equal(recovered.labels, same.labels)
    assert torch.equal(recovered.loss, recover_loss(*same, order="ordered"))


def test_kinds_together_are_as_alone_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags and phrases of the same images: other vocabularies, other lengths."""
    calls, assign = [], concepts.assign

    def counting(cost: Tensor, problems: Tensor) -> Tensor:
        calls.append(cost.shape)
        return assign(cost, problems)

    tags, phrases = slots([4, 6, 1]), slots([2, 1, 3], seed=5)
    phrases = phrases._replace(logits=torch.randn(len(phrases.labels), 40))
    monkeypatch.setattr(concepts, "assign", counting)
    together = recover([tags, phrases])
    assert calls == [(len(tags.labels) + len(phrases.labels), 6)]
    for kind, both in zip((tags, phrases), together, strict=True):
        (alone,) = recover([kind])
        assert torch.equal(alone.labels, both.labels)
        assert torch.equal(alone.loss, both.loss)
    recover([tags, phrases], "ordered")
    assert len(calls) == 3


def test_nothing_masked_gives_zero_and_no_gradient() -> None:
    logits = torch.randn(3, CLASSES, requires_grad=True)
    loss = recover_loss(logits, torch.full((3,), IGNORED), torch.zeros(3).long(), 4)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_the_gradient_is_cross_entropy_s_with_the_dealt_labels() -> None:
    given = slots([5, 2])
    logits = given.logits.clone().requires_grad_()
    (recovered,) = recover([given._replace(logits=logits)])
    recovered.loss.backward()
    again = given.logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(again, recovered.labels, ignore_index=IGNORED).backward()
    assert torch.allclose(logits.grad, again.grad, atol=1e-7)  # type: ignore[arg-type]


def test_overflow_reaches_the_loss() -> None:
    given = slots([3, 2])
    bad = given._replace(logits=given.logits.clone().fill_(torch.nan))
    assert recover_loss(*bad).isnan()


def test_a_group_longer_than_announced_is_refused() -> None:
    with pytest.raises(ValueError, match="a problem has 4 rows, but costs have 3 columns"):
        recover_loss(*slots([4, 2])._replace(most=3))


def test_only_the_assignment_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (copies.append(tensor.shape), cpu(tensor))[1])
    labels = torch.full((3, 6), IGNORED)
    labels[0, 1:4], labels[2, 5] = torch.tensor([4, 5, 6]), 7
    with Calls() as calls:
        rows = gather_concepts(torch.randn(3, 6, CLASSES, requires_grad=True), labels, capacity=9)
        recover_loss(rows.states, rows.labels, rows.groups, 6).backward()
    assert len(copies) == 1
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
        assert calls.counts[name] == 0, name


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_every_tensor_is_made_on_the_logits_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the assignment itself, which works on the host."""
    monkeypatch.setattr(concepts, "assign", lambda cost, problems: torch.zeros_like(problems))
    with FakeTensorMode():
        ids = torch.empty(4, 9, dtype=torch.int64, device="cuda")
        masked = mask_concepts(ids, ids > 3, 3, (4, 30), 0.25)
        states = torch.empty(4, 9, CLASSES, device="cuda", dtype=torch.half)
        rows = gather_concepts(states, masked.labels, capacity=12)
        given = Slots(rows.states, rows.labels, rows.groups, 9)
        (recovered,) = recover([given])
        assert recovered.loss.device.type == recovered.labels.device.type == masked.input_ids.device.type == "cuda"
        assert recovered.loss.dtype == torch.float32


def test_groups_are_the_rows_of_the_batch() -> None:
    labels = torch.full((4, 5), IGNORED)
    for row, column, label in ((0, 2, 5), (2, 1, 6), (2, 4, 7)):
        labels[row, column] = label
    states = torch.randn(4, 5, 3)
    rows = gather_concepts(states, labels, capacity=4)
    assert rows.labels.tolist() == [5, 6, 7, IGNORED]
    assert rows.groups[:3].tolist() == [0, 2, 2]
    assert torch.equal(rows.states[:3], states[labels != IGNORED])


def test_masking_has_bert_s_shares_and_draws_from_the_concepts() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, 260, (500, 12), generator=generator)
    where = torch.zeros_like(ids).bool()
    where[:, 3:8] = True
    masked, labels = mask_concepts(ids, where, 3, (200, 260), 0.25, torch.Generator().manual_seed(1))
    selected = labels != IGNORED
    assert not selected[~where].any()
    assert torch.equal(masked[~selected], ids[~selected])
    assert torch.equal(labels[selected], ids[selected])
    count = int(selected.sum())
    assert count / 2500 == pytest.approx(0.25, abs=0.03)
    became, were = masked[selected], ids[selected]
    assert float((became == 3).sum()) / count == pytest.approx(0.8, abs=0.05)
    other = became[(became != 3) & (became != were)]
    assert len(other) / count == pytest.approx(0.1 * 59 / 60, abs=0.04)
    assert other.min() >= 200
    assert other.max() < 260
