"""Drawing: patches in context, grids, labels, colours of codes. Arrays are uint8 [H, W, 3] unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlscale.inspect.cells import CutImage

INK = (34, 40, 49)
FAINT = (120, 128, 138)
PAPER = (255, 255, 255)
OUTLINE = (255, 45, 85)
REACH = 2
"""Patches of context on every side."""


def enlarge(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic where the enlargement is mild, else in two steps so that single pixels stay visible as soft squares."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if height >= 4 * image.height:
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def fitted(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Enlarged or shrunk in its aspect ratio until its longer side is `longest`."""
    height, width = (max(1, round(side * longest / max(pixels.shape[:2]))) for side in pixels.shape[:2])
    return enlarge(pixels, height, width)


def window_of(image: CutImage, cell: int) -> tuple[slice, slice]:
    """Rows and columns of cells around a cell: `REACH` on every side, moved inward at the image's border."""

    def span(place: int, length: int) -> slice:
        size = min(2 * REACH + 1, length)
        start = min(max(0, place - REACH), length - size)
        return slice(start, start + size)

    row, column = divmod(cell, image.columns)
    rows, columns = image.shown()
    return span(row, rows), span(column, columns)


def patch_of(image: CutImage, cell: int) -> np.ndarray:
    """The image's pixels in a cell, [h, w, 3]."""
    return image.pixels[image.cell(cell)]


def patch_tile(image: CutImage, cell: int, size: int) -> Image.Image:
    """A patch alone, in the middle of size × size where it is not square."""
    tile, _ = _tile(patch_of(image, cell), size)
    return tile


def context_tile(image: CutImage, cell: int, size: int) -> Image.Image:
    """A patch outlined in its surroundings, size × size."""
    window, patch = image.rectangle(*window_of(image, cell)), image.cell(cell)
    crop = image.pixels[window]
    tile, start = _tile(crop, size)
    longest = max(crop.shape[:2])

    def corner(axis: int, place: int) -> int:
        return start[axis] + round((place - window[axis].start) * size / longest)

    top, bottom = corner(0, patch[0].start), corner(0, patch[0].stop) - 1
    left, right = corner(1, patch[1].start), corner(1, patch[1].stop) - 1
    draw = ImageDraw.Draw(tile)
    draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline=PAPER)
    draw.rectangle([left, top, right, bottom], outline=OUTLINE, width=2)
    return tile


def _tile(crop: np.ndarray, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """A crop in the middle of size × size paper, and where it starts: (top, left)."""
    inside = fitted(crop, size)
    top, left = (size - inside.shape[0]) // 2, (size - inside.shape[1]) // 2
    tile = Image.new("RGB", (size, size), PAPER)
    tile.paste(Image.fromarray(inside), (left, top))
    return tile, (top, left)


def patch_pair(image: CutImage, cell: int, size: int) -> Image.Image:
    """The patch alone beside the patch in its surroundings, (2·size + 2) × size."""
    pair = Image.new("RGB", (2 * size + 2, size), PAPER)
    pair.paste(patch_tile(image, cell, size), (0, 0))
    pair.paste(context_tile(image, cell, size), (size + 2, 0))
    return pair


def grid_of(tiles: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Tiles row by row on paper, each in the upper left of a place that the largest ones fill."""
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures below one another, left-aligned."""
    width, height = max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap
    sheet = Image.new("RGB", (width, height), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def framed(picture: Image.Image, margin: int) -> Image.Image:
    """With a white margin all around."""
    sheet = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), PAPER)
    sheet.paste(picture, (margin, margin))
    return sheet


def text_block(lines: Sequence[tuple[str, tuple[int, int, int]]], width: int, size: int) -> Image.Image:
    """Lines of text in their colours, each wrapped to `width` pixels, on paper."""
    font = _font(size)
    wrapped = [(part, colour) for line, colour in lines for part in _wrap(line, font, width)]
    leading = round(size * 1.4)
    block = Image.new("RGB", (width, max(1, leading * len(wrapped))), PAPER)
    draw = ImageDraw.Draw(block)
    for index, (part, colour) in enumerate(wrapped):
        draw.text((0, index * leading), part, fill=colour, font=font)
    return block


def labelled_rows(labels: Sequence[Sequence[str]], rows: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    """Rows of pictures with a label of a few lines (the first one dark, the others faint) to the left of each."""
    lines = []
    for label, row in zip(labels, rows, strict=True):
        line = Image.new("RGB", (width + row.width, row.height), PAPER)
        colours = [INK, *[FAINT] * (len(label) - 1)]
        block = text_block(list(zip(label, colours, strict=True)), width - 8, 13)
        line.paste(block, (0, max(0, (row.height - block.height) // 2)))
        line.paste(row, (width, 0))
        lines.append(line)
    return stack(lines, gap)


def code_colours(codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A colour per code such that similar codes look alike: the three main directions of the used codes as RGB.

    Args:
        codes: [K, d] float.
        counts: [K], uses; unused codes do not stretch the scale.

    Returns:
        [K, 3] uint8.
    """
    used = codes[counts > 0]
    centred = codes - used.mean(axis=0)
    _, _, directions = np.linalg.svd(used - used.mean(axis=0), full_matrices=False)
    axes = np.zeros((3, codes.shape[1]), dtype=codes.dtype)
    axes[: min(3, len(directions))] = directions[:3]
    along = centred @ axes.T  # [K, 3]
    # By rank, else a few far-off codes take the whole scale.
    ordered = np.sort(along[counts > 0], axis=0)
    rank = np.stack([np.searchsorted(ordered[:, c], along[:, c], side="right") for c in range(3)], axis=1)
    return (40 + 200 * rank / max(1, len(used))).clip(0, 255).astype(np.uint8)


def code_map(
    image: CutImage, colours: np.ndarray, painted: np.ndarray, longest: int, strength: float = 0.8
) -> Image.Image:
    """The image beside its cells in the colours of their codes, through which the image's lightness shines.

    Args:
        colours: [N, 3] uint8, of every cell of the canvas.
        painted: [N] bool; where false, the lightness alone is seen.
        longest: length of the image's longer side, in pixels.
        strength: share of the colours in the mix.
    """
    left = fitted(image.pixels, longest)
    height, width = left.shape[:2]
    rows, columns = (_cells_of(edges, side) for edges, side in zip(image.edges(), (height, width), strict=True))
    cells = (rows[:, None] * image.columns + columns).astype(np.int64)  # [height, width]
    light = np.asarray(Image.fromarray(left).convert("L"), dtype=np.float32)[..., None]
    mixed = np.float32(strength) * colours[cells].astype(np.float32) + np.float32(1 - strength) * light
    right = np.where(painted[cells][..., None], mixed, light).astype(np.uint8)
    pair = Image.new("RGB", (2 * width + 3, height), PAPER)
    pair.paste(Image.fromarray(left), (0, 0))
    pair.paste(Image.fromarray(right), (width + 3, 0))
    return pair


def _cells_of(edges: np.ndarray, length: int) -> np.ndarray:
    """Row (or column) of the cell that every pixel of a picture of `length` shows, [length] int64."""
    places = (np.arange(length) + 0.5) * edges[-1] / length
    return np.searchsorted(edges, places, side="right") - 1


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG", compress_level=4)
    temporary.replace(path)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrap(line: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break at spaces so that each part fits; a longer word stands alone and is cut by the picture's edge."""
    parts: list[str] = []
    for word in line.split():
        if parts and font.getlength(f"{parts[-1]} {word}") <= width:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts or [""]
