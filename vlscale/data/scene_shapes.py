"""Templates of the things: silhouette, shading, gloss and pattern of each shape, drawn once per process.

A template is square and covers [-1.25, 1.25]² in units of half the thing's extent (v points down). Things are then
pasted by an affine map of the template, which is what makes a scene cost milliseconds.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

REACH = 1.25
"""Half the side of a template in units of half the thing's extent."""
TEMPLATE_SIDE = {"small": 48, "large": 84}
"""Pixels of a template's side: slightly above the size it is shown at, so that the affine map needs no filter."""
RING_HOLE = 0.6
"""Radius of a ring's hole as a share of its outer radius; what is inside a ring has to fit."""
_DRAWN = 168
"""Side at which templates are drawn before they are reduced."""
_LIGHT = np.array([-0.48, -0.62, 0.62])
"""Direction to the light: from the upper left, towards the viewer."""

COVER_SIDE = 24
"""Side of the coarse masks that tell how much of a thing another one hides."""

Plane = NDArray[np.float64]


class Template(NamedTuple):
    """What `paste` needs of a thing: a four-band image (pattern, shade, gloss, alpha) and its soft shadow."""

    bands: Image.Image
    shadow: Image.Image


@cache
def template(shape: str, texture: str, size: str) -> Template:
    """The template of a shape with a texture at a size.

    Bands, each 0…255: pattern = share of the second colour, shade = brightness / 1.4, gloss = share of white light,
    alpha = cover. They travel as CMYK because Pillow multiplies RGBA by its alpha when it resamples.
    """
    side = TEMPLATE_SIDE[size]
    axis = (np.arange(_DRAWN) + 0.5) / _DRAWN * 2 * REACH - REACH
    u, v = np.meshgrid(axis, axis)
    mask = _silhouette(shape, u, v)
    shade, gloss = _light(shape, mask, u, v)
    if texture == "shiny":
        shade, gloss = 0.30 + 0.70 * shade**1.8, np.maximum(np.clip(2.2 * gloss, 0, 0.95), _streaks(shape, u, v))
    else:
        gloss = 0.14 * gloss
    inside = ndimage.distance_transform_edt(mask) * (2 * REACH / _DRAWN)
    pattern = _pattern(texture, size, u, v) * np.clip((inside - 0.06) / 0.03, 0, 1)  # a rim keeps the silhouette
    planes = (pattern, shade / 1.4, gloss, mask.astype(float))
    bands = [_image(np.clip(plane, 0, 1)).resize((side, side), Image.Resampling.BOX) for plane in planes]
    blurred = ndimage.gaussian_filter(mask.astype(float), 0.05 * _DRAWN)
    shadow = _image(blurred).resize((side, side), Image.Resampling.BOX)
    return Template(Image.merge("CMYK", bands), shadow)


@cache
def cover(shape: str) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The silhouette coarsely: a square mask over [-REACH, REACH]² and the points [n, 2] = (u, v) inside it."""
    axis = (np.arange(COVER_SIDE) + 0.5) / COVER_SIDE * 2 * REACH - REACH
    u, v = np.meshgrid(axis, axis)
    fine = (np.arange(_DRAWN) + 0.5) / _DRAWN * 2 * REACH - REACH
    block = _DRAWN // COVER_SIDE
    mask = _silhouette(shape, *np.meshgrid(fine, fine))[block // 2 :: block, block // 2 :: block]
    return mask, np.stack([u[mask], v[mask]], axis=1)


def _image(plane: Plane) -> Image.Image:
    return Image.fromarray(np.rint(255 * plane).astype(np.uint8), mode=None)


def _polygon(points: list[tuple[float, float]]) -> NDArray[np.bool_]:
    image = Image.new("L", (_DRAWN, _DRAWN))
    scale = _DRAWN / (2 * REACH)
    ImageDraw.Draw(image).polygon([((x + REACH) * scale, (y + REACH) * scale) for x, y in points], fill=1)
    return np.asarray(image, dtype=bool)


def _silhouette(shape: str, u: Plane, v: Plane) -> NDArray[np.bool_]:
    """Where the shape is."""
    radius = np.hypot(u, v)
    if shape == "ball":
        return radius < 0.98
    if shape == "box":
        return _polygon([(-0.95, -0.45), (-0.5, -0.92), (0.95, -0.92), (0.95, 0.45), (0.5, 0.92), (-0.95, 0.92)])
    if shape == "cone":
        return _polygon([(0, -1.08), (0.86, 0.72), (-0.86, 0.72)]) | (np.hypot(u / 0.86, (v - 0.7) / 0.26) < 1)
    if shape == "star":
        corners = [(1.1 if k % 2 == 0 else 0.46, math.pi * (k / 5 - 0.5)) for k in range(10)]
        return _polygon([(r * math.cos(t), 0.06 + r * math.sin(t)) for r, t in corners])
    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 120)
        x = 16 * np.sin(turns) ** 3
        y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns))
        return _polygon([(a, b) for a, b in zip(x / 16.2, (y - 2.5) / 15.2, strict=True)])
    if shape == "ring":
        return (radius < 1.0) & (radius > RING_HOLE)
    if shape == "cross":
        return ((np.abs(u) < 0.33) & (np.abs(v) < 1.0)) | ((np.abs(v) < 0.33) & (np.abs(u) < 1.0))
    if shape == "moon":
        return (np.hypot(u - 0.24, v) < 1.0) & (np.hypot(u - 0.82, v) > 0.86)
    if shape == "bottle":
        half = np.interp(v[:, 0], [-1.05, -1.04, -0.84, -0.83, -0.5, -0.12, 0.9, 1.0], BOTTLE_HALF)
        return (np.abs(u) < half[:, None]) & (np.abs(v) < 1.05)
    if shape == "fish":
        body = np.hypot((u + 0.22) / 0.82, v / 0.58) < 1
        tail = _polygon([(0.42, 0.0), (1.08, -0.62), (0.92, 0.0), (1.08, 0.62)])
        fin = _polygon([(-0.45, -0.48), (0.2, -0.82), (0.25, -0.4)])
        return body | tail | fin
    raise KeyError(shape)


BOTTLE_HALF = (0.28, 0.28, 0.28, 0.21, 0.21, 0.62, 0.62, 0.5)
"""Half-width of the bottle at the heights listed in `_silhouette`: cap, neck, shoulders, body, foot."""


def _light(shape: str, mask: NDArray[np.bool_], u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Shading (about 0.4 … 1.3) and highlight (0 … 1) of the shape under the light."""
    if shape == "box":
        return _box_faces(u, v), np.clip(1 - np.hypot((u + 0.55) / 0.35, (v + 0.15) / 0.35), 0, 1)
    height = _height(shape, mask, u, v)
    step = 2 * REACH / _DRAWN
    slope_v, slope_u = np.gradient(height, step)
    normal = np.stack([-slope_u, -slope_v, np.ones_like(height)])
    normal /= np.linalg.norm(normal, axis=0)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    half = light + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    facing = np.clip(np.tensordot(light, normal, axes=1), 0, 1)
    gloss = np.clip(np.tensordot(half, normal, axes=1), 0, 1) ** 30
    if shape == "fish":
        eye = np.hypot(u + 0.68, v + 0.14)
        facing = np.where(eye < 0.1, -0.5, facing)
        gloss = np.where((eye < 0.19) & (eye >= 0.1), 4.0, gloss)
    return 0.48 + 0.72 * facing, gloss


