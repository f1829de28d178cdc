"""Masked language modelling."""

from __future__ import annotations

import math

import pytest
import torch

from vlscale.data.sample import Vocabulary
from vlscale.objectives.masking import (
    IGNORED,
    gather_masked,
    mask_tokens,
    masked_accuracy,
    masking_capacity,
    mlm_loss,
)

VOCABULARY = Vocabulary(size=1000, pad=0, cls=1, sep=2, mask=3)


def texts(rows: int = 400, length: int = 25) -> torch.Tensor:
    ids = torch.randint(4, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -3], ids[:, -2:] = VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.pad
    return ids


def test_masking_has_the_release_s_shares() -> None:
    ids = texts()
    masked, labels = mask_tokens(ids, VOCABULARY, 0.15, torch.Generator().manual_seed(1))
    selected = labels != IGNORED
    assert not selected[:, [0, -3, -2, -1]].any()
    assert torch.equal(labels[selected], ids[selected])
    assert torch.equal(masked[~selected], ids[~selected])
    words = ids[selected]
    count = len(words)
    assert count / (400 * 21) == pytest.approx(0.15, abs=0.015)
    became = masked[selected]
    assert float((became == VOCABULARY.mask).sum()) / count == pytest.approx(0.8, abs=0.04)
    assert float((became == words).sum()) / count == pytest.approx(0.1, abs=0.03)
    random = became[(became != VOCABULARY.mask) & (became != words)]
    assert len(random) / count == pytest.approx(0.1, abs=0.03)
    assert random.min() < 200
    assert random.max() > 800


def test_the_generator_decides() -> None:
    first, again = (mask_tokens(texts(), VOCABULARY, 0.15, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)


def test_gathered_rows_are_the_selected_ones_in_order() -> None:
    states = torch.randn(4, 6, 3, requires_grad=True)
    labels = torch.full((4, 6), IGNORED)
    for row, column, label in ((0, 2, 5), (1, 1, 6), (3, 5, 7)):
        labels[row, column] = label
    gathered = gather_masked(states, labels, capacity=5)
    assert gathered.states.shape == (5, 3)
    assert gathered.labels.tolist() == [5, 6, 7, IGNORED, IGNORED]
    assert torch.equal(gathered.states[:3], states[labels != IGNORED])
    gathered.states[:3].sum().backward()
    assert torch.equal(states.grad.sum(2) == 3, labels != IGNORED)  # type: ignore[union-attr]
    assert gather_masked(states, labels, capacity=2).labels.tolist() == [5, 6]  # surplus is left out


def test_capacity_holds_what_is_drawn() -> None:
    assert masking_capacity(4, 12, 1.0) == 48
    assert masking_capacity(1, 1, 0.15) == 1
    capacity = masking_capacity(64, 25, 0.15)
    assert capacity < 64 * 25 / 4
    ids = torch.full((64, 25), 9)
    for seed in range(50):
        labels = mask_tokens(ids, VOCABULARY, 0.15, torch.Generator().manual_seed(seed)).labels
        assert int((labels != IGNORED).sum()) <= capacity


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_mlm_loss_against_loops(alpha: float) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 7), torch.randn(5, 7)
    labels = torch.tensor([3, IGNORED, 0, 6, IGNORED])
    total, count = 0.0, 0
    for row in range(5):
        if labels[row] == IGNORED:
            continue
        normaliser = math.log(sum(math.exp(float(value)) for value in logits[row]))
        weights = [math.exp(float(value)) for value in teacher[row]]
        hard = normaliser - float(logits[row, labels[row]])
        soft = sum(
            w / sum(weights) * (normaliser - float(value)) for w, value in zip(weights, logits[row], strict=True)
        )
        total, count = total + (1 - alpha) * hard + alpha * soft, count + 1
    assert float(mlm_loss(logits, labels, teacher, alpha)) == pytest.approx(total / count, rel=1e-5)
    if alpha == 0:
        assert float(mlm_loss(logits, labels)) == pytest.approx(total / count, rel=1e-5)


def test_nothing_masked_gives_zero_and_no_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss = mlm_loss(logits, torch.full((3,), IGNORED), torch.randn(3, 7), 0.4)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_accuracy_counts_selected_rows() -> None:
    logits = torch.eye(4)
    assert float(masked_accuracy(logits, torch.tensor([0, 0, IGNORED, 3]))) == pytest.approx(2 / 3)
