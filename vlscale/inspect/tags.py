"""What the patches of a code show, by the boxes of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlscale.data.sample import Box, Sample
from vlscale.inspect.cells import CutImage

NO_BOX = -1
NO_BOX_NAME = "no box"


@dataclass(slots=True)
class TagShare:
    """How much of a code's patches a tag, or all tags with a word, cover."""

    tag: str
    share: float
    """Of the code's patches, in [0, 1]: the code's purity, for its first tag."""
    everywhere: float
    """Of all patches."""


class TagTable:
    """Shares of tags and of their words among the patches of a code."""

    def __init__(self, samples: Sequence[Sample], images: Sequence[CutImage], valid: np.ndarray) -> None:
        """Valid [I, N] bool: false where a cell is padding, which counts nowhere."""
        self.tags, self.cells = cell_tags(samples, images)
        self.words = sorted({word for tag in self.tags for word in tag.split()})
        member = [[word in tag.split() for tag in self.tags] for word in self.words]
        self._member = np.array(member, dtype=np.float64).reshape(len(self.words), len(self.tags))
        self._everywhere = self._frequencies(self.cells[valid])

    def of(self, codes: np.ndarray, code: int, top: int = 3) -> tuple[list[TagShare], list[TagShare]]:
        """Tags and words that a code shows more than other codes do, the largest excess first; codes [I, N].

        `no box` counts as a tag; both lists are empty where no sample has boxes.
        """
        if not self.tags:
            return [], []
        own = self._frequencies(self.cells[codes == code])
        names = [*self.tags, NO_BOX_NAME]
        tags = _largest(names, own, self._everywhere, top)
        has_words = len(self.words) > 0 and any(" " in tag for tag in self.tags)
        words = [*self.words, NO_BOX_NAME]
        return tags, _largest(words, self._by_word(own), self._by_word(self._everywhere), top) if has_words else []

    def _frequencies(self, cells: np.ndarray) -> np.ndarray:
        """Share of each tag, `no box` last; [T + 1]."""
        shifted = np.where(cells == NO_BOX, len(self.tags), cells)
        return np.bincount(shifted, minlength=len(self.tags) + 1) / max(1, len(shifted))

    def _by_word(self, frequencies: np.ndarray) -> np.ndarray:
        return np.append(self._member @ frequencies[:-1], frequencies[-1])


def cell_tags(samples: Sequence[Sample], images: Sequence[CutImage]) -> tuple[list[str], np.ndarray]:
    """Which thing every cell shows, where the samples have boxes with tags.

    Returns:
        (tag names, [I, N] int64 index into them, N the most cells of an image): the tag of the smallest box that holds
        the centre of the image's part of the cell, or NO_BOX.
    """
    names = sorted({tag for sample in samples for tag in sample.tags[: len(sample.boxes)]})
    number = {name: index for index, name in enumerate(names)}
    found = np.full((len(samples), max(map(len, images))), NO_BOX)
    for row, sample, image in zip(found, samples, images, strict=True):
        y, x = image.centres()
        boxes = list(zip(sample.boxes, sample.tags, strict=False))
        # Largest first: what is drawn last is the smallest.
        for (x1, y1, x2, y2), tag in sorted(boxes, key=lambda item: -_area(item[0])):
            row[: len(image)][(x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)] = number[tag]
    return names, found


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _largest(names: list[str], own: np.ndarray, everywhere: np.ndarray, top: int) -> list[TagShare]:
    best = [index for index in np.argsort(everywhere - own, kind="stable")[:top] if own[index] > everywhere[index]]
    return [TagShare(names[index], float(own[index]), float(everywhere[index])) for index in best]