def _height(shape: str, mask: NDArray[np.bool_], u: Plane, v: Plane) -> Plane:
    """Height field of the body towards the viewer."""
    if shape == "ball":
        return np.sqrt(np.clip(1.0 - u**2 - v**2, 0.01, None))
    if shape == "cone":
        half = np.clip(0.86 * (v + 1.08) / 1.8, 0.05, None)
        return np.sqrt(np.clip(half**2 - u**2, 0.0, None))
    if shape == "bottle":
        half = ndimage.gaussian_filter1d(mask.sum(axis=1) * (REACH / _DRAWN), 0.017 * _DRAWN)[:, None]
        return np.sqrt(np.clip(half**2 - u**2, 0.0, None))
    bevel = {"ring": 0.2, "cross": 0.33, "moon": 0.35}.get(shape, 0.42)
    depth = ndimage.distance_transform_edt(mask) * (2 * REACH / _DRAWN)
    rise = np.clip(depth / bevel, 0, 1)
    return ndimage.gaussian_filter(bevel * np.sqrt(1 - (1 - rise) ** 2), 0.017 * _DRAWN)


def _box_faces(u: Plane, v: Plane) -> Plane:
    """Shading of a cube seen from above and from the right: light top, plain front, dark side."""
    shade = np.full_like(u, 0.95)
    shade[_polygon([(-0.95, -0.45), (-0.5, -0.93), (0.97, -0.93), (0.5, -0.45)])] = 1.2
    shade[_polygon([(0.5, -0.45), (0.97, -0.93), (0.97, 0.45), (0.5, 0.93)])] = 0.58
    return ndimage.gaussian_filter(shade, 0.006 * _DRAWN)


def _streaks(shape: str, u: Plane, v: Plane) -> Plane:
    """The two slanted reflections that say `shiny` on a body without a round belly."""
    if shape in ("ball", "bottle", "cone"):
        return np.zeros_like(u)
    across = u + 0.62 * v
    wide = np.clip(1 - np.abs(across + 0.42) / 0.17, 0, 1)
    thin = np.clip(1 - np.abs(across + 0.05) / 0.08, 0, 1)
    return np.clip(1.6 * np.maximum(wide, 0.8 * thin), 0, 0.85)


def _pattern(texture: str, size: str, u: Plane, v: Plane) -> Plane:
    """Share of the second colour; periods are chosen to be seen at 64 pixels, hence wider on small things."""
    wide = 1.28 if size == "small" else 1.0
    if texture == "striped":
        phase = (0.78 * u + 0.62 * v) / (0.54 * wide)
        return np.clip(0.5 + 3.0 * np.cos(2 * math.pi * phase), 0, 1)
    if texture == "dotted":
        pitch = 0.62 * wide
        row = np.floor(v / (0.87 * pitch) + 0.5)
        du = (u / pitch + 0.5 * (row % 2) + 0.5) % 1 - 0.5
        dv = v / pitch - 0.87 * row
        return np.clip((0.31 - np.hypot(du, dv)) / 0.06 + 0.5, 0, 1)
    if texture == "checkered":
        cell = 0.42 * wide
        return np.clip(0.5 + 4.0 * np.sin(math.pi * (u / cell + 0.5)) * np.sin(math.pi * (v / cell + 0.5)), 0, 1)
    return np.zeros_like(u)
