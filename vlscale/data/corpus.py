"""Samples by index, wherever they lie: in memory, in shards, or joined of several sources with weights."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from vlscale.data.aspect import aspect_ratios
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

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample of 0 ≤ index < len.

        Raises:
            SampleError: it can't be read any more.
        """

    def readable(self) -> Iterator[Sample]:
        """All samples in order, but those that can't be read any more, which are named in the log."""
        for index in range(len(self)):
            try:
                yield self.sample(index)
            except SampleError as error:
                _log.warning("%s: %s; left out", self.where(index), error)

    @abstractmethod
    def where(self, index: int) -> str:
        """Names the sample without reading it, for what goes wrong with it."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """How samples lie together and how often they come, for the order."""

    def per_epoch(self) -> int:
        """Samples that an epoch of training takes, weights counted."""
        return sum(part.per_epoch() for part in self.parts())

    @abstractmethod
    def aspects(self) -> np.ndarray:
        """Width over height of every sample's upright image, float32 [N]; 1 where it can't be read."""

    @abstractmethod
    def splits(self) -> dict[str, int]:
        """Samples per split, most first."""

    @abstractmethod
    def select(self, splits: Collection[str], captioned: bool = True) -> Corpus:
        """The samples of these splits, in their order; `captioned`: only those that have a caption."""


class SampleList(Corpus):
    """Samples in memory: a list as it is, or packed, which takes a few hundred bytes each and no copy per process."""

    def __init__(self, samples: Sequence[Sample], chosen: np.ndarray | None = None) -> None:
        """`chosen`: indices of those that count, int64; None: all."""
        self._samples, self._chosen = samples, chosen
        self._aspects: np.ndarray | None = None

    @staticmethod
    def packed(samples: Iterable[Sample]) -> SampleList:
        """Of samples that come one by one and need not fit into memory as they are."""
        return SampleList(_Packed.of(samples))

    def __len__(self) -> int:
        return len(self._samples) if self._chosen is None else len(self._chosen)

    def sample(self, index: int) -> Sample:
        return self._samples[index if self._chosen is None else int(self._chosen[index])]

    def where(self, index: int) -> str:
        return str(self.sample(index).image)

    def parts(self) -> list[Part]:
        return [Part(np.ones(len(self), dtype=np.int64))]

    def aspects(self) -> np.ndarray:
        if self._aspects is None:  # every file is opened: once is enough
            self._aspects = aspect_ratios(len(self), lambda index: self.sample(index).image)
        return self._aspects

    def splits(self) -> dict[str, int]:
        return dict(Counter(split for _, split, _ in self._facts()).most_common())

    def select(self, splits: Collection[str], captioned: bool = True) -> SampleList:
        chosen = [index for index, split, has in self._facts() if split in splits and (has or not captioned)]
        return SampleList(self._samples, np.array(chosen, dtype=np.int64))

    def _facts(self) -> Iterator[tuple[int, str, bool]]:
        """Index in what is stored, split, and whether there is a caption, of each sample that counts."""
        for index in range(len(self._samples)) if self._chosen is None else self._chosen.tolist():
            if isinstance(self._samples, _Packed):
                yield index, *self._samples.facts(index)
            else:
                yield index, self._samples[index].split, has_caption(self._samples[index])

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._samples, _Packed):
            self._samples = _Packed.of(self._samples)
        return {"_samples": self._samples, "_chosen": self._chosen, "_aspects": self._aspects}


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

    def aspects(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.float32), *(corpus.aspects() for corpus in self._corpora)])

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
    kept = SampleList.packed(sample for sample in corpus.readable() if not unwanted(sample))
    return kept, len(corpus) - len(kept)


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
    """Samples as bytes in tensors: what torch shares between processes instead of copying."""

    def __init__(self, content: Tensor, ends: Tensor, facts: Tensor, names: list[str]) -> None:
        """
        Args:
            content: uint8, a JSON object after the other.
            ends: [N] int64, where each ends.
            facts: [N] int32, number of the split in `names`, times two, plus one where there is a caption.
        """
        self._content, self._ends, self._facts, self._names = content, ends, facts, names

    @staticmethod
    def of(samples: Iterable[Sample]) -> _Packed:
        content, ends, facts = bytearray(), array("q"), array("i")
        names: dict[str, int] = {}
        for sample in samples:
            content += _pack(sample)
            ends.append(len(content))
            facts.append(2 * names.setdefault(sample.split, len(names)) + has_caption(sample))
        return _Packed(
            torch.frombuffer(content or bytearray(1), dtype=torch.uint8),
            torch.tensor(ends, dtype=torch.int64),
            torch.tensor(facts, dtype=torch.int32),
            list(names),
        )

    def facts(self, index: int) -> tuple[str, bool]:
        """Split, and whether there is a caption."""
        fact = int(self._facts[index])
        return self._names[fact // 2], bool(fact % 2)

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
    return json.dumps([row, sample.regions and _place(sample.regions)]).encode()


def _unpack(line: bytes) -> Sample:
    row, regions = json.loads(line)
    second = row["second"] and _file(row["second"])
    sample = from_record(row, "", _file(row["image"]), second)
    return replace(sample, regions=TarMember(*regions)) if regions else sample


def _place(file: ImageFile) -> str | list[str | int]:
    return [file.tar, file.name, file.offset, file.length] if isinstance(file, TarMember) else str(file)


def _file(place: Any) -> ImageFile:
    return TarMember(*place) if isinstance(place, list) else Path(place)
