"""Inputs that keep their aspect ratio: sizes read ahead, an order of similar shapes, and padding (architecture.md).

How an image is resized stands in `vlscale.data.images`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vlscale.config import Aspect
from vlscale.data.images import ImageError, upright_size
from vlscale.data.order import Order, generator, keep_newest
from vlscale.data.sample import ImageFile, SampleError

THREADS = 16
"""That read headers: files are waited for, on a network's disk most of all."""
_PER_TASK = 256
_STEPS = 2
"""What the generator of a window's steps is named by, besides (seed, epoch, window)."""


def aspect_ratios(count: int, image_of: Callable[[int], ImageFile]) -> np.ndarray:
    """Width over height of the upright images 0 ≤ index < count, float32 [count], from the headers of their files.

    An image that can't be read has ratio 1: training replaces it when its turn comes.

    Args:
        image_of: where the image lies; called from several threads, and may raise SampleError.
    """

    def ratio(index: int) -> float:
        try:
            width, height = upright_size(image_of(index))
        except (ImageError, SampleError):
            return 1.0
        return width / height

    def some(first: int) -> list[float]:
        return [ratio(index) for index in range(first, min(first + _PER_TASK, count))]

    with ThreadPoolExecutor(THREADS) as pool:
        rows = pool.map(some, range(0, count, _PER_TASK))
        return np.array([value for row in rows for value in row], dtype=np.float32)


class AspectOrder:
    """An order whose steps hold images of similar shape: sorted by aspect ratio within windows, then cut into steps.

    Windows are nearly equal shares of an epoch, about `window` samples each and cut where steps begin, so an epoch
    stays the permutation of its samples that it was. Inside a window whole steps are permuted, so that it doesn't run
    from narrow to wide. A step that straddles two epochs takes the middle of both: the samples whose ratio is the most
    common. Equal ratios stay in the given order, which is another one every epoch.

    It is a function of the given order, the ratios, the seed and `group`: not of ranks, workers and micro-batches.
    """

    def __init__(self, order: Order, ratios: np.ndarray, window: int, group: int, seed: int) -> None:
        """
        Args:
            order: what is sorted.
            ratios: width over height by sample index, [N].
            window: about how many positions are sorted together; a step at least.
            group: samples of a step, `train.global_batch`.
        """
        self._order, self._ratios, self._group, self._seed = order, ratios, group, seed
        self._count = max(1, round(len(order) / max(window, group)))
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], list[tuple[int, int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def at(self, position: int) -> tuple[int, int]:
        epoch = position // len(self._order)
        edges = self._edges(epoch)
        window = int(np.searchsorted(edges, position, side="right")) - 1
        key = (epoch, window)
        if key not in self._windows:
            content = self._sorted(epoch, window, int(edges[window]), int(edges[window + 1]))
            keep_newest(self._windows, key, content, 2)  # a step may straddle two epochs
        return self._windows[key][position - int(edges[window])]

    def _edges(self, epoch: int) -> np.ndarray:
        """Positions where the epoch's windows begin, and where the last one ends; all but the epoch's are steps'."""
        if epoch not in self._epochs:
            size = len(self._order)
            goals = epoch * size + np.arange(1, self._count) * (size / self._count)
            inner = np.round(goals / self._group).astype(np.int64) * self._group
            edges = np.unique(np.concatenate([[epoch * size], inner, [(epoch + 1) * size]]))
            keep_newest(self._epochs, epoch, edges, 2)
        return self._epochs[epoch]

    def _sorted(self, epoch: int, window: int, begin: int, end: int) -> list[tuple[int, int]]:
        """Passes and indices of the window's samples, in the order in which they come."""
        samples = [self._order.at(position) for position in range(begin, end)]
        ranked = np.argsort(self._ratios[[index for _, index in samples]], kind="stable")
        head = min(-begin % self._group, end - begin)  # what ends the step of the epoch before
        tail = (end - begin - head) % self._group  # what begins a step that the next epoch ends
        steps = (end - begin - head - tail) // self._group
        middle = steps // 2 * self._group
        partial = ranked[middle : middle + head + tail]
        whole = np.delete(ranked, np.s_[middle : middle + head + tail]).reshape(steps, self._group)
        mixed = whole[generator(self._seed, epoch, window, _STEPS).permutation(steps)]
        return [samples[place] for place in np.concatenate([partial[:head], mixed.ravel(), partial[head:]]).tolist()]


def padded(images: Sequence[Tensor], multiple: int) -> tuple[Tensor, Tensor]:
    """Images of any sizes, uint8 [3, h, w] each, as one tensor, and their sizes.

    Returns:
        uint8 [I, 3, H, W], 0 right of and below each image, H and W the largest of the batch rounded up to `multiple`;
        int64 [I, 2], height and width of each image in pixels.
    """
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).reshape(-1, 2)
    largest = [max((image.shape[side] for image in images), default=1) for side in (1, 2)]
    height, width = (-(-side // multiple) * multiple for side in largest)
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def stacked(images: Sequence[Tensor], image_size: int, aspect: Aspect | None) -> tuple[Tensor, Tensor | None]:
    """Images of a batch as one tensor: uint8 [I, 3, H, W] and, where they are padded, their sizes [I, 2]."""
    if aspect is not None:
        return padded(images, aspect.multiple)
    return torch.stack(list(images)) if images else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), None
