"""Crops and colours: the right pixels of the right cell."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlscale.inspect import pictures


def numbered(grid: tuple[int, int], patch: int) -> np.ndarray:
    """Every cell in one colour: its number in the red channel."""
    cells = np.zeros((*grid, 3), dtype=np.uint8)
    cells[..., 0] = np.arange(grid[0] * grid[1]).reshape(grid)
    return cells.repeat(patch, axis=0).repeat(patch, axis=1)


def test_patches_and_their_surroundings() -> None:
    grid = (6, 8)
    image = numbered(grid, 4)
    for cell in range(48):
        assert (pictures.patch_of(image, grid, cell)[..., 0] == cell).all()
        rows, columns = pictures.window_of(grid, cell)
        row, column = divmod(cell, grid[1])
        assert rows.start <= row < rows.stop <= grid[0]
        assert columns.start <= column < columns.stop <= grid[1]
        assert rows.stop - rows.start == columns.stop - columns.start == 5
        tile = np.asarray(pictures.context_tile(image, grid, cell, 100))
        marked = np.argwhere((tile == pictures.OUTLINE).all(axis=-1))
        top, left = marked.min(axis=0)
        bottom, right = marked.max(axis=0)
        assert [top, left] == [(row - rows.start) * 20, (column - columns.start) * 20]
        assert [bottom, right] == [top + 19, left + 19]
        assert tile[top + 10, left + 10, 0] == cell


def test_windows_of_small_grids_are_the_whole_image() -> None:
    assert pictures.window_of((2, 3), 4) == (slice(0, 2), slice(0, 3))


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
