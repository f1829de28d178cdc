"""An image and the cells that a system cuts it into: which pixels belong to which cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class CutImage:
    """An image as the system saw it, and the grid over its canvas: the image with its padding, right and below.

    Cells are numbered row by row over the whole canvas and share it evenly; those at the image's right and lower border
    may reach into the padding, and their pixels end where it begins.
    """

    pixels: np.ndarray
    """[h, w, 3] uint8, without padding."""
    rows: int
    columns: int
    canvas: tuple[int, int]
    """Height and width in pixels, at least those of the image."""

    @classmethod
    def whole(cls, pixels: np.ndarray, rows: int, columns: int) -> CutImage:
        """An image without padding, [h, w, 3] uint8."""
        return cls(pixels, rows, columns, (pixels.shape[0], pixels.shape[1]))

    def __len__(self) -> int:
        """Cells of the canvas."""
        return self.rows * self.columns

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels at which rows [rows + 1] and columns [columns + 1] of cells begin and end; int64, inside the image."""
        height, width = self.canvas
        down = np.arange(self.rows + 1) * height // self.rows
        right = np.arange(self.columns + 1) * width // self.columns
        return np.minimum(down, self.pixels.shape[0]), np.minimum(right, self.pixels.shape[1])

    def visible(self) -> np.ndarray:
        """Whether a cell holds a pixel of the image; [N] bool."""
        down, right = self.edges()
        return ((np.diff(down) > 0)[:, None] & (np.diff(right) > 0)).flatten()

    def shown(self) -> tuple[int, int]:
        """Rows and columns of cells that the image reaches into."""
        down, right = self.edges()
        return int((down < self.pixels.shape[0]).sum()), int((right < self.pixels.shape[1]).sum())

    def rectangle(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Pixels of a rectangle of cells as (vertical, horizontal), cut off where the padding begins."""
        down, right = self.edges()
        return (
            slice(int(down[rows.start]), int(down[rows.stop])),
            slice(int(right[columns.start]), int(right[columns.stop])),
        )

    def cell(self, cell: int) -> tuple[slice, slice]:
        """Pixels of a cell as (vertical, horizontal), cut off where the padding begins."""
        row, column = divmod(cell, self.columns)
        return self.rectangle(slice(row, row + 1), slice(column, column + 1))

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Vertical and horizontal centre of the image's part of every cell, [N] float64, as shares of the image."""
        down, right = self.edges()
        y = (down[:-1] + down[1:]) / (2 * self.pixels.shape[0])
        x = (right[:-1] + right[1:]) / (2 * self.pixels.shape[1])
        return y.repeat(self.columns), np.tile(x, self.rows)
