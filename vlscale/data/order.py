"""Which sample comes at which position: a function of (seed, epoch) and the data alone (architecture.md)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_RUNS = (0, 1)
"""What the generator of an epoch's runs is named by, besides (seed, epoch); windows are named by their number."""


class Order(Protocol):
    """The concatenated epochs: position in the whole training → how often the sample came before, and its index."""

    def __len__(self) -> int:
        """Samples per epoch."""
        ...

    def at(self, position: int) -> tuple[int, int]:
        """Pass and sample index of a position ≥ 0. Caption, crop and augmentation are drawn from the pass."""
        ...


class Part(NamedTuple):
    """Consecutive samples of the data."""

    blocks: np.ndarray
    """int64: sizes of consecutive groups that lie together in storage, such as shards; 1 each where nothing does."""
    weight: float = 1.0
    """How often each sample comes per epoch."""

    def per_epoch(self) -> int:
        """Samples an epoch takes of it."""
        size = int(self.blocks.sum())
        return max(1, round(self.weight * size)) if size else 0


class _Runs(NamedTuple):
    """The samples of an epoch as stretches of consecutive indices."""

    passes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class ShuffledOrder:
    """Every epoch in another order: runs (shards) are permuted, then samples within windows of consecutive runs.

    Data that fits into one window is shuffled as a whole, whatever its storage, so that jsonl files and the shards
    made of them have one order. A part of weight w gives round(w · n) samples an epoch: it is walked through again and
    again from its beginning, and each epoch takes the next stretch of the walk. So over the epochs every sample comes
    equally often, and a sample that comes twice in an epoch comes in different passes.
    """

    def __init__(self, parts: Sequence[Part], seed: int, window: int) -> None:
        """
        Args:
            window: about how many samples are shuffled together; reading jumps among as many.
        """
        self._parts = [part for part in parts if int(part.blocks.sum()) > 0]
        self._shares = [part.per_epoch() for part in self._parts]
        self._size, self._seed, self._window = sum(self._shares), seed, window
        self._epochs: OrderedDict[int, tuple[_Runs, np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self._size)
        _, window_starts, _ = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        passes, indices = self._shuffled(epoch, window)
        place = offset - int(window_starts[window])
        return int(passes[place]), int(indices[place])

    def _epoch(self, epoch: int) -> tuple[_Runs, np.ndarray, np.ndarray]:
        """Permuted runs, the position at which each window starts, and the run at which it does."""
        if epoch not in self._epochs:
            runs = self._runs(epoch)
            count = max(1, round(self._size / self._window))
            if count > 1:
                chosen = generator(self._seed, epoch, *_RUNS).permutation(len(runs.starts))
                runs = _Runs(*(column[chosen] for column in runs))
            ends = np.cumsum(runs.lengths)
            # Equal shares, each ended by the run that fills it.
            goals = np.arange(1, count) * (self._size / count)
            first_runs = np.unique(np.concatenate([[0], np.searchsorted(ends, goals) + 1]))
            first_runs = first_runs[first_runs < len(ends)]
            starts = np.concatenate([[0], ends])[first_runs]
            keep_newest(self._epochs, epoch, (runs, starts, first_runs), 2)  # a step may straddle two epochs
        return self._epochs[epoch]

    def _runs(self, epoch: int) -> _Runs:
        columns: list[_Runs] = []
        first = 0
        for part, share in zip(self._parts, self._shares, strict=True):
            edges = np.concatenate([[0], np.cumsum(part.blocks)]).astype(np.int64)
            size = int(edges[-1])
            begin, end = epoch * share, (epoch + 1) * share
            cuts = [
                np.clip(edges[:-1] + walk * size, begin, end) for walk in range(begin // size, (end - 1) // size + 1)
            ]
            starts = np.unique(np.concatenate([*cuts, [begin]]))
            starts = starts[starts < end]
            lengths = np.diff(np.append(starts, end))
            columns.append(_Runs(starts // size, first + starts % size, lengths))
            first += size
        return _Runs(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def _shuffled(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Passes and indices of a window's samples, in the order in which they come."""
        key = (epoch, window)
        if key not in self._windows:
            runs, _, first_runs = self._epoch(epoch)
            last = first_runs[window + 1] if window + 1 < len(first_runs) else len(runs.starts)
            chosen = slice(int(first_runs[window]), int(last))
            lengths = runs.lengths[chosen]
            inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            indices = np.repeat(runs.starts[chosen], lengths) + inside
            passes = np.repeat(runs.passes[chosen], lengths)
            drawn = generator(self._seed, epoch, window).permutation(len(indices))
            keep_newest(self._windows, key, (passes[drawn], indices[drawn]), 2)  # a batch may straddle two windows
        return self._windows[key]


def layout_of(parts: Sequence[Part]) -> str:
    """What an order depends on besides seed and window, in a few characters: sizes of parts and blocks, and weights."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{part.weight!r} {len(part.blocks)} ".encode() + part.blocks.astype("<i8").tobytes())
    return f"{sum(int(part.blocks.sum()) for part in parts)}-{digest.hexdigest()}"


def generator(seed: int, *rest: int) -> np.random.Generator:
    """The random generator that (seed, …) names, equal in every process."""
    # SeedSequence takes no negative numbers: the sign goes beside them.
    sequence = np.random.SeedSequence([abs(seed), *rest], spawn_key=(1,) if seed < 0 else ())
    return np.random.Generator(np.random.PCG64(sequence))


def number_of(identity: str) -> int:
    """A 64-bit number of a name, equal in every process."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keep_newest(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add to a cache, and drop what was added first where there are more than `most` then."""
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
