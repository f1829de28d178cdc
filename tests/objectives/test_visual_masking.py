"""Masked visual modelling against slow re-computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vlscale.objectives.masking import IGNORED
from vlscale.objectives.visual_masking import MaskedCells, cosine_logits, mask_cell, mask_index, mvm_loss

K = 5


def cells(images: int = 50, count: int = 12) -> tuple[Tensor, Tensor]:
    """Indices and valid cells; the last image has none."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(images, count, generator=generator) < 0.7
    valid[-1] = False
    return torch.randint(K, (images, count), generator=generator), valid


def check_whole_groups(masked: MaskedCells, indices: Tensor, valid: Tensor) -> None:
    """Per image nothing, or every valid cell of one index and no other cell."""
    assert masked.labels.dtype == torch.int64
    assert torch.equal(masked.labels, torch.where(masked.mask, indices, IGNORED))
    for mask, row, there in zip(masked.mask, indices, valid, strict=True):
        names = set(row[mask].tolist())
        assert len(names) <= 1
        for name in names:
            assert torch.equal(mask, there & (row == name))


def test_an_index_is_masked_wherever_it_is() -> None:
    indices, valid = cells()
    masked = mask_index(indices, valid, torch.Generator().manual_seed(3))
    check_whole_groups(masked, indices, valid)
    assert torch.equal(masked.mask.any(1), valid.any(1)), "one index per image, none where all is padding"
    again = mask_index(indices, valid, torch.Generator().manual_seed(3))
    assert torch.equal(again.mask, masked.mask)


def test_existing_indices_are_drawn_evenly() -> None:
    row = torch.tensor([3, 3, 3, 1, 3, 3, 0, 3, 4, 4])
    valid = torch.ones(10, dtype=torch.bool)
    valid[-2:] = False  # index 4 occurs in padding only
    images = 3000
    masked = mask_index(row.repeat(images, 1), valid.repeat(images, 1), torch.Generator().manual_seed(0))
    chosen = masked.labels.max(1).values.bincount(minlength=K) / images
    torch.testing.assert_close(chosen, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]), atol=0.04, rtol=0)


def test_one_position_for_the_batch() -> None:
    indices, valid = cells()
    position, coins = torch.tensor([4]), torch.arange(50) % 2
    masked = mask_cell(indices, valid, 0.5, position=position, coins=coins)
    check_whole_groups(masked, indices, valid)
    assert torch.equal(masked.mask.any(1), coins.bool() & valid[:, 4])
    assert torch.equal(masked.labels[:, 4], torch.where(coins.bool() & valid[:, 4], indices[:, 4], IGNORED))


def test_drawn_positions_and_coins_have_the_asked_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.arange(12).repeat(400, 1)  # every cell its own index: what is masked is the position
    valid = torch.ones_like(indices, dtype=torch.bool)
    positions = set()
    for _ in range(60):
        masked = mask_cell(indices, valid, 0.3, generator)
        check_whole_groups(masked, indices, valid)
        (position,) = masked.labels[masked.mask].unique().tolist()
        positions.add(position)
        assert float(masked.mask.any(1).float().mean()) == pytest.approx(0.3, abs=0.1)
    assert positions == set(range(12))
    assert not mask_cell(indices, valid, 0.0, generator).mask.any()


def test_loss_is_a_mean_over_masked_cells() -> None:
    logits = torch.randn(20, K, requires_grad=True)
    labels = torch.randint(K, (20,)).masked_fill(torch.arange(20) % 3 > 0, IGNORED)
    slow = torch.stack([F.cross_entropy(logits[i], labels[i]) for i in range(20) if labels[i] != IGNORED]).mean()
    torch.testing.assert_close(mvm_loss(logits, labels), slow)
    nothing = mvm_loss(logits, torch.full((20,), IGNORED))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_cosines_in_full_precision_without_gradient_to_the_codes() -> None:
    states, codes = torch.randn(2, 3, 8).bfloat16().requires_grad_(), torch.randn(K, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = cosine_logits(states, codes)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.cosine_similarity(states.float()[:, :, None], codes, dim=-1))
    logits.sum().backward()
    assert states.grad is not None
    assert codes.grad is None
    assert not cosine_logits(states, torch.zeros(K, 8)).any()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_it_keeps_to_the_gpu() -> None:
    """Mixed devices and questions to the device raise under fake tensors; the draws come from the CPU."""
    generator = torch.Generator().manual_seed(0)
    with FakeTensorMode():
        indices = torch.empty(4, 6, dtype=torch.int64, device="cuda")
        valid = torch.empty(4, 6, dtype=torch.bool, device="cuda")
        found = [mask_index(indices, valid, generator), mask_cell(indices, valid, 0.5, generator)]
        logits = cosine_logits(torch.empty(4, 6, 8, device="cuda"), torch.empty(K, 8, device="cuda"))
        loss = mvm_loss(logits.flatten(0, 1), found[0].labels.flatten())
        assert {tensor.device.type for masked in found for tensor in masked} == {"cuda"}
        assert loss.device.type == "cuda"
