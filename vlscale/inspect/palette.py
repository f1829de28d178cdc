"""Colours that are told apart: each as far as can be from those before it."""

from __future__ import annotations

import numpy as np

STEPS = 20
"""Values of red, green and blue that are tried: 20³ colours."""
LIGHTNESS = (0.42, 0.92)
"""Darker and lighter colours are hard to tell when a picture shines through."""
CHROMA = 0.07
"""Duller colours look like the greys of a picture where nothing is painted."""


def distinct_colours(count: int) -> np.ndarray:
    """`count` colours, the first ones the farthest apart; [count, 3] uint8, the same every time.

    The first is the most vivid one; each other the one with the largest distance, in Oklab, to its nearest neighbour
    among those before it. There are a few thousand; after the last they begin anew.
    """
    values = np.linspace(0, 255, STEPS).round().astype(np.uint8)
    tried = np.stack(np.meshgrid(values, values, values, indexing="ij"), axis=-1).reshape(-1, 3)
    places = oklab(tried)
    chroma = np.hypot(places[:, 1], places[:, 2])
    usable = (places[:, 0] >= LIGHTNESS[0]) & (places[:, 0] <= LIGHTNESS[1]) & (chroma >= CHROMA)
    tried, places, chroma = tried[usable], places[usable], chroma[usable]
    chosen = [int(chroma.argmax())]
    nearest = _squared(places, places[chosen[0]])  # of every colour to the chosen ones
    while len(chosen) < min(count, len(tried)):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _squared(places, places[chosen[-1]]))
    return tried[np.resize(np.array(chosen), count)]


def oklab(colours: np.ndarray) -> np.ndarray:
    """sRGB [n, 3] uint8 → lightness, green to red, blue to yellow, [n, 3] float64: equal distances look alike.

    Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def _squared(places: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.square(places - place).sum(axis=1)
