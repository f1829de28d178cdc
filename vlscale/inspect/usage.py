"""What a data set makes of a codebook: counts, entropy, dead codes, and what the patches of a code show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vlscale.codebooks.health import count_codes, entropy
from vlscale.config import Data
from vlscale.data.images import normalize
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import evaluation_batches
from vlscale.errors import UserError
from vlscale.systems.protocol import System

MAX_IMAGES = 1000
"""Images that are looked at; from larger splits so many are drawn with `SEED`."""
SEED = 0
NO_BOX = -1
NO_BOX_NAME = "no box"


@runtime_checkable
class Quantises(Protocol):
    """A system whose codebooks read a grid of patches."""

    @property
    def grid(self) -> tuple[int, int]: ...

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """Per codebook [B, N, d], cells row by row."""
        ...


@dataclass(slots=True)
class Assigned:
    """A data set and the code of every cell."""

    samples: list[Sample]
    images: np.ndarray
    """[I, H, W, 3] uint8, as the system saw them."""
    grid: tuple[int, int]
    codes: dict[str, np.ndarray]
    """[I, N] int64 per codebook."""
    skipped: list[str]
    """Images that can't be read: `path: reason`."""


@dataclass(slots=True)
class Usage:
    """Counts of one codebook over a data set."""

    counts: np.ndarray
    """[K] int64."""
    entropy: float
    """Of the code frequencies, in nats."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.entropy))

    @property
    def dead(self) -> list[int]:
        """Codes that no patch chose."""
        return np.flatnonzero(self.counts == 0).tolist()

    @property
    def order(self) -> np.ndarray:
        """Used codes, most used first, equal ones by number."""
        ranked = np.argsort(-self.counts, kind="stable")
        return ranked[self.counts[ranked] > 0]


def some_samples(samples: list[Sample], limit: int) -> list[Sample]:
    """All samples, or `limit` of them drawn with `SEED`, in their order."""
    if len(samples) <= limit:
        return samples
    chosen = np.random.default_rng(SEED).choice(len(samples), size=limit, replace=False)
    return [samples[index] for index in np.sort(chosen)]


@torch.inference_mode()
def assign_codes(
    system: System, samples: list[Sample], data: Data, batch_size: int, device: torch.device, name: str
) -> Assigned:
    """The code of every cell of every readable image; features and search in fp32.

    Args:
        name: of the run, for errors.

    Raises:
        UserError: the system has no codebook over patches, or no image can be read.
    """
    books = system.codebooks()
    if not books or not isinstance(system, Quantises):
        raise UserError(f"{name}: its system has no codebook over image patches, so there is nothing to inspect")
    kept: list[int] = []
    images: list[Tensor] = []
    codes: dict[str, list[Tensor]] = {}
    skipped: list[str] = []
    for loaded, batch in normalized_batches(samples, data, batch_size, device):
        kept += loaded.image_ids.tolist()
        images.append(loaded.images)
        skipped += loaded.skipped
        for book, features in system.codebook_features(batch).items():
            codes.setdefault(book, []).append(books[book].assign(features).cpu())
    if not kept:
        raise UserError(f"none of the {len(samples)} images can be read, the first is {skipped[0]}; check --image-root")
    return Assigned(
        [samples[index] for index in kept],
        torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy(),
        cast(Quantises, system).grid,
        {book: torch.cat(parts).numpy() for book, parts in codes.items()},
        skipped,
    )


def normalized_batches(
    samples: Sequence[Sample], data: Data, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, Batch]]:
    """Readable images as loaded (uint8, on the CPU) and as the system takes them (float32, on `device`)."""
    for loaded in evaluation_batches(samples, data, batch_size):
        batch = loaded.to(device)
        batch.images = normalize(batch.images, data.mean, data.std)
        yield loaded, batch


def usage_of(codes: np.ndarray, size: int) -> Usage:
    """Counts of codes [I, N] in a codebook of `size`."""
    counts = count_codes(torch.from_numpy(codes), size)
    return Usage(counts.long().numpy(), entropy(counts).item())


def pick_codes(usage: Usage, count: int) -> list[int]:
    """The `count` most used codes and, drawn with `SEED`, a quarter as many of the others."""
    order = usage.order
    rare = order[count:]
    extra = min(len(rare), max(1, count // 4))
    drawn = np.random.default_rng(SEED).choice(rare, size=extra, replace=False) if extra else rare
    return [*order[:count].tolist(), *sorted(drawn.tolist(), key=lambda code: -usage.counts[code])]


def pick_patches(codes: np.ndarray, code: int, count: int) -> list[tuple[int, int]]:
    """At most `count` cells of a code as (image, cell): a seeded draw, each from another image while there are any."""
    places = np.random.default_rng([SEED, code]).permutation(np.argwhere(codes == code))
    first = np.sort(np.unique(places[:, 0], return_index=True)[1])  # the first draw of each image, in drawn order
    order = np.concatenate([first, np.setdiff1d(np.arange(len(places)), first)])[:count]
    return [(int(image), int(cell)) for image, cell in places[order]]


def cell_tags(samples: list[Sample], grid: tuple[int, int]) -> tuple[list[str], np.ndarray]:
    """Which thing every cell shows, where the samples have boxes with tags.

    Returns:
        (tag names, [I, N] int64 index into them): the tag of the smallest box that holds the cell's centre, or NO_BOX.
    """
    names = sorted({tag for sample in samples for tag in sample.tags[: len(sample.boxes)]})
    number = {name: index for index, name in enumerate(names)}
    rows, columns = grid
    y = (np.arange(rows * columns) // columns + 0.5) / rows
    x = (np.arange(rows * columns) % columns + 0.5) / columns
    found = np.full((len(samples), rows * columns), NO_BOX)
    for index, sample in enumerate(samples):
        boxes = list(zip(sample.boxes, sample.tags, strict=False))
        # Largest first: what is drawn last is the smallest.
        for (x1, y1, x2, y2), tag in sorted(boxes, key=lambda item: -_area(item[0])):
            found[index, (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)] = number[tag]
    return names, found


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


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

    def __init__(self, samples: list[Sample], grid: tuple[int, int]) -> None:
        self.tags, self.cells = cell_tags(samples, grid)
        self.words = sorted({word for tag in self.tags for word in tag.split()})
        member = [[word in tag.split() for tag in self.tags] for word in self.words]
        self._member = np.array(member, dtype=np.float64).reshape(len(self.words), len(self.tags))
        self._everywhere = self._frequencies(self.cells.flatten())

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


def _largest(names: list[str], own: np.ndarray, everywhere: np.ndarray, top: int) -> list[TagShare]:
    best = [index for index in np.argsort(everywhere - own, kind="stable")[:top] if own[index] > everywhere[index]]
    return [TagShare(names[index], float(own[index]), float(everywhere[index])) for index in best]
