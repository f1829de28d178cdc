"""SOHO's neck: from the backbone's last feature map to visual tokens (section 3.1 to 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.codebooks.dictionary import VisualDictionary
from vlscale.config import Dictionary, Neck
from vlscale.errors import UserError
from vlscale.nn.sine import check_width, sine_positions

NORM_EPS = 1e-5
"""Of the LayerNorm over the tokens."""


class NeckStates(NamedTuple):
    """Cells of the feature maps, row by row."""

    embeds: Tensor
    """[M, N, D]: before mask embedding, positions and LayerNorm."""
    features: Tensor
    """[M, N, D]: what the dictionary quantises."""
    indices: Tensor | None
    """[M, N] int64; None where nothing was quantised."""


class VisualNeck(nn.Module):
    """2 × 2 pooling, 1 × 1 convolution to the transformer's width, visual dictionary.

    Kind `code` (paper): convolution, pooling, and the code instead of the feature. Kinds `sum` and `gated` (release):
    pooling, convolution, BatchNorm `norm`, and a linear map of the code, added to the feature or mixed with it by a
    softmax gate (with BatchNorm `gate_norm`). Both BatchNorms are plain `nn.BatchNorm2d`, which
    `nn.SyncBatchNorm.convert_sync_batchnorm` replaces where several GPUs share a batch.
    """

    def __init__(self, neck: Neck, dictionary: Dictionary, in_channels: int, width: int) -> None:
        """
        Args:
            in_channels: of the feature map.
            width: D, a multiple of 4.

        Raises:
            UserError: the width has no sine positions, or the dictionary can't learn.
        """
        super().__init__()
        check_width(width)
        self.kind = neck.kind
        self.width = width
        paper = neck.kind == "code"
        self.conv = nn.Conv2d(in_channels, width, 1, bias=paper)
        self.norm = nn.Identity() if paper else nn.BatchNorm2d(width)
        self.dictionary = VisualDictionary(dictionary, width) if dictionary.use else None
        if self.dictionary is not None and not paper:
            self.code_proj = nn.Linear(width, width)
            if neck.kind == "gated":
                self.gate = nn.Conv2d(2 * width, 2, 1, bias=False)
                self.gate_norm = nn.BatchNorm2d(2)
        self.mask_embed = nn.Parameter(torch.randn(width))  # of the codes' scale at the start
        self.out_norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, feature_map: Tensor, valid: Tensor, quantise: bool = True) -> NeckStates:
        """Cells of the feature maps, and their codes.

        Args:
            feature_map: [M, C, h2, w2] with `cell_size(h2, w2)` = (h, w) and N = h · w.
            valid: [M, h, w] bool, false where a cell is padding.
            quantise: false leaves the dictionary out, as fine-tuning does (section 4.2): the features are the
                embeddings. So it is without a dictionary.

        Raises:
            UserError: the map is too small for one cell.
        """
        cell_size(*feature_map.shape[2:])
        maps = self._features(feature_map)  # [M, D, h, w]
        features = maps.flatten(2).transpose(1, 2)  # [M, N, D]
        if self.dictionary is None or not quantise:
            return NeckStates(features, features, None)
        values, indices = self.dictionary(features, valid.flatten(1))
        return NeckStates(self._embed(values, features, maps), features, indices)

    def tokens(self, embeds: Tensor, valid: Tensor, mask: Tensor | None) -> Tensor:
        """Mask embedding in the masked cells, sine positions, LayerNorm.

        Args:
            embeds: [M, N, D], see `NeckStates`.
            valid: [M, h, w] bool.
            mask: [M, N] bool, true = to be predicted; None masks nothing.

        Returns:
            [M, N, D].
        """
        if mask is not None:
            embeds = torch.where(mask[..., None], self.mask_embed.to(embeds.dtype), embeds)
        placed = embeds + sine_positions(valid, self.width)
        return self.out_norm(placed.to(self.out_norm.weight.dtype))

    def _features(self, feature_map: Tensor) -> Tensor:
        if self.kind == "code":
            return F.max_pool2d(self.conv(feature_map), 2)
        return self.norm(self.conv(F.max_pool2d(feature_map, 2)))

    def _embed(self, values: Tensor, features: Tensor, maps: Tensor) -> Tensor:
        """Codes [M, N, D], features [M, N, D] and the same as maps [M, D, h, w] → [M, N, D]."""
        if self.kind == "code":
            return values
        codes = self.code_proj(values)
        if self.kind == "sum":
            return codes + features
        code_maps = codes.transpose(1, 2).unflatten(2, maps.shape[2:])
        logits = self.gate_norm(self.gate(torch.cat([code_maps.to(maps.dtype), maps], dim=1)))  # [M, 2, h, w]
        shares = logits.flatten(2).softmax(1, dtype=torch.float32)[..., None]  # [M, 2, N, 1]
        return shares[:, 0] * codes + shares[:, 1] * features


def cell_size(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of cells that a feature map of this size gives: half as many, rounded down.

    Raises:
        UserError: there would be none.
    """
    if rows < 2 or columns < 2:
        raise UserError(
            f"data.aspect: a feature map of {rows} x {columns} gives no 2 x 2 cell: images must be larger "
            "(64 pixels a side for a ResNet)"
        )
    return rows // 2, columns // 2


def valid_cells(
    image_sizes: Tensor | None,
    canvas: tuple[int, int],
    grid: tuple[int, int],
    square: bool,
    count: int,
    device: torch.device,
) -> Tensor:
    """Which cells show the image and not its padding: nearest-neighbour resize of the mask of pixels to the grid.

    A cell is valid where the one pixel is that the resize picks for it, the upper left of its area.

    Args:
        image_sizes: [I, 2] int64, height and width of what is not padding; None: images fill the canvas.
        canvas: height and width of the padded images.
        grid: rows h and columns w of cells.
        square: take the canvas's height for both of its sides, as the release does: then the mask of a canvas that is
            not square is distorted.
        count: number of images I.
        device: of the result.

    Returns:
        [I, h, w] bool.
    """
    sides = (canvas[0], canvas[0]) if square else canvas
    if image_sizes is None:
        image_sizes = torch.tensor([canvas], device=device).expand(count, 2)
    rows, columns = (_picked(side, cells, device) for side, cells in zip(sides, grid, strict=True))
    return (rows < image_sizes[:, :1])[:, :, None] & (columns < image_sizes[:, 1:])[:, None, :]


def _picked(side: int, cells: int, device: torch.device) -> Tensor:
    """[cells]: the pixel of each cell, in the float32 arithmetic of `interpolate(mode="nearest")`."""
    start = torch.arange(cells, device=device, dtype=torch.float32) * (side / cells)
    return start.floor().clamp(max=side - 1)
