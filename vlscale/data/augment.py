"""RandAugment as the ViT systems' releases use it: ten operations that keep colours, by ALBEF's magnitudes.

They work on the planes of a uint8 image in memory, without a detour through Pillow, and give what Pillow gives: the
tests compare each with its Pillow twin in `vlscale.data.bench`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_MAGNITUDE = 10
GREY = (128, 128, 128)
"""Fills what a geometric operation uncovers."""

Operation = Callable[[np.ndarray, float], np.ndarray]
"""uint8 [3, H, W], C-contiguous, and level in [0, 1], its sign drawn for geometric operations → another such array.

Its argument is never written to; what has nothing to do returns it.
"""

Matrix = tuple[float, float, float, float, float, float]


def rand_augment(image: Tensor, count: int, magnitude: float, generator: np.random.Generator) -> Tensor:
    """uint8 [3, H, W] through `count` drawn operations, each applied with probability ½ at `magnitude` of 10."""
    drawn = generator.integers(len(OPERATIONS), size=count)
    applied = generator.random(count) < 0.5
    signs = np.where(generator.random(count) < 0.5, -1.0, 1.0)
    if not applied.any():
        return image
    pixels = image.contiguous().numpy()
    level = magnitude / MAX_MAGNITUDE
    for index, sign in zip(drawn[applied].tolist(), signs[applied].tolist(), strict=True):
        operation, signed = OPERATIONS[index]
        pixels = operation(pixels, level * sign if signed else level)
    return torch.from_numpy(pixels)


def _enhance(level: float) -> float:
    return level * 1.8 + 0.1


def _autocontrast(pixels: np.ndarray, _: float) -> np.ndarray:
    planes = pixels.reshape(3, -1)
    return _looked_up(pixels, [_stretch(int(plane.min()), int(plane.max())) for plane in planes])


def _stretch(low: int, high: int) -> np.ndarray:
    """The table that maps [low, high] onto [0, 255]."""
    grey = np.arange(256)
    return grey if high <= low else (grey - low) * (255.0 / (high - low))


def _equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    # torch counts bytes as they are; numpy would first make them eight times as long.
    counts = [torch.bincount(plane, minlength=256).numpy() for plane in torch.from_numpy(pixels).reshape(3, -1)]
    return _looked_up(pixels, [_flatten(count) for count in counts])


def _flatten(count: np.ndarray) -> np.ndarray:
    """Pillow's table for a histogram: as many pixels below every grey as in an even one."""
    used = np.flatnonzero(count)
    step = int(count.sum() - count[used[-1]]) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256)
    return (step // 2 + np.cumsum(count) - count) // step


def _brightness(pixels: np.ndarray, level: float) -> np.ndarray:
    return _looked_up(pixels, [np.arange(256) * np.float32(_enhance(level))] * 3)


def _looked_up(pixels: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """Each plane through its table of 256 greys, which are cut to [0, 255] and rounded down."""
    result = np.empty_like(pixels)
    for plane, out, table in zip(pixels, result, tables, strict=True):
        # bytes.translate is the fastest table lookup at hand: numpy and torch want wider indices.
        grey = plane.tobytes().translate(table.clip(0, 255).astype(np.uint8).tobytes())
        out[...] = np.frombuffer(grey, np.uint8).reshape(plane.shape)
    return result


def _sharpness(pixels: np.ndarray, level: float) -> np.ndarray:
    """Away from the smoothed image, a mean of 3 × 3 whose middle weighs 5 of 13; the rim stays."""
    grey = pixels.astype(np.int16)
    columns = grey[:, :-2] + grey[:, 1:-1]
    columns += grey[:, 2:]
    smooth = columns[:, :, :-2] + columns[:, :, 1:-1]
    smooth += columns[:, :, 2:]
    middle = grey[:, 1:-1, 1:-1]
    smooth += middle * 4
    smooth += 6  # division rounds down
    smooth //= 13
    middle -= smooth
    sharp = middle * np.float32(_enhance(level))
    sharp += smooth
    result = pixels.copy()
    result[:, 1:-1, 1:-1] = sharp.clip(0, 255, out=sharp)
    return result


def _shear_x(pixels: np.ndarray, level: float) -> np.ndarray:
    return _affine(pixels, (1, -0.3 * level, 0, 0, 1, 0))


def _shear_y(pixels: np.ndarray, level: float) -> np.ndarray:
    return _affine(pixels, (1, 0, 0, -0.3 * level, 1, 0))


def _translate_x(pixels: np.ndarray, level: float) -> np.ndarray:
    shift = _shift(pixels, level)
    return _moved(pixels, shift) if shift.is_integer() else _affine(pixels, (1, 0, -shift, 0, 1, 0))


def _translate_y(pixels: np.ndarray, level: float) -> np.ndarray:
    shift = _shift(pixels, level)
    if shift.is_integer():
        return _moved(pixels.swapaxes(1, 2), shift).swapaxes(1, 2)
    return _affine(pixels, (1, 0, 0, 0, 1, -shift))


def _shift(pixels: np.ndarray, level: float) -> float:
    """ALBEF's 10 pixels at its 256: the same share of the image at every size."""
    return round(level * 10 * pixels.shape[2] / 256, 6)


def _moved(pixels: np.ndarray, shift: float) -> np.ndarray:
    """By whole pixels to the right; the result lies in memory as `pixels` does."""
    result = np.full_like(pixels, GREY[0])
    right, left = max(int(shift), 0), max(-int(shift), 0)
    width = max(pixels.shape[2] - right - left, 0)
    result[:, :, right : right + width] = pixels[:, :, left : left + width]
    return result


def _rotate(pixels: np.ndarray, level: float) -> np.ndarray:
    """By 30° at most about the centre, where ALBEF's OpenCV puts it: (w/2, h/2) counted from a pixel's centre."""
    cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    x, y = pixels.shape[2] / 2, pixels.shape[1] / 2
    return _affine(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _affine(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Output pixel (x, y) shows input (a·x + b·y + c, d·x + e·y + f), the origin in the upper left pixel's centre."""
    grid, outside = _grid(pixels.shape[1], pixels.shape[2], matrix)
    image = torch.from_numpy(pixels)[None].float()
    # The rim repeats outwards, and what lies wholly outside is grey: as Pillow does it.
    moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return moved.add_(0.5).to(torch.uint8).masked_fill_(outside, GREY[0]).numpy()


@lru_cache(maxsize=16)
def _grid(height: int, width: int, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Where each pixel comes from, in units of `grid_sample` [1, H, W, 2], and whether that is outside [H, W].

    A run's magnitude is fixed: with both signs there are ten at most, half a megabyte each at 256 pixels.
    """
    a, b, c, d, e, f = matrix
    x = torch.arange(width, dtype=torch.float64) + 0.5  # [W], from the upper left corner
    y = torch.arange(height, dtype=torch.float64)[:, None] + 0.5  # [H, 1]
    u = a * x + b * y + (c + 0.5 - 0.5 * (a + b))
    v = d * x + e * y + (f + 0.5 - 0.5 * (d + e))
    outside = (u < 0) | (u >= width) | (v < 0) | (v >= height)
    return torch.stack([2 * u / width - 1, 2 * v / height - 1], dim=-1)[None].float(), outside


OPERATIONS: tuple[tuple[Operation, bool], ...] = (
    (lambda pixels, _: pixels, False),
    (_autocontrast, False),
    (_equalize, False),
    (_brightness, False),
    (_sharpness, False),
    (_shear_x, True),
    (_shear_y, True),
    (_translate_x, True),
    (_translate_y, True),
    (_rotate, True),
)
"""Each with whether its level has a sign."""
