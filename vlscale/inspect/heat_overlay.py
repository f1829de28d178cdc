"""A heat map over the cells of an image, drawn over its lightness."""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image

from vlscale.inspect import pictures
from vlscale.inspect.cells import CutImage

COLOURS = "inferno"
STRENGTH = 0.65
"""Share of the colours in the mix."""


def heat_overlay(image: CutImage, heat: np.ndarray, longest: int) -> Image.Image:
    """The image with its cells' heat: black where there is none, bright where it is largest.

    Args:
        heat: [rows, columns] float, at least 0, over the canvas; on a scale of its own.
        longest: length of the picture's longer side, in pixels.
    """
    shown = pictures.fitted(image.pixels, longest)
    height, width = shown.shape[:2]
    light = np.asarray(Image.fromarray(shown).convert("L"), dtype=np.float32)[..., None]
    colours = 255 * matplotlib.colormaps[COLOURS](spread(image, heat, height, width))[..., :3]
    return Image.fromarray((STRENGTH * colours + (1 - STRENGTH) * light).astype(np.uint8))


def spread(image: CutImage, heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """Heat of cells [rows, columns] at the pixels of the image's picture, bicubic, in [0, 1]; [height, width].

    1 is the largest heat of a cell that shows some of the image; all is 0 where none has any.
    """
    rows, columns = image.shown()
    top = float(heat[:rows, :columns].max())
    scaled = Image.fromarray((heat / top if top > 0 else np.zeros_like(heat)).astype(np.float32))
    down, right = (pixels / side for pixels, side in zip(image.pixels.shape[:2], image.canvas, strict=True))
    box = (0.0, 0.0, image.columns * right, image.rows * down)  # the part of the grid that is the image
    return np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC, box=box)).clip(0, 1)
