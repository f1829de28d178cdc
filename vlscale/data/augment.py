"""RandAugment as the ViT systems' releases use it: ten operations that keep colours, by ALBEF's magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

MAX_MAGNITUDE = 10
GREY = (128, 128, 128)
"""Fills what a geometric operation uncovers."""

Operation = Callable[[Image.Image, float], Image.Image]
"""Image and level in [0, 1], its sign drawn for geometric operations → image of the same size."""


def rand_augment(image: Tensor, count: int, magnitude: float, generator: np.random.Generator) -> Tensor:
    """uint8 [3, H, W] through `count` drawn operations, each applied with probability ½ at `magnitude` of 10."""
    drawn = generator.integers(len(OPERATIONS), size=count)
    applied = generator.random(count) < 0.5
    signs = np.where(generator.random(count) < 0.5, -1.0, 1.0)
    if not applied.any():
        return image
    pillow = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for index, sign in zip(drawn[applied], signs[applied], strict=True):
        operation, signed = OPERATIONS[index]
        level = magnitude / MAX_MAGNITUDE
        pillow = operation(pillow, level * sign if signed else level)
    return torch.from_numpy(np.array(pillow)).permute(2, 0, 1)


def _enhance(level: float) -> float:
    return level * 1.8 + 0.1


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Output pixel (x, y) shows input (a·x + b·y + c, d·x + e·y + f), the origin in the upper left pixel's centre."""
    a, b, c, d, e, f = matrix
    # Pillow puts the origin at the upper left corner and samples at pixel centres.
    corner = (a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e))
    return image.transform(
        image.size, Image.Transform.AFFINE, corner, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, -0.3 * level, 0, 0, 1, 0))


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, -0.3 * level, 1, 0))


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, -_shift(image, level), 0, 1, 0))


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, -_shift(image, level)))


def _shift(image: Image.Image, level: float) -> float:
    """ALBEF's 10 pixels at its 256: the same share of the image at every size."""
    return level * 10 * image.width / 256


def _rotate(image: Image.Image, level: float) -> Image.Image:
    """By 30° at most about the centre, where ALBEF's OpenCV puts it: (w/2, h/2) counted from a pixel's centre."""
    cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    x, y = image.width / 2, image.height / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


OPERATIONS: tuple[tuple[Operation, bool], ...] = (
    (lambda image, _: image, False),
    (lambda image, _: ImageOps.autocontrast(image), False),
    (lambda image, _: ImageOps.equalize(image), False),
    (lambda image, level: ImageEnhance.Brightness(image).enhance(_enhance(level)), False),
    (lambda image, level: ImageEnhance.Sharpness(image).enhance(_enhance(level)), False),
    (_shear_x, True),
    (_shear_y, True),
    (_translate_x, True),
    (_translate_y, True),
    (_rotate, True),
)
"""Each with whether its level has a sign."""
