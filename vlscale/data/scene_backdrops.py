"""The dozen backgrounds of the embedded scenes: a few large plates each, painted once, cropped per scene."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

PLATE = 128
"""Side of a plate in pixels; scenes take a window of it."""
PLATES = 5
"""Different plates of each background."""

Plane = NDArray[np.float64]


@cache
def plate(background: str, variant: int) -> NDArray[np.float32]:
    """[3, PLATE, PLATE] float32, 0…255: one painting of the background; the same in every process."""
    names = list(_PAINTERS)
    rng = np.random.default_rng([77, names.index(background), variant])
    image = np.clip(_PAINTERS[background](rng), 0, 255).astype(np.float32)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _grid() -> tuple[Plane, Plane]:
    axis = np.arange(PLATE, dtype=float)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _cloud(rng: np.random.Generator, sigma: float | tuple[float, float]) -> Plane:
    """Smooth noise with mean 0 and deviation 1, tileable; sigma in pixels (rows, columns)."""
    field = ndimage.gaussian_filter(rng.standard_normal((PLATE, PLATE)), sigma, mode="wrap")
    return (field - field.mean()) / field.std()


def _paint(base: tuple[float, float, float], light: Plane) -> Plane:
    """A colour [3] times (1 + light [H, W])."""
    return np.asarray(base, dtype=float) * (1 + light)[..., None]


def _mix(first: Plane, second: Plane | tuple[float, float, float], share: Plane) -> Plane:
    share = np.clip(share, 0, 1)[..., None]
    return first * (1 - share) + np.asarray(second, dtype=float) * share


def _grass(rng: np.random.Generator) -> Plane:
    blades = _cloud(rng, (2.6, 0.7))
    image = _paint((118, 168, 62), 0.16 * blades + 0.07 * _cloud(rng, 9))
    return _mix(image, (196, 214, 92), (blades - 1.3) * 0.8)


def _sand(rng: np.random.Generator) -> Plane:
    x, y = _grid()
    ripple = np.sin(2 * math.pi * (y / 13 + 0.35 * np.sin(x / 19) + 0.25 * _cloud(rng, 14)))
    return _paint((226, 200, 150), 0.055 * ripple + 0.035 * _cloud(rng, 0.6))


def _water(rng: np.random.Generator) -> Plane:
    waves = _cloud(rng, (1.7, 6.0))
    image = _paint((56, 128, 178), 0.14 * waves + 0.05 * _cloud(rng, 12))
    return _mix(image, (205, 232, 240), (waves - 1.2) * 0.9)


def _wood(rng: np.random.Generator) -> Plane:
    x, y = _grid()
    board = (y // 21).astype(int) + 3
    tone = rng.uniform(-0.12, 0.12, 12)[board]
    shift = rng.uniform(0, PLATE, 12)[board]
    grain = np.sin(2 * math.pi * ((y % 21) / 5.2 + 0.8 * np.sin((x + shift) / 24)) + 0.6 * _cloud(rng, (1.0, 12)))
    image = _paint((158, 106, 62), tone + 0.09 * grain)
    return _mix(image, (66, 40, 22), np.where(y % 21 < 1.4, 0.85, 0.0))


def _brick(rng: np.random.Generator) -> Plane:
    x, y = _grid()
    row = (y // 11).astype(int)
    column = ((x + 11 * (row % 2)) // 22).astype(int)
    tone = rng.uniform(-0.16, 0.16, (13, 8))[row, column]
    image = _paint((166, 84, 64), tone + 0.07 * _cloud(rng, 0.8))
    joint = (y % 11 < 1.9) | ((x + 11 * (row % 2)) % 22 < 1.9)
    return _mix(image, (206, 196, 184), np.where(joint, 0.9, 0.0))


def _snow(rng: np.random.Generator) -> Plane:
    hills = _cloud(rng, (5, 11))
    image = _paint((232, 238, 247), 0.035 * hills + 0.015 * _cloud(rng, 0.6))
    return _mix(image, (176, 200, 232), 0.45 * np.clip(-hills - 0.3, 0, 1))


def _night(rng: np.random.Generator) -> Plane:
    _, y = _grid()
    image = _paint((26, 30, 74), 0.5 * (y / PLATE - 0.5) + 0.18 * _cloud(rng, 14))
    sparks = ndimage.gaussian_filter((rng.random((PLATE, PLATE)) > 0.992).astype(float), 0.75)
    return image + np.asarray((250.0, 245.0, 215.0)) * np.clip(sparks * 3.2, 0, 1)[..., None]


def _clouds(rng: np.random.Generator) -> Plane:
    puffs = _cloud(rng, (6, 11)) + 0.35 * _cloud(rng, 2.5)
    image = _paint((122, 178, 236), 0.03 * _cloud(rng, 16))
    return _mix(image, (248, 250, 253), (puffs - 0.15) * 0.9)


def _stone(rng: np.random.Generator) -> Plane:
    points = rng.uniform(0, PLATE, (46, 2))
    wrapped = np.concatenate([points + np.array(shift) for shift in product((-PLATE, 0, PLATE), repeat=2)])
    x, y = _grid()
    squares = (x[..., None] - wrapped[:, 0]) ** 2 + (y[..., None] - wrapped[:, 1]) ** 2
    nearest = np.sqrt(np.partition(squares, 1, axis=-1)[..., :2])
    tone = rng.uniform(-0.14, 0.14, len(wrapped))[squares.argmin(axis=-1)]
    image = _paint((150, 150, 146), tone + 0.05 * _cloud(rng, 0.9))
    return _mix(image, (78, 78, 76), (2.2 - (nearest[..., 1] - nearest[..., 0])) / 1.6)


def _sunset(rng: np.random.Generator) -> Plane:
    _, y = _grid()
    height = np.clip((y - 20) / (PLATE - 40), 0, 1)
    low, high = np.asarray((255.0, 186.0, 98.0)), np.asarray((146.0, 84.0, 140.0))
    image = high * (1 - height[..., None]) + low * height[..., None]
    bands = _cloud(rng, (2.6, 22))
    return _mix(image, (236, 120, 104), (bands - 0.3) * 0.6)


def _tiles(rng: np.random.Generator) -> Plane:
    x, y = _grid()
    tone = rng.uniform(-0.05, 0.05, (9, 9))[(y // 16).astype(int), (x // 16).astype(int)]
    sheen = 0.05 * (1 - (x % 16 + y % 16) / 16)
    image = _paint((206, 228, 220), tone + sheen)
    return _mix(image, (92, 140, 138), np.where((x % 16 < 1.7) | (y % 16 < 1.7), 0.9, 0.0))


def _curtain(rng: np.random.Generator) -> Plane:
    x, y = _grid()
    folds = np.sin(2 * math.pi * (x / 16 + 0.25 * np.sin(y / 60 + rng.uniform(0, 6)) + 0.12 * _cloud(rng, (30, 9))))
    return _paint((104, 40, 66), 0.42 * folds + 0.04 * _cloud(rng, 0.7))


_PAINTERS: dict[str, Callable[[np.random.Generator], Plane]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "wood": _wood,
    "brick": _brick,
    "snow": _snow,
    "night": _night,
    "clouds": _clouds,
    "stone": _stone,
    "sunset": _sunset,
    "tiles": _tiles,
    "curtain": _curtain,
}
