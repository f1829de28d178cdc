"""Crops and colours: the right pixels of the right cell."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlscale.inspect import pictures
from vlscale.inspect.cells import CutImage
from vlscale.inspect.palette import distinct_colours, oklab


def numbered(grid: tuple[int, int], patch: int) -> np.ndarray:
    """Every cell in one colour: its number in the red channel."""
    cells = np.zeros((*grid, 3), dtype=np.uint8)
    cells[..., 0] = np.arange(grid[0] * grid[1]).reshape(grid)
    return cells.repeat(patch, axis=0).repeat(patch, axis=1)


def test_patches_and_their_surroundings() -> None:
    grid = (6, 8)
    image = CutImage.whole(numbered(grid, 4), *grid)
    for cell in range(48):
        assert (pictures.patch_of(image, cell)[..., 0] == cell).all()
        rows, columns = pictures.window_of(image, cell)
        row, column = divmod(cell, grid[1])
        assert rows.start <= row < rows.stop <= grid[0]
        assert columns.start <= column < columns.stop <= grid[1]
        assert rows.stop - rows.start == columns.stop - columns.start == 5
        tile = np.asarray(pictures.context_tile(image, cell, 100))
        top, left, bottom, right = outlined(tile)
        assert [top, left] == [(row - rows.start) * 20, (column - columns.start) * 20]
        assert [bottom, right] == [top + 20, left + 20]
        assert tile[top + 10, left + 10, 0] == cell


def outlined(tile: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the outline."""
    marked = np.argwhere((tile == pictures.OUTLINE).all(axis=-1))
    return (*marked.min(axis=0).tolist(), *(marked.max(axis=0) + 1).tolist())


@pytest.mark.parametrize("size", [(52, 37), (64, 37), (23, 64), (9, 9), (1, 64), (64, 64)])
def test_patches_of_padded_images_end_where_the_padding_begins(size: tuple[int, int]) -> None:
    """8 × 8 cells of 8 pixels; every crop is its cell's pixels without the padding's."""
    height, width = size
    canvas = numbered((8, 8), 8)
    image = CutImage(canvas[:height, :width], 8, 8, (64, 64))
    padded = canvas.copy()
    padded[height:], padded[:, width:] = 255, 255
    for cell in range(64):
        row, column = divmod(cell, 8)
        pixels = padded[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].reshape(-1, 3).tolist()
        inside = [pixel for pixel in pixels if pixel != [255] * 3]
        assert image.visible()[cell] == bool(inside)
        if not inside:
            continue
        assert pictures.patch_of(image, cell).reshape(-1, 3).tolist() == inside
        rows, columns = pictures.window_of(image, cell)
        assert rows.stop <= -(-height // 8)
        assert columns.stop <= -(-width // 8)
        down, right = image.rectangle(rows, columns)
        assert (down.stop, right.stop) == (min(rows.stop * 8, height), min(columns.stop * 8, width))
        pair = np.asarray(pictures.patch_pair(image, cell, 80))
        assert pair.shape == (80, 162, 3)
        top, left, bottom, edge = outlined(pair[:, 82:])
        scale = 80 / max(down.stop - down.start, right.stop - right.start)
        patch = pictures.patch_of(image, cell)
        assert bottom - top == pytest.approx(patch.shape[0] * scale, abs=1.01)
        assert edge - left == pytest.approx(patch.shape[1] * scale, abs=1.01)


def test_tiles_keep_the_aspect_ratio() -> None:
    image = CutImage(numbered((2, 2), 8)[:10], 2, 2, (16, 16))  # cells 2 and 3 are 2 × 8 pixels
    tile = np.asarray(pictures.patch_tile(image, 3, 80))
    inside = np.argwhere((tile != 255).any(axis=-1))
    assert inside.min(axis=0).tolist() == [30, 0]
    assert inside.max(axis=0).tolist() == [49, 79]


def test_maps_paint_the_valid_cells() -> None:
    """3 × 4 cells of 8 pixels, image 20 × 26, drawn twice as large: the painted pixels are those of painted cells."""
    pixels = np.full((20, 26, 3), 100, dtype=np.uint8)
    image = CutImage(pixels, 3, 4, (24, 32))
    colours = np.arange(12, dtype=np.uint8)[:, None].repeat(3, axis=1) * 20
    painted = np.arange(12) != 5
    pair = np.asarray(pictures.code_map(image, colours, painted, 52, strength=1.0))
    assert pair.shape == (40, 2 * 52 + 3, 3)
    assert (pair[:, :52] == 100).all()
    for y in range(40):
        for x in range(52):
            cell = y // 16 * 4 + x // 16
            assert (pair[y, 55 + x] == (20 * cell if cell != 5 else 100)).all()


def test_windows_of_small_grids_are_the_whole_image() -> None:
    assert pictures.window_of(CutImage.whole(numbered((2, 3), 4), 2, 3), 4) == (slice(0, 2), slice(0, 3))


def test_frequent_colours_are_the_most_distinct() -> None:
    """Each is as far from those before it as any colour could be, so the distances only fall."""
    colours = distinct_colours(60)
    assert (distinct_colours(200)[:60] == colours).all(), "a colour does not depend on how many come after it"
    assert len(np.unique(colours, axis=0)) == 60
    places = oklab(colours)
    gaps = [np.linalg.norm(places[:n] - places[n], axis=1).min() for n in range(1, 60)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[17] > 0.15, "those of the legend"
    assert distinct_colours(1).shape == (1, 3)
    many = distinct_colours(9000)
    assert many.shape == (9000, 3)
    np.testing.assert_allclose(
        oklab(np.array([[255, 255, 255], [255, 0, 0]])), [[1, 0, 0], [0.628, 0.2249, 0.1258]], atol=1e-3
    )


def test_similar_codes_have_similar_colours() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[10.0, 0, 0, 0], [-10.0, 0, 0, 0]])
    codes = np.repeat(centres, 20, axis=0) + 0.1 * rng.standard_normal((40, 4))
    codes = np.concatenate([codes, [[1e6, 0, 0, 0]]])  # never used: it must not stretch the scale
    counts = np.append(np.ones(40), 0)
    red = pictures.code_colours(codes, counts)[:, 0].astype(int)
    assert abs(red[:20].mean() - red[20:40].mean()) > 80
    assert pictures.code_colours(codes[:1], np.ones(1)).shape == (1, 3)


def test_text_is_wrapped_inside_its_width() -> None:
    line = "a small checkered purple bottle stands to the left of a very large turquoise star"
    block = np.asarray(pictures.text_block([(line, pictures.INK)], 160, 13))
    assert block.shape[1] == 160
    assert (block[:, -1] == 255).all(), "nothing is cut at the right"
    assert block.shape[0] >= 3 * 13


def test_grids_keep_every_tile() -> None:
    tiles = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(5)]
    sheet = np.asarray(pictures.grid_of(tiles, 3, 2))
    assert sheet.shape == (10, 16, 3)
    assert [sheet[i // 3 * 6, i % 3 * 6, 0] for i in range(5)] == list(range(5))
