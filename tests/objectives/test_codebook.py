"""CB-ViLA's eq. 3 and 4 and its masks against slow re-computations."""

import pytest
import torch

from vlscale.errors import UserError
from vlscale.objectives import patches
from vlscale.objectives.codebook import codebook_loss
from vlscale.objectives.reconstruction import gumbel_noise, mim_loss, normalize_patches, pixel_loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_codebook_loss_is_eq_3(reduction: str) -> None:
    features, codes = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    beta = 0.25
    loss = codebook_loss(features, codes, beta, reduction)
    total = 0.0
    for v, c in zip(features.tolist(), codes.tolist(), strict=True):
        squared = sum((a - b) ** 2 for a, b in zip(v, c, strict=True)) / (4 if reduction == "mean" else 1)
        total += squared + beta * squared
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    loss.backward()
    scale = 2 / 5 / (4 if reduction == "mean" else 1)
    torch.testing.assert_close(codes.grad, scale * (codes - features).detach())
    torch.testing.assert_close(features.grad, beta * scale * (features - codes).detach())


@pytest.mark.parametrize(
    ("grid", "ratio", "block", "masked"), [((16, 16), 0.75, 1, 192), ((8, 8), 0.75, 2, 48), ((2, 3), 0.5, 1, 3)]
)
def test_exactly_the_ratio_is_masked_in_every_image(
    grid: tuple[int, int], ratio: float, block: int, masked: int
) -> None:
    mask = patches.draw_patch_mask(20, grid, ratio, block, torch.Generator().manual_seed(0))
    assert mask.shape == (20, grid[0] * grid[1])
    assert mask.sum(1).tolist() == [masked] * 20
    assert patches.masked_cells(grid, ratio, block) == masked
    assert len({tuple(row) for row in mask.tolist()}) > 1
    if block > 1:
        squares = mask.view(20, grid[0] // block, block, grid[1] // block, block)
        assert torch.equal(squares.amax((2, 4)), squares.amin((2, 4)))


def test_impossible_masks_are_refused() -> None:
    with pytest.raises(UserError, match=r"system\.mim\.ratio"):
        patches.masked_cells((4, 4), 1.0)
    with pytest.raises(UserError, match=r"system\.mim\.block"):
        patches.masked_cells((5, 4), 0.5, 2)


def test_cells_are_split_taken_and_put_back() -> None:
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    visible, masked = patches.split_cells(mask, 2)
    assert visible.tolist() == [[1, 2], [0, 3]]
    assert masked.tolist() == [[0, 3], [1, 2]]
    states = torch.randn(2, 4, 3)
    assert torch.equal(patches.take_cells(states, masked)[1, 0], states[1, 1])
    whole = patches.put_cells(torch.zeros(2, 4, 3), visible, patches.take_cells(states, visible))
    assert torch.equal(whole, states.masked_fill(mask[:, :, None], 0))


def test_patchify_keeps_rows_of_cells_and_comes_back() -> None:
    images = torch.randn(2, 3, 6, 4)
    cells = patches.patchify(images, 2)
    assert cells.shape == (2, 6, 12)
    torch.testing.assert_close(cells[1, 3], images[1, :, 2:4, 2:4].flatten())
    assert torch.equal(patches.unpatchify(cells, (3, 2), 2), images)


def test_normalised_patches_are_mae_s() -> None:
    cells = 3 + 5 * torch.randn(2, 4, 48)
    values, mean, deviation = normalize_patches(cells)
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(values * deviation + mean, cells)


def test_mim_and_pixel_losses_are_means_over_masked_cells() -> None:
    logits, codes = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    slow = -sum(logits[b, m].softmax(0)[codes[b, m]].log() for b in range(2) for m in range(3)) / 6
    torch.testing.assert_close(mim_loss(logits, codes), slow)
    predicted, target = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    torch.testing.assert_close(pixel_loss(predicted, target), ((predicted - target) ** 2).sum() / 72)


def test_gumbel_noise_has_its_distribution() -> None:
    noise = gumbel_noise(400, 500, torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
