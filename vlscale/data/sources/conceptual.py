"""Conceptual Captions and Conceptual 12M: TSV files of captions and URLs, and a folder of what was downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlscale.data.sample import Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, read_lines, utf8
from vlscale.data.sources.naming import DownloadNames, flickr_alias

_EXPECTED = "caption<TAB>url (or url<TAB>caption), with an image path in a third column or none"
_NAMES = ("{row}_{crc32}", "{row:08d}.jpg", "{row:09d}.jpg", "{md5}.jpg", "{sha1}.jpg", "{crc32}", "{file}")
"""Of the common download scripts, in the order to try."""
_WEB = ("http://", "https://")


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    path = Path(source.path)
    images = Images(source, notes, path)
    names = DownloadNames(source, notes, images, _NAMES)
    split = file_split(path)
    first = 1
    for number, line in read_lines(path, _EXPECTED):
        if number == 1 and _is_header(line):
            first = 2
            continue
        sample = None
        with notes.record(path, f"line {number}"):
            sample = _sample(number - first, line, names, images, notes, split)
        if sample is not None:
            yield sample


def _is_header(line: bytes) -> bool:
    """img2dataset wants a line with the columns' names put before the published ones."""
    return {b"caption", b"url"} <= {column.strip().lower() for column in line.split(b"\t")}


def _sample(row: int, line: bytes, names: DownloadNames, images: Images, notes: Notes, split: str) -> Sample | None:
    """None for a blank line, and where image or caption are missing."""
    content = utf8(line)
    if not content.strip():
        return None
    columns = [column.strip() for column in content.split("\t")]
    if not 2 <= len(columns) <= 3:
        raise FieldError(f"expected two or three columns, {_EXPECTED}; got {len(columns)}")
    captions_first = columns[1].startswith(_WEB) and not (columns[0].startswith(_WEB) and " " in columns[1])
    caption, url = columns[:2] if captions_first else (columns[1], columns[0])
    if not url.startswith(_WEB):
        raise FieldError(f"expected {_EXPECTED}; got no http:// or https:// in the first two columns")
    if not caption:
        notes.counts["rows without caption"] += 1
        return None
    image = images.find(columns[2]) if len(columns) == 3 and columns[2] else names.find(row, url)
    if image is None:
        return None
    return Sample(str(row), image, (caption,), split, aliases=flickr_alias(url), extra={"url": url})


FORMATS = (
    Format(
        "cc",
        "Conceptual Captions or CC12M: TSV of caption and URL, with the folder of downloaded images",
        _read,
        suffixes=(".tsv",),
        signs=(r"(?m)^(?:[^\t\n]*\thttps?://[^\t\n]+|https?://[^\t\n]+\t[^\t\n]*)(?:\t[^\t\n]*)?\r?$",),
        keys=frozenset({"name"}),
    ),
)
