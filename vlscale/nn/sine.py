"""2-D sine positions of the cells of an image that ends in padding (SOHO, section 3.3; DETR, Carion et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlscale.errors import UserError

LONGEST = 10000.0
"""Base of the geometric series of wavelengths."""
EPSILON = 1e-6


def check_width(width: int) -> None:
    """Half of the width is for rows, half for columns, each in pairs of sine and cosine.

    Raises:
        UserError: the width is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"system.text.width: {width} has no 2-D sine positions: use a multiple of 4")


def sine_positions(valid: Tensor, width: int) -> Tensor:
    """Sines and cosines of every cell's place among the valid cells of its column and of its row, as shares of 2π.

    More padding, right or below, doesn't change what valid cells get.

    Args:
        valid: [M, h, w] bool.
        width: of the result, a multiple of 4.

    Returns:
        [M, h · w, width] float32, cells row by row: first half from the row, second from the column; in each, sine and
        cosine of one frequency stand side by side.
    """
    check_width(width)
    half = width // 2
    pairs = torch.arange(0, half, 2, device=valid.device, dtype=torch.float32)
    wavelengths = LONGEST ** (pairs / half)  # [half / 2]
    parts = [_waves(valid, dim, wavelengths) for dim in (1, 2)]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def _waves(valid: Tensor, dim: int, wavelengths: Tensor) -> Tensor:
    """Along one dimension of [M, h, w]; [M, h, w, half]."""
    place = valid.long().cumsum(dim).float()
    last = place.narrow(dim, place.shape[dim] - 1, 1)
    angles = (place / (last + EPSILON) * (2 * math.pi))[..., None] / wavelengths
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
