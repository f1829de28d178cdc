"""Samples by index, wherever they lie: in memory, in shards, or joined of several sources with weights."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from vlscale.data.order import Part
from vlscale.data.records import from_record, to_record
from vlscale.data.sample import ImageFile, Sample, SampleError, TarMember

_log = logging.getLogger(__name__)


class Corpus(Sequence[Sample]):
    """A data set, or the part of it that some splits are. Cheap to send to a loader process."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample, or a list of several.

        Raises:
            SampleError: it can't be read any more.
        """
        if isinstance(index, slice):
            return [self.sample(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.sample(index % len(self))

    def sample(self, index: int) -> Sample:
        """The sample of 0 ≤ index < len.

        Raises:
            SampleError: it can't be read any more.
        """
        raise NotImplementedError

    def readable(self) -> Iterator[Sample]:
        """All samples in order, but those that can't be read any more, which are named in the log."""
        for index in range(len(self)):
            try:
                yield self.sample(index)
            except SampleError as error:
                _log.warning("%s: %s; left out", self.where(index), error)

    def where(self, index: int) -> str:
        """Names the sample without reading it, for what goes wrong with it."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """How samples lie together and how often they come, for the order."""
        raise NotImplementedError

    def per_epoch(self) -> int:
        """Samples that an epoch of training takes, weights counted."""
        return sum(part.per_epoch() for part in self.parts())

    def splits(self) -> dict[str, int]:
        """Samples per split, most first."""
        raise NotImplementedError

    def select(self, splits: Collection[str], captioned: bool = True) -> Corpus:
        """The samples of these splits, in their order; `captioned`: only those that have a caption."""
        raise NotImplementedError


class SampleList(Corpus):
    """Samples in memory. Loader processes share one packed copy of them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples: Sequence[Sample] = samples
        self._packed: _Packed | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        return self._samples[index]

    def where(self, index: int) -> str:
        return str(self._samples[index].image)

    def parts(self) -> list[Part]:
        return [Part(np.ones(len(self), dtype=np.int64))]

    def splits(self) -> dict[str, int]:
        return dict(Counter(sample.split for sample in self._samples).most_common())

    def select(self, splits: Collection[str], captioned: bool = True) -> SampleList:
        chosen = (sample for sample in self._samples if sample.split in splits)
        return SampleList([sample for sample in chosen if not captioned or has_caption(sample)])

    def __getstate__(self) -> dict[str, Any]:
        if self._packed is None:
            self._packed = self._samples if isinstance(self._samples, _Packed) else _Packed.of(self._samples)
        return {"_samples": self._packed, "_packed": self._packed}


class Joined(Corpus):
    """Several data sets, one after the other; `weights` say how often a sample of each comes per epoch."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        self._corpora, self._weights = list(corpora), list(weights)
        self._ends = np.cumsum([len(corpus) for corpus in self._corpora])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int) -> Sample:
        corpus, inside = self._find(index)
        return corpus.sample(inside)

    def where(self, index: int) -> str:
        corpus, inside = self._find(index)
        return corpus.where(inside)

    def parts(self) -> list[Part]:
        return [
            Part(part.blocks, part.weight * weight)
            for corpus, weight in zip(self._corpora, self._weights, strict=True)
            for part in corpus.parts()
        ]

    def splits(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for corpus in self._corpora:
            counts.update(corpus.splits())
        return dict(counts.most_common())

    def select(self, splits: Collection[str], captioned: bool = True) -> Joined:
        return Joined([corpus.select(splits, captioned) for corpus in self._corpora], self._weights)

    def _find(self, index: int) -> tuple[Corpus, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._corpora[number], index - (int(self._ends[number - 1]) if number else 0)


def as_corpus(samples: Sequence[Sample]) -> Corpus:
    """The samples themselves, or a corpus of the list."""
    return samples if isinstance(samples, Corpus) else SampleList(samples)


def without(corpus: Corpus, unwanted: Callable[[Sample], bool]) -> tuple[SampleList, int]:
    """The samples that are not unwanted, in memory, and how many were. Reads every sample."""
    kept = [sample for sample in corpus.readable() if not unwanted(sample)]
    return SampleList(kept), len(corpus) - len(kept)


def has_caption(sample: Sample) -> bool:
    """Whether there is a caption that is not blank."""
    return any(caption.strip() for caption in sample.captions)


def image_identity(sample: Sample) -> str:
    """What two samples share that show the same photograph, as far as their sources tell."""
    for kind in ("coco:", "flickr:", ""):
        for alias in sample.aliases:
            if alias.startswith(kind):
                return alias
    return str(sample.image)


class _Packed(Sequence[Sample]):
    """Samples as bytes in two tensors: what torch shares between processes instead of copying."""

    def __init__(self, content: Tensor, ends: Tensor) -> None:
        self._content, self._ends = content, ends

    @staticmethod
    def of(samples: Iterable[Sample]) -> _Packed:
        lines = [_pack(sample) for sample in samples]
        content = torch.frombuffer(bytearray(b"".join(lines) or b"\0"), dtype=torch.uint8)
        return _Packed(content, torch.tensor([len(line) for line in lines], dtype=torch.int64).cumsum(0))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        begin = int(self._ends[index - 1]) if index else 0
        return _unpack(self._content[begin : int(self._ends[index])].numpy().tobytes())

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _pack(sample: Sample) -> bytes:
    row = to_record(sample)
    row["image"], row["second"] = _place(sample.image), sample.second and _place(sample.second)
    return json.dumps(row).encode()


def _unpack(line: bytes) -> Sample:
    row = json.loads(line)
    second = row["second"] and _file(row["second"])
    return from_record(row, "", _file(row["image"]), second)


def _place(file: ImageFile) -> str | list[str | int]:
    return [file.tar, file.name, file.offset, file.length] if isinstance(file, TarMember) else str(file)


def _file(place: Any) -> ImageFile:
    return TarMember(*place) if isinstance(place, list) else Path(place)
