"""Phrase grounding, weakly supervised and by boxes, against loops over phrases and regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.systems.test_albef import Calls
from vlscale.objectives.grounding import (
    Grounded,
    draw_picks,
    ground,
    overlap_loss,
    overlap_recall,
    phrase_masks,
    phrase_region_similarity,
    wpg_loss,
)

LENGTH, REGIONS, WIDTH = 6, 5, 4


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States, phrases and regions of four pairs; tags stand between the two in none of the masks."""
    states = torch.randn(4, LENGTH + 2 + REGIONS, WIDTH, generator=torch.Generator().manual_seed(seed))
    phrases = torch.zeros(4, 3, LENGTH)
    phrases[0, 0, 2], phrases[0, 1, 3:6] = 1, 1
    phrases[1, 0, 1], phrases[1, 1, 2], phrases[1, 2, 3] = 1, 1, 1
    phrases[3, 0, 4] = 1
    regions = torch.ones(4, REGIONS).long()
    regions[1, 2:], regions[3] = 0, 0
    return states, phrases, regions


def slow_similarity(states: Tensor, phrases: Tensor, regions: Tensor) -> list[list[list[float]]]:
    """Per text and phrase the cosines to the regions that are there."""
    found = []
    for b in range(len(states)):
        seen = [states[b, LENGTH + 2 + r] for r in range(REGIONS) if regions[b, r]]
        rows = []
        for mask in phrases[b]:
            tokens = [states[b, t] for t in range(LENGTH) if mask[t]]
            if tokens:
                mean = torch.stack(tokens).mean(0)
                rows.append([float(mean @ region / mean.norm() / region.norm()) for region in seen])
        found.append(rows)
    return found


def test_cosines_against_loops() -> None:
    states, phrases, regions = pairs()
    cosines = phrase_region_similarity(states, phrases, regions)
    assert cosines.shape == (4, 3, REGIONS)
    for b, rows in enumerate(slow_similarity(states, phrases, regions)):
        for p, row in enumerate(rows):
            assert cosines[b, p][regions[b] == 1].tolist() == pytest.approx(row, abs=1e-6)
        assert not cosines[b, len(rows) :, regions[b] == 1].any()
    assert (cosines[(regions == 0)[:, None].expand_as(cosines)] == -torch.inf).all()


def test_a_mask_of_positions_becomes_one_row_per_phrase() -> None:
    places = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    masks = phrase_masks(places, 4)
    assert masks.shape == (2, 4, 6)
    assert masks[0].long().argmax(1)[:3].tolist() == [1, 3, 4]
    assert masks.sum(2).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(phrase_masks(places, 2), masks[:, :2])
    assert phrase_masks(places, 0).shape == (2, 0, 6)


def test_the_nearest_region_and_the_mean_over_phrases() -> None:
    states, phrases, regions = pairs()
    cosines = phrase_region_similarity(states, phrases, regions)
    grounded = ground(cosines, phrases.bool().any(2))
    slow = slow_similarity(states, phrases, regions)
    for b, valid in enumerate([True, True, False, False]):  # no phrase; no region
        best = [max(row) for row in slow[b] if row]
        expected = sum(best) / len(best) if best else 0.0
        assert float(grounded.similarity[b]) == pytest.approx(expected, abs=1e-6)
        assert bool(grounded.valid[b]) is valid


def test_masked_phrases_are_left_out_of_the_mean() -> None:
    states, phrases, regions = pairs()
    cosines = phrase_region_similarity(states, phrases, regions)
    kept = phrases.bool().any(2)
    kept[0, 1] = kept[1, :] = False
    grounded = ground(cosines, kept)
    assert float(grounded.similarity[0]) == pytest.approx(float(cosines[0, 0].max()), abs=1e-6)
    assert grounded.valid.tolist() == [True, False, False, False]


def test_picks_among_the_nearest_three() -> None:
    states, phrases, regions = pairs()
    cosines = phrase_region_similarity(states, phrases, regions)
    picks = torch.tensor([[2, 0, -1], [0, 0, 0], [-1, -1, -1], [1, -1, -1]])
    grounded = ground(cosines, phrases.bool().any(2), picks)
    assert grounded.valid.tolist() == [True, False, False, False]  # the second image has two regions
    expected = (cosines[0, 0].sort(descending=True).values[2] + cosines[0, 1].max()) / 2
    assert float(grounded.similarity[0]) == pytest.approx(float(expected), abs=1e-6)
    drawn = draw_picks(cosines, torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 3)
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_regions_than_a_pick_needs(count: int) -> None:
    states, phrases, _ = pairs()
    cosines = phrase_region_similarity(states, phrases, torch.ones(4, count))
    there = phrases.bool().any(2)
    assert not ground(cosines, there, draw_picks(cosines)).valid.any()
    assert ground(cosines, there).valid.tolist() == [count > 0, count > 0, False, count > 0]


def test_hinge_against_loops() -> None:
    positive = Grounded(torch.tensor([0.9, 0.2, 0.4, 0.3, 0.1]), torch.tensor([1, 1, 1, 1, 0]).bool())
    negative = Grounded(torch.tensor([0.1, 0.3, 0.35, 0.9, 0.9]), torch.tensor([1, 1, 1, 0, 1]).bool())
    expected = (0 + 0.3 + 0.15) / 3
    assert float(wpg_loss(positive, negative)) == pytest.approx(expected, abs=1e-6)
    drawn = torch.tensor([1, 1, 0, 1, 1]).bool()
    assert float(wpg_loss(positive, negative, valid=drawn)) == pytest.approx(0.15, abs=1e-6)
    assert float(wpg_loss(positive, negative, margin=0.0)) == pytest.approx(0.1 / 3, abs=1e-6)


