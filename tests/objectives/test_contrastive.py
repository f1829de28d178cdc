"""Contrastive objectives against loops, and over two ranks against one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlscale import distributed
from vlscale.objectives.contrastive import (
    clamped_temperature,
    count_nonfinite,
    cross_alignment,
    hard_targets,
    in_batch_itc,
    queue_similarities,
    queue_targets,
    retrieval_accuracy,
    smoothed_targets,
    soft_cross_entropy,
    vsc,
)

IDS = torch.tensor([7, 3, 7, 5, 3, 9])


def features(rows: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for _ in range(2)]
    return made[0], made[1]


def slow_itc(images: Tensor, texts: Tensor, temperature: float, ids: list[int]) -> float:
    """One pair of rows at a time."""
    total = 0.0
    for rows, columns in ((images, texts), (texts, images)):
        for b, row in enumerate(rows):
            scores = [float(row @ column) / temperature for column in columns]
            normaliser = math.log(sum(math.exp(score) for score in scores))
            right = [c for c, other in enumerate(ids) if other == ids[b]]
            total += sum(normaliser - scores[c] for c in right) / len(right) / len(rows) / 2
    return total


def test_in_batch_itc_against_loops() -> None:
    images, texts = features()
    itc = in_batch_itc(images, texts, torch.tensor(0.07), IDS)
    assert float(itc.loss) == pytest.approx(slow_itc(images, texts, 0.07, IDS.tolist()), rel=1e-5)
    assert torch.allclose(itc.sim_i2t, images @ texts.T / 0.07)
    assert torch.allclose(itc.sim_t2i, itc.sim_i2t.T)
    assert not itc.sim_i2t.requires_grad


def test_hard_targets_share_equally() -> None:
    targets = hard_targets(IDS, torch.cat([IDS, torch.tensor([3, -100])]))
    assert torch.equal(targets.sum(1), torch.ones(6))
    assert torch.equal(targets[0], torch.tensor([0.5, 0, 0.5, 0, 0, 0, 0, 0]))
    assert torch.allclose(targets[1], torch.tensor([0, 1 / 3, 0, 0, 1 / 3, 0, 1 / 3, 0]))
    assert torch.equal(hard_targets(torch.tensor([1]), torch.tensor([2])), torch.zeros(1, 1))


def test_smoothed_targets_and_their_cross_entropy_against_loops() -> None:
    torch.manual_seed(0)
    sim, teacher = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    hard = hard_targets(torch.arange(3), torch.arange(4))
    targets = smoothed_targets(teacher, hard, alpha=0.4)
    assert not targets.requires_grad
    expected = 0.0
    for b in range(3):
        weights = [math.exp(float(value)) for value in teacher[b].detach()]
        normaliser = math.log(sum(math.exp(float(value)) for value in sim[b]))
        for c in range(4):
            target = 0.4 * weights[c] / sum(weights) + 0.6 * (b == c)
            assert float(targets[b, c]) == pytest.approx(target, rel=1e-5)
            expected -= target * (float(sim[b, c]) - normaliser) / 3
    assert float(soft_cross_entropy(sim, targets)) == pytest.approx(expected, rel=1e-5)


def test_queue_similarities_read_the_queue_in_place() -> None:
    rows, current = features()
    queue = F.normalize(torch.randn(5, 9), dim=0)
    sim = queue_similarities(rows.requires_grad_(), current, queue, torch.tensor(0.2))
    assert torch.allclose(sim, rows @ torch.cat([current.T, queue], dim=1) / 0.2, atol=1e-6)
    sim.sum().backward()  # the queue was not written to, so autograd may read it


@pytest.mark.parametrize(("value", "expected"), [(0.07, 0.07), (0.9, 0.5), (-1.0, 0.001)])
def test_temperature_is_clamped_but_keeps_its_gradient(value: float, expected: float) -> None:
    temperature = torch.tensor(value, requires_grad=True)
    clamped = clamped_temperature(temperature)
    assert float(clamped.detach()) == pytest.approx(expected, rel=1e-6)
    (clamped * 3).backward()
    assert float(temperature.grad) == 3  # type: ignore[arg-type]


def test_autocast_does_not_reach_the_similarities() -> None:
    images, texts = features()
    plain = in_batch_itc(images, texts, torch.tensor(0.01), IDS)
    queue = torch.randn(5, 9)
    plain_queue = queue_similarities(images, texts, queue, torch.tensor(0.01))
    with torch.autocast("cpu", torch.bfloat16):
        half = in_batch_itc(images, texts, torch.tensor(0.01), IDS)
        half_queue = queue_similarities(images, texts, queue, torch.tensor(0.01))
    assert torch.equal(plain.loss, half.loss)
    assert torch.equal(plain.sim_i2t, half.sim_i2t)
    assert torch.equal(plain_queue, half_queue)


def test_accuracy_and_count() -> None:
    sim = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    assert float(retrieval_accuracy(sim, torch.eye(2))) == 0.5
    assert float(count_nonfinite(torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]))) == 2


def _global_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(6, 4, generator=generator) for _ in range(2))
    return images, texts, torch.randn(2, 4, 3, generator=generator), IDS  # an id occurs on both ranks


def _gradients(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of both projections and of the temperature for some rows of the problem."""
    images, texts, weights, ids = _global_problem()
    weights = weights.clone().requires_grad_()
    temperature = torch.tensor(0.3, requires_grad=True)
    image_feat, text_feat = F.normalize(images[rows] @ weights[0]), F.normalize(texts[rows] @ weights[1])
    loss = in_batch_itc(image_feat, text_feat, clamped_temperature(temperature), ids[rows]).loss
    loss.backward()
    assert weights.grad is not None
    assert temperature.grad is not None
    return loss.detach(), weights.grad, temperature.grad


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = _gradients(slice(rank * 3, rank * 3 + 3))
    for result in results:  # what DDP and ZeRO do to parameter gradients
        dist.all_reduce(result)
        result /= 2
    if rank == 0:
        torch.save(results, f"{folder}/averaged.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    averaged = torch.load(tmp_path / "averaged.pt", weights_only=True)
    for two, one in zip(averaged, _gradients(slice(None)), strict=True):
        assert torch.allclose(two, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gather", [True, False])
def test_vsc_against_loops(gather: bool) -> None:
    images, texts = features()
    scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    contrast = vsc(images, texts, scale, IDS, gather)
    assert float(contrast.loss.detach()) == pytest.approx(slow_itc(images, texts, 0.07, IDS.tolist()), rel=1e-5)
    assert torch.allclose(contrast.sim_t2i, texts @ images.T / 0.07, atol=1e-5)
    assert torch.allclose(contrast.sim_i2t, contrast.sim_t2i.T)
    contrast.loss.backward()
    step = 1e-2
    up, down = (slow_itc(images, texts, 0.07 * math.exp(-sign * step), IDS.tolist()) for sign in (1, -1))
    assert float(scale.grad) == pytest.approx((up - down) / (2 * step), rel=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("scale", "temperature"), [(math.log(1e5), 0.001), (0.0, 0.5)])
def test_vsc_keeps_the_temperature_in_range(scale: float, temperature: float) -> None:
    images, texts = features()
    bounded = vsc(images, texts, torch.tensor(scale), IDS)
    assert torch.allclose(bounded.sim_i2t, images @ texts.T / temperature, rtol=1e-4)


def test_vsc_of_the_local_batch_calls_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("a collective")

    monkeypatch.setattr(distributed, "gather", refuse)
    monkeypatch.setattr(distributed, "gather_with_grad", refuse)
    images, texts = features()
    vsc(images, texts, torch.tensor(2.0), IDS, gather=False)
    with pytest.raises(AssertionError, match="collective"):
        vsc(images, texts, torch.tensor(2.0), IDS, gather=True)


def test_past_columns_of_the_same_image_are_right_answers() -> None:
    """Without their ids they are wrong ones; an empty column never is right."""
    images, texts = features()
    queue = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=0)
    past = torch.tensor([3, -100, 7, 8])
    given = (images, texts, images, texts, queue, queue, torch.tensor(0.07), IDS)
    unknown, known = cross_alignment(*given, alpha=0.0), cross_alignment(*given, alpha=0.0, queue_ids=past)
    assert not unknown.hard[:, 6:].any()
    assert known.hard[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 0, 0, 0, 1 / 3, 0])
    assert known.hard[3].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert torch.equal(known.hard, queue_targets(IDS, queue, past))
    expected = -(known.hard * known.sim_i2t.log_softmax(1)).sum(1).mean()
    assert torch.allclose(known.i2t, expected)
    none = cross_alignment(*given, alpha=0.0, queue_ids=torch.full((4,), -100))
    assert torch.equal(none.hard, unknown.hard)
