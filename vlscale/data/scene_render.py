"""Pixels of a scene: backdrop, shadows, things back to front, light and grain."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlscale.data.scene_backdrops import PLATE, PLATES, plate
from vlscale.data.scene_shapes import REACH, Template, template
from vlscale.data.scene_world import COLOURS, Scene, Thing

SIDE = 80
"""Side of a scene in pixels: a little more than the 64 that the tiny recipes train at, which leaves room for crops."""

_SECOND = {"white": (118, 124, 142), "yellow": (70, 58, 48), "black": (148, 148, 158)}
"""Second colour of a pattern where it is not white: a white and a black checkered thing must not look the same."""

Box = tuple[float, float, float, float]
Pixels = NDArray[np.float32]


class Rendered(NamedTuple):
    """A picture and, per thing in drawing order, the box of what is in sight and the share in sight."""

    image: Image.Image
    boxes: tuple[Box, ...]
    visible: tuple[float, ...]


class _Layer(NamedTuple):
    window: tuple[slice, slice]
    bands: Pixels  # [4, h, w], 0…1: pattern, shade, gloss, alpha
    shadow: Pixels  # [h, w], 0…1


def render(scene: Scene, rng: np.random.Generator) -> Rendered:
    """Paint a scene. `rng` decides what no caption mentions: the backdrop's window, light, hue and grain."""
    canvas = _backdrop(scene.background, rng)  # [3, SIDE, SIDE]
    covers = []
    for thing in scene.things:
        layer = _layer(thing, template(thing.shape, thing.texture, thing.size))
        _paste(canvas, thing, layer, rng)
        alpha = np.zeros((SIDE, SIDE), dtype=np.float32)
        alpha[layer.window] = layer.bands[3]
        covers.append(alpha > 0.5)
    canvas *= _illumination(rng)
    canvas += 2.0 * rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    return Rendered(image, *_sight(covers))


def _backdrop(background: str, rng: np.random.Generator) -> Pixels:
    """A window of one of the background's plates, perhaps mirrored, slightly recoloured: [3, SIDE, SIDE] float32."""
    source = plate(background, int(rng.integers(PLATES)))
    top, left = rng.integers(0, PLATE - SIDE + 1, 2)
    window = source[:, top : top + SIDE, left : left + SIDE]
    if rng.random() < 0.5:
        window = window[:, :, ::-1]
    return window * rng.uniform(0.94, 1.06, (3, 1, 1)).astype(np.float32)


def _layer(thing: Thing, art: Template) -> _Layer:
    """The template turned, scaled and moved to its place, cut to the canvas."""
    half = 0.5 * thing.extent * SIDE
    x, y = thing.x * SIDE, thing.y * SIDE
    reach = REACH * half * 1.25  # room for the turned corners and the shadow
    left, top = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
    right, bottom = min(SIDE, math.ceil(x + reach)), min(SIDE, math.ceil(y + reach))
    size = (right - left, bottom - top)
    turn = math.radians(thing.angle)
    zoom = art.bands.width / (2 * REACH * half)  # template pixels per canvas pixel
    flip = -1.0 if thing.mirrored else 1.0
    a, b = zoom * math.cos(turn) * flip, zoom * math.sin(turn) * flip
    d, e = -zoom * math.sin(turn), zoom * math.cos(turn)
    centre = art.bands.width / 2

    def mapped(source: Image.Image, dx: float, dy: float) -> Pixels:
        ox, oy = left - x - dx, top - y - dy
        matrix = (a, b, centre + a * ox + b * oy, d, e, centre + d * ox + e * oy)
        out = source.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        planes = [out] if out.mode == "L" else out.split()
        return np.stack([np.asarray(plane) for plane in planes]).astype(np.float32) * np.float32(1 / 255)

    window = (slice(top, bottom), slice(left, right))
    return _Layer(window, mapped(art.bands, 0, 0), mapped(art.shadow, 0.16 * half, 0.2 * half)[0])


def _paste(canvas: Pixels, thing: Thing, layer: _Layer, rng: np.random.Generator) -> None:
    """Lay the thing's shadow and then the thing onto the canvas, in place."""
    base = np.asarray(COLOURS[thing.colour], dtype=np.float32) + rng.uniform(-7, 7, 3).astype(np.float32)
    second = np.asarray(_SECOND.get(thing.colour, (250, 248, 242)), dtype=np.float32)
    under = canvas[:, *layer.window]  # [3, h, w], a view
    under *= 1 - 0.5 * layer.shadow
    pattern, shade, gloss, alpha = layer.bands
    paint = (base[:, None, None] + (second - base)[:, None, None] * pattern) * (1.4 * shade)
    paint += (255 - paint) * gloss
    under += (np.minimum(paint, 255) - under) * alpha


def _illumination(rng: np.random.Generator) -> Pixels:
    """[SIDE, SIDE] factors around 1: a weak gradient across the picture in a random direction."""
    turn, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.14)
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    slope = np.float32(math.cos(turn)) * axis[None, :] + np.float32(math.sin(turn)) * axis[:, None]
    return np.float32(rng.uniform(0.95, 1.05)) + np.float32(strength) * slope


def _sight(covers: list[NDArray[np.bool_]]) -> tuple[tuple[Box, ...], tuple[float, ...]]:
    """Boxes (shares of the side) and visible shares of the things, given what each covers in drawing order."""
    boxes, shares = [], []
    free = np.ones((SIDE, SIDE), dtype=bool)
    for cover in reversed(covers):
        seen = cover & free
        free &= ~cover
        columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
        x1, x2 = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        y1, y2 = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        boxes.append((x1 / SIDE, y1 / SIDE, x2 / SIDE, y2 / SIDE))
        shares.append(float(seen.sum() / max(1, cover.sum())))
    return tuple(reversed(boxes)), tuple(reversed(shares))