def test_gradients_are_finite_and_padding_gets_none() -> None:
    states, phrases, regions = pairs()
    states.requires_grad_()
    there = phrases.bool().any(2)
    positive = ground(phrase_region_similarity(states, phrases, regions), there)
    others = torch.tensor([1, 0, 3, 2])
    mixed = torch.cat([states[:, :LENGTH], states[others, LENGTH:]], dim=1)
    negative = ground(phrase_region_similarity(mixed, phrases, regions[others]), there)
    loss = wpg_loss(positive, negative, margin=2.5)
    loss.backward()
    assert float(loss.detach()) > 0
    gradient = states.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient[2:].any()  # nothing to ground, or nothing to ground it in
    assert not gradient[1, LENGTH + 2 + 2 :].any()
    assert gradient[0, 2].any()


@pytest.mark.parametrize("size", [1, 4])
def test_nothing_to_ground_is_zero(size: int) -> None:
    """A batch of one has no other image; texts without phrases; no phrases at all in the recipe."""
    states = torch.randn(size, LENGTH + REGIONS, WIDTH, requires_grad=True)
    regions = torch.ones(size, REGIONS)
    for phrases, valid in (
        (torch.ones(size, 3, LENGTH), torch.zeros(size).bool()),
        (torch.zeros(size, 3, LENGTH), None),
        (torch.zeros(size, 0, LENGTH), None),
    ):
        grounded = ground(phrase_region_similarity(states, phrases, regions), phrases.bool().any(2))
        loss = wpg_loss(grounded, grounded, valid=valid)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not states.grad.any()  # type: ignore[union-attr]


def test_overflow_reaches_the_loss() -> None:
    states, phrases, regions = pairs()
    states[0, LENGTH + 2] = torch.nan
    grounded = ground(phrase_region_similarity(states, phrases, regions), phrases.bool().any(2))
    assert wpg_loss(grounded, grounded).isnan()


def test_autocast_does_not_reach_the_cosines() -> None:
    states, phrases, regions = pairs()
    plain = phrase_region_similarity(states, phrases, regions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, phrase_region_similarity(states, phrases, regions))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_nothing_asks_the_device_or_leaves_it() -> None:
    states, phrases, regions = pairs()
    states.requires_grad_()

    def step(states: Tensor, phrases: Tensor, regions: Tensor) -> Tensor:
        rows = phrase_masks(phrases.any(1), 3)
        cosines = phrase_region_similarity(states, rows, regions)
        there = rows.any(2)
        return wpg_loss(ground(cosines, there), ground(cosines, there, draw_picks(cosines)))

    with Calls() as calls:
        step(states, phrases.bool(), regions).backward()
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
        assert calls.counts[name] == 0, name
    with FakeTensorMode():
        fake_states = torch.empty(states.shape, dtype=torch.half, device="cuda")
        fake_phrases = torch.empty(phrases.shape, dtype=torch.bool, device="cuda")
        assert step(fake_states, fake_phrases, torch.empty(regions.shape, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_overlaps_are_learned_from_real_regions_of_phrases_with_boxes(kind: Any) -> None:
    """Padding has the cosine −inf: it must not make the gradient nan. What is not finite otherwise must show."""
    cosines = torch.tensor(
        [[[0.9, -0.2, 0.0], [0.1, 0.4, 0.3]], [[0.5, 0.2, 0.7], [0.0, 0.0, 0.0]]], requires_grad=True
    )
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    scores = cosines.masked_fill(~real[:, None], -torch.inf)
    overlaps, grounded = torch.rand(2, 2, 3), torch.tensor([[True, False], [True, False]])
    loss = overlap_loss(scores, overlaps, grounded, kind)
    loss.backward()
    assert cosines.grad is not None
    assert ((cosines.grad != 0) == (real[:, None] & grounded[:, :, None])).all()
    pairs = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 0, 2)]
    cosine = torch.stack([cosines[pair] for pair in pairs]).detach()
    wanted = torch.stack([overlaps[pair] for pair in pairs])
    if kind == "mse":
        expected = (cosine - wanted).square().mean()
    else:
        expected = F.binary_cross_entropy(torch.sigmoid(10 * (cosine - 0.5)), wanted)
    torch.testing.assert_close(loss.detach(), expected)
    assert overlap_loss(scores, overlaps, torch.zeros_like(grounded), kind) == 0
    assert overlap_loss(torch.full_like(scores, torch.nan), overlaps, grounded, kind).isnan()


def test_a_phrase_is_found_where_its_best_region_overlaps_it_by_half() -> None:
    scores = torch.tensor([[[0.9, 0.1], [0.2, 0.3]], [[0.4, -torch.inf], [0.9, 0.1]]])
    overlaps = torch.tensor([[[0.5, 0.9], [0.6, 0.49]], [[0.2, 0.0], [0.9, 0.9]]])
    grounded = torch.tensor([[True, True], [True, False]])
    assert overlap_recall(scores, overlaps, grounded) == pytest.approx(1 / 3)
