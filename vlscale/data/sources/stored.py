"""Shards and tars as sources: images and records lie in them already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlscale.data.corpus import Corpus
from vlscale.data.sample import Sample, SampleError
from vlscale.data.shards import is_shards, open_shards, open_tars
from vlscale.data.sources.base import Format, Notes, Source
from vlscale.errors import UserError

__all__ = ["FORMATS", "is_folder_of_tars", "is_shards", "open_stored"]


def open_stored(source: Source, skip_broken: bool = False) -> Corpus:
    """Shards or tars by index, every split.

    Raises:
        UserError: they are not there, or damaged and not to be skipped.
    """
    if source.format == "shards":
        return open_shards(Path(source.path), skip_broken)
    return open_tars(source.path, source.split or "train", skip_broken)


def is_folder_of_tars(path: Path) -> bool:
    """Whether there are tars in the folder."""
    return path.is_dir() and next(path.glob("*.tar"), None) is not None


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    corpus = open_stored(source)
    for index in range(len(corpus)):
        try:
            yield corpus.sample(index)
        except SampleError as error:
            line = f"{corpus.where(index)}: {error}"
            if notes.strict:
                raise UserError(line) from None
            notes.problems.append(line)


_DECIDED = frozenset({"images", "splits", "text", "boxes"})
"""They were settled when the tars were written."""

FORMATS = (
    Format("shards", "a folder of `vlscale data shards`", _read, unused=_DECIDED | {"split"}),
    Format(
        "tars", "WebDataset tars such as img2dataset's: a tar, a folder, {00000..00012}.tar", _read, unused=_DECIDED
    ),
)
