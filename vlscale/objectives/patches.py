"""Images as rows of patches, and which of them are masked (MAE, He et al. 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlscale.errors import UserError


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] → [B, N, 3·p²], cells row by row."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    cells = images.reshape(batch, channels, rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[B, N, 3·p²] → [B, 3, H, W]; undoes `patchify`."""
    batch = patches.shape[0]
    cells = patches.reshape(batch, *grid, 3, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid[0] * patch, grid[1] * patch)


def masked_cells(grid: tuple[int, int], ratio: float, block: int = 1) -> int:
    """How many cells of a grid are masked: exactly the ratio's share of its blocks.

    Raises:
        UserError: the blocks do not tile the grid, or the ratio leaves nothing masked or nothing visible.
    """
    rows, columns = grid
    if rows % block or columns % block:
        raise UserError(f"system.mim.block: blocks of {block} do not tile a grid of {rows} x {columns} patches")
    blocks = (rows // block) * (columns // block)
    masked = round(ratio * blocks)
    if not 0 < masked < blocks:
        raise UserError(
            f"system.mim.ratio: {ratio} masks {masked} of {blocks} blocks; some must be masked, some visible"
        )
    return masked * block * block


def draw_patch_mask(
    batch: int, grid: tuple[int, int], ratio: float, block: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """[B, N] bool on the CPU, true = masked: in every image exactly the ratio's share, drawn anew per image."""
    rows, columns = grid[0] // block, grid[1] // block
    masked = masked_cells(grid, ratio, block) // (block * block)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
    mask = (order < masked).view(batch, rows, columns)
    return mask.repeat_interleave(block, 1).repeat_interleave(block, 2).flatten(1)


def split_cells(mask: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Indices of visible [B, N − masked] and masked [B, masked] cells, in shapes known without asking the device."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    visible = mask.shape[1] - masked
    return order[:, :visible], order[:, visible:]


def take_cells(states: Tensor, index: Tensor) -> Tensor:
    """states [B, N, D], index [B, M] → [B, M, D]."""
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))


def put_cells(states: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of states [B, N, D] with values [B, M, D] at index [B, M]; gradient flows to both."""
    return states.scatter(1, index[:, :, None].expand(-1, -1, states.shape[2]), values)
