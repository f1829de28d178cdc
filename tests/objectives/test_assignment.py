"""Text assignment: which images are shown, and the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vlscale.objectives.assignment import (
    FIRST,
    NEITHER,
    SECOND,
    Assignment,
    Draws,
    assign,
    assignment_accuracy,
    assignment_loss,
    draw_images,
)


def draw(sim: Tensor, ids: Tensor, seed: int = 0) -> Assignment:
    return assign(draw_images(sim, ids, torch.Generator().manual_seed(seed)), ids)


def test_images_stand_where_the_label_says() -> None:
    ids = torch.arange(3)
    draws = Draws(
        torch.tensor([False, False, True]), torch.tensor([False, True, True]), torch.tensor([[2, 1], [0, 2], [1, 0]])
    )
    pairs = assign(draws, ids)
    assert pairs.first.tolist() == [0, 0, 1]
    assert pairs.second.tolist() == [2, 1, 0]
    assert pairs.labels.tolist() == [FIRST, SECOND, NEITHER]
    assert pairs.valid.all()


def test_each_class_takes_a_third_and_wrong_images_are_drawn_by_similarity() -> None:
    size, rows = 4, 6000
    sim = torch.tensor([[9.0, 1.0, 0.0, -1.0]]).roll(0).expand(size, size)
    counts, labels = torch.zeros(size, size), torch.zeros(3)
    for seed in range(rows // size):
        pairs = draw(sim, torch.arange(size), seed)
        assert pairs.valid.all()
        own = torch.arange(size)
        shown = torch.stack([pairs.first, pairs.second], dim=1)
        right = {FIRST: shown[:, 0] == own, SECOND: shown[:, 1] == own, NEITHER: (shown != own[:, None]).all(1)}
        assert torch.equal(torch.stack([right[c] for c in range(3)])[pairs.labels, own], torch.ones(size).bool())
        assert (pairs.first != pairs.second).all()
        labels += F.one_hot(pairs.labels, 3).sum(0)
        other = torch.where(pairs.labels == FIRST, pairs.second, pairs.first)  # the first that was drawn
        counts[own, other] += 1
    assert torch.allclose(labels / rows, torch.full((3,), 1 / 3), atol=0.025)
    expected = sim.masked_fill(torch.eye(size).bool(), -torch.inf).softmax(1)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), expected, atol=0.04)


def test_images_of_the_same_id_are_never_the_wrong_ones() -> None:
    ids = torch.tensor([0, 0, 1, 2])
    for seed in range(50):
        pairs = draw(torch.zeros(4, 4), ids, seed)
        own = torch.arange(4)
        for slot, label in ((pairs.first, FIRST), (pairs.second, SECOND)):
            shown_wrong = pairs.labels != label
            assert (ids[slot] != ids)[shown_wrong].all()
            assert torch.equal(slot[~shown_wrong], own[~shown_wrong])


@pytest.mark.parametrize("ids", [[0], [0, 1], [5, 5, 5]])
def test_small_and_uniform_batches_contribute_what_they_can(ids: list[int]) -> None:
    """With one other image there is no NEITHER; with none there is nothing."""
    others = len(set(ids)) - 1
    for seed in range(30):
        pairs = draw(torch.zeros(len(ids), len(ids)), torch.tensor(ids), seed)
        assert pairs.first.min() >= 0
        assert pairs.second.max() < len(ids)
        wanted = (pairs.labels != NEITHER) if others else torch.zeros(len(ids)).bool()
        assert torch.equal(pairs.valid, wanted)
        logits = torch.randn(len(ids), 3, requires_grad=True)
        loss = assignment_loss(logits, pairs)
        loss.backward()
        if wanted.any():
            torch.testing.assert_close(loss, F.cross_entropy(logits[wanted], pairs.labels[wanted]))
        else:
            assert float(loss.detach()) == 0
            assert not logits.grad.any()  # type: ignore[union-attr]


def test_accuracy_counts_valid_texts() -> None:
    valid = torch.tensor([True, True, False])
    pairs = Assignment(torch.zeros(3).long(), torch.zeros(3).long(), torch.tensor([0, 1, 2]), valid)
    assert float(assignment_accuracy(torch.eye(3)[[0, 0, 2]], pairs)) == 0.5


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_draws_keep_to_the_gpu() -> None:
    """Mixed devices and data-dependent shapes raise under fake tensors."""
    with FakeTensorMode():
        ids = torch.arange(4, device="cuda")
        pairs = draw(torch.zeros(4, 4, device="cuda"), ids)
        loss = assignment_loss(torch.zeros(4, 3, device="cuda"), pairs)
        assert {value.device.type for value in (*pairs, loss)} == {"cuda"}
