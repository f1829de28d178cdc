"""Drawing: patches in their context, grids, labels, histograms. Arrays are uint8 [H, W, 3] unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

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


def window_of(grid: tuple[int, int], cell: int) -> tuple[slice, slice]:
    """Rows and columns of cells around a cell: `REACH` on every side, moved inward at the image's border."""

    def span(place: int, length: int) -> slice:
        size = min(2 * REACH + 1, length)
        start = min(max(0, place - REACH), length - size)
        return slice(start, start + size)

    row, column = divmod(cell, grid[1])
    return span(row, grid[0]), span(column, grid[1])


def patch_of(image: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    """The patch of a cell, [p, p, 3]."""
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    row, column = divmod(cell, grid[1])
    return image[row * height : (row + 1) * height, column * width : (column + 1) * width]


def context_tile(image: np.ndarray, grid: tuple[int, int], cell: int, size: int) -> Image.Image:
    """A patch outlined in its surroundings, size × size."""
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    rows, columns = window_of(grid, cell)
    crop = image[rows.start * height : rows.stop * height, columns.start * width : columns.stop * width]
    tile = Image.fromarray(enlarge(crop, size, size))
    row, column = divmod(cell, grid[1])
    down, right = size / (rows.stop - rows.start), size / (columns.stop - columns.start)
    top, left = (row - rows.start) * down, (column - columns.start) * right
    corners = [round(left), round(top), round(left + right) - 1, round(top + down) - 1]
    draw = ImageDraw.Draw(tile)
    draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=PAPER)
    draw.rectangle(corners, outline=OUTLINE, width=2)
    return tile


def patch_pair(image: np.ndarray, grid: tuple[int, int], cell: int, size: int) -> Image.Image:
    """The patch alone beside the patch in its surroundings, (2·size + 2) × size."""
    pair = Image.new("RGB", (2 * size + 2, size), PAPER)
    pair.paste(Image.fromarray(enlarge(patch_of(image, grid, cell), size, size)), (0, 0))
    pair.paste(context_tile(image, grid, cell, size), (size + 2, 0))
    return pair


def grid_of(tiles: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Tiles of one size row by row on paper."""
    width, height = tiles[0].size
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


def code_map(image: np.ndarray, grid: tuple[int, int], colours: np.ndarray, size: int) -> Image.Image:
    """The image beside its cells in the colours of their codes (image lightness shines through); colours [N, 3]."""
    left = enlarge(image, size, size)
    cells = Image.fromarray(colours.reshape(*grid, 3)).resize((size, size), Image.Resampling.NEAREST)
    light = np.asarray(Image.fromarray(left).convert("L"), dtype=np.float32)[..., None]
    right = (0.8 * np.asarray(cells, dtype=np.float32) + 0.2 * light).astype(np.uint8)
    pair = Image.new("RGB", (2 * size + 3, size), PAPER)
    pair.paste(Image.fromarray(left), (0, 0))
    pair.paste(Image.fromarray(right), (size + 3, 0))
    return pair


def usage_histogram(counts: np.ndarray, perplexity: float, path: Path) -> None:
    """Uses of every code, sorted, on a log scale; counts [K]."""
    ordered = np.sort(counts)[::-1]
    used = int((ordered > 0).sum())
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(np.arange(used), ordered[:used], width=1.0, color="#3b6ea5")
    if used < len(ordered):
        axes.axvspan(used - 0.5, len(ordered) - 0.5, color="#f2c6c6", label=f"never chosen: {len(ordered) - used}")
    axes.axvline(perplexity, color="#c2410c", linestyle="--", linewidth=1.2, label=f"perplexity: {perplexity:.1f}")
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_xlabel("codes, most used first")
    axes.set_ylabel("patches")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", facecolor="white", framealpha=1.0, edgecolor="none")
    figure.savefig(path, metadata={"Software": None})


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
