"""Hard negatives and ITM."""

from __future__ import annotations

import math

import pytest
import torch

from vlscale.objectives.matching import (
    chosen_negatives,
    draw_negatives,
    itm_accuracy,
    itm_labels,
    itm_loss,
    negative_weights,
    valid_rows,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_negatives_follow_the_softmax_without_equal_ids() -> None:
    ids = torch.tensor([0, 1, 2, 1])
    sim_t2i, sim_i2t = torch.randn(4, 4, generator=generator(1)), torch.randn(4, 4, generator=generator(2))
    draws, source = 4000, generator()
    images, texts = torch.zeros(4, 4), torch.zeros(4, 4)
    for _ in range(draws):
        drawn = draw_negatives(sim_t2i, sim_i2t, ids, source)
        images[torch.arange(4), drawn.images] += 1
        texts[torch.arange(4), drawn.texts] += 1
        assert drawn.images_valid.all()
    for counts, sim in ((images, sim_t2i), (texts, sim_i2t)):
        for b in range(4):
            weights = [math.exp(float(sim[b, c])) if ids[b] != ids[c] else 0.0 for c in range(4)]
            for c in range(4):
                share = weights[c] / sum(weights)
                assert float(negative_weights(sim, ids)[b, c]) == pytest.approx(share, rel=1e-5)
                assert float(counts[b, c]) / draws == pytest.approx(share, abs=0.035)
                assert share > 0 or counts[b, c] == 0


@pytest.mark.parametrize("ids", [[4], [4, 4, 4]])
def test_a_batch_without_another_image_has_no_valid_negatives(ids: list[int]) -> None:
    size = len(ids)
    drawn = draw_negatives(torch.zeros(size, size), torch.zeros(size, size), torch.tensor(ids), generator())
    assert not drawn.images_valid.any()
    assert not drawn.texts_valid.any()
    assert ((drawn.images >= 0) & (drawn.images < size)).all()  # may be looked up, whatever it means
    logits = torch.randn(3 * size, 2, requires_grad=True)
    loss = itm_loss(logits, valid_rows(drawn))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().sum()) == 0  # type: ignore[union-attr]
    assert torch.equal(negative_weights(torch.zeros(size, size), torch.tensor(ids)), torch.zeros(size, size))


def test_non_finite_similarities_do_not_stop_the_draw() -> None:
    sim = torch.full((3, 3), torch.nan)
    drawn = draw_negatives(sim, torch.full((3, 3), torch.inf), torch.arange(3), generator())
    assert ((drawn.images >= 0) & (drawn.images < 3)).all()
    assert (drawn.texts != torch.arange(3)).all()


def test_the_generator_decides() -> None:
    sim, ids = torch.zeros(8, 8), torch.arange(8)
    first, again = (draw_negatives(sim, sim, ids, generator(5)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, first.texts)


def test_itm_loss_and_accuracy_against_loops() -> None:
    logits = torch.randn(9, 2, generator=generator())
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1]).bool()
    losses, right = [], []
    for row in range(9):
        if valid[row]:
            label = 1 if row < 3 else 0
            scores = [math.exp(float(value)) for value in logits[row]]
            losses.append(-math.log(scores[label] / sum(scores)))
            right.append((scores[1] > scores[0]) == bool(label))
    assert float(itm_loss(logits, valid)) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(itm_accuracy(logits, valid)) == pytest.approx(sum(right) / len(right))
    assert itm_labels(9, logits.device).tolist() == [1] * 3 + [0] * 6


def test_a_pair_without_negatives_is_left_out_whole() -> None:
    ids = torch.tensor([0, 1, 1])
    negatives = chosen_negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 0]), ids)
    assert negatives.images_valid.tolist() == [True, False, True]
    assert valid_rows(negatives).tolist() == [True, False, True, True, False, True, True, True, True]
