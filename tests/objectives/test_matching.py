"""Hard negatives and ITM."""

from __future__ import annotations

import math

import pytest
import torch

from vlscale.objectives.matching import (
    chosen_negatives,
    draw_negatives,
    draw_order,
    half_accuracy,
    half_and_half,
    half_labels,
    half_loss,
    half_valid_rows,
    hardest_negatives,
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


@pytest.mark.parametrize("size", [4, 5])
def test_half_get_a_wrong_image_and_half_a_wrong_text(size: int) -> None:
    ids, order = torch.arange(size), draw_order(size, torch.device("cpu"), generator(1))
    assert order.sort().values.tolist() == list(range(size))
    drawn = draw_negatives(torch.zeros(size, size), torch.zeros(size, size), ids, generator())
    half = half_and_half(drawn, order)
    for row, pair in enumerate(order.tolist()):
        wrong_image = row < size // 2
        expected = (pair, int(drawn.images[pair])) if wrong_image else (int(drawn.texts[pair]), pair)
        assert (int(half.texts[row]), int(half.images[row])) == expected
    assert half.with_wrong_image == size // 2
    assert (half.texts != half.images).all()
    assert half_valid_rows(half).all()


def test_hardest_negatives_are_of_another_image() -> None:
    ids = torch.tensor([0, 1, 0, 2])
    sim_t2i, sim_i2t = torch.randn(4, 4, generator=generator(1)), torch.randn(4, 4, generator=generator(2))
    hardest = hardest_negatives(sim_t2i, sim_i2t, ids)
    for b in range(4):
        others = [c for c in range(4) if ids[c] != ids[b]]
        assert int(hardest.images[b]) == max(others, key=lambda c: float(sim_t2i[b, c]))
        assert int(hardest.texts[b]) == max(others, key=lambda c: float(sim_i2t[b, c]))
    alone = hardest_negatives(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([5]))
    assert not alone.images_valid.any()


def test_half_loss_leaves_out_pairs_without_a_negative() -> None:
    order = torch.tensor([2, 0, 3, 1])
    negatives = chosen_negatives(torch.tensor([1, 0, 3, 0]), torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 2, 3]))
    half = half_and_half(negatives, order)
    assert half.valid.tolist() == [True, True, True, False]  # the text chosen for pair 1 is its own
    valid = half_valid_rows(half)
    assert valid.tolist() == [True, False, True, True, True, True, True, False]
    logits = torch.randn(8, 2, generator=generator())
    labels = half_labels(8, logits.device)
    assert labels.tolist() == [1] * 4 + [0] * 4
    losses, right = [], []
    for row in range(8):
        if valid[row]:
            scores = [math.exp(float(value)) for value in logits[row]]
            losses.append(-math.log(scores[int(labels[row])] / sum(scores)))
            right.append((scores[1] > scores[0]) == bool(labels[row]))
    assert float(half_loss(logits, valid)) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(half_accuracy(logits, valid)) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("ids", [[4], [4, 4, 4]])
def test_half_loss_of_a_batch_without_another_image_is_zero(ids: list[int]) -> None:
    size = len(ids)
    drawn = draw_negatives(torch.zeros(size, size), torch.zeros(size, size), torch.tensor(ids), generator())
    half = half_and_half(drawn, draw_order(size, torch.device("cpu"), generator()))
    logits = torch.randn(2 * size, 2, requires_grad=True)
    loss = half_loss(logits, half_valid_rows(half))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()  # type: ignore[union-attr]
