"""Boxes over photographs: solid or dashed, on white so that they show on any picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vlscale.data.sample import Box
from vlscale.inspect import pictures

COLOURS = ((214, 39, 40), (31, 98, 200), (20, 130, 60), (190, 60, 190), (200, 100, 0), (0, 130, 140), (110, 60, 20))
"""Told apart from each other and, as text, from paper; after the last they begin anew."""
RED = COLOURS[0]
_LINE = 3
_DASH, _GAP = 7, 5

Colour = tuple[int, int, int]


class Mark(NamedTuple):
    """A box to draw."""

    box: Box
    """Shares of the image."""
    colour: Colour
    dashed: bool = False


def with_boxes(image: Image.Image, marks: Sequence[Mark], longest: int) -> Image.Image:
    """The image, its longer side `longest` pixels, with boxes drawn in their order.

    A box that comes again is drawn inside of itself, so that all of its marks are seen.
    """
    picture = Image.fromarray(pictures.fitted(np.asarray(image.convert("RGB")), longest))
    draw = ImageDraw.Draw(picture)
    drawn: Counter[tuple[float, ...]] = Counter()
    for mark in marks:
        place = tuple(round(side, 3) for side in mark.box)
        _draw(draw, mark, (picture.width, picture.height), _LINE * drawn[place])
        drawn[place] += 1
    return picture


def _draw(draw: ImageDraw.ImageDraw, mark: Mark, size: tuple[int, int], inset: int) -> None:
    left, right = _pixels(mark.box[0], mark.box[2], size[0], inset)
    top, bottom = _pixels(mark.box[1], mark.box[3], size[1], inset)
    draw.rectangle((left, top, right, bottom), outline=pictures.PAPER, width=_LINE if mark.dashed else _LINE + 1)
    if mark.dashed:
        for side in _sides(left, top, right, bottom):
            _dashes(draw, side, mark.colour)
    else:
        draw.rectangle((left, top, right, bottom), outline=mark.colour, width=_LINE)


def _pixels(low: float, high: float, side: int, inset: int) -> tuple[int, int]:
    """First and last pixel of an extent, inside the picture and, where there is room, the inset away from its ends."""
    first = min(max(round(low * side), 0), side - 1)
    last = min(max(round(high * side) - 1, first), side - 1)
    inset = min(inset, (last - first) // 2)
    return first + inset, last - inset


def _sides(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int, int, int]]:
    """Four rectangles as thick as a line."""
    thick = _LINE - 1
    return [
        (left, top, right, min(top + thick, bottom)),
        (left, max(bottom - thick, top), right, bottom),
        (left, top, min(left + thick, right), bottom),
        (max(right - thick, left), top, right, bottom),
    ]


def _dashes(draw: ImageDraw.ImageDraw, side: tuple[int, int, int, int], colour: Colour) -> None:
    left, top, right, bottom = side
    if right - left >= bottom - top:
        for start in range(left, right + 1, _DASH + _GAP):
            draw.rectangle((start, top, min(start + _DASH, right), bottom), fill=colour)
    else:
        for start in range(top, bottom + 1, _DASH + _GAP):
            draw.rectangle((left, start, right, min(start + _DASH, bottom)), fill=colour)
