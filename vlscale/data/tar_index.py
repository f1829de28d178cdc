"""Where the samples of a WebDataset tar lie in it: one row a sample, for reading them in any order."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlscale.data.images import ImageError, upright_size
from vlscale.data.regions import LARGEST, MEMBER
from vlscale.data.sources.fields import FieldError, strings

INDEX = np.dtype(
    [
        ("image", "<u8"),
        ("image_length", "<u4"),
        ("second", "<u8"),
        ("second_length", "<u4"),
        ("record", "<u8"),
        ("record_length", "<u4"),
        ("text", "<u8"),
        ("text_length", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("captions", "<u4"),
        ("regions", "<u8"),
        ("regions_length", "<u4"),
    ]
)
"""Offset and length in bytes of a sample's image, second image, JSON record, plain text and regions (length 0: there is
none), width and height of the upright image in pixels, and how many captions it has that are not blank."""
BEFORE_REGIONS = np.dtype(INDEX.descr[:-2])
"""Layout of an index that was written before shards had regions: still read."""

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXT_ENDINGS = ("txt", "text", "caption")
_BLOCK = 512
_LARGEST_RECORD = 64 << 20


class _Group(NamedTuple):
    """The members of one sample: kind → (offset, length)."""

    key: str
    members: dict[str, tuple[int, int]]


def index_tar(path: Path) -> tuple[np.ndarray, list[str]]:
    """Rows of dtype INDEX in the tar's order, and what was left out, a line each.

    A sample is a run of files that share their name up to its first dot: an image, beside it `.json` (vlscale's record,
    or img2dataset's with `caption`), `.txt` (a caption), `.second.EXT` (the other image of a pair),
    `.regions.safetensors`. Links, and names that leave the tar, are left out. A tar that breaks off gives the samples
    before the break.

    Raises:
        OSError: the file can't be read. tarfile.ReadError: it is no uncompressed tar at all.
    """
    problems: list[str] = []
    rows = []
    with path.open("rb") as file:
        for group in _groups(file, path, problems):
            try:
                rows.append(_row(file, group))
            except (FieldError, ImageError) as error:
                problems.append(f"{path}: {group.key}: {error}")
    return np.array(rows, dtype=INDEX), problems


def same_rows(rows: np.ndarray, stored: np.ndarray) -> bool:
    """Whether an index, of today's layout or the one before, says of its tar what `rows` (dtype INDEX) say."""
    if stored.dtype == BEFORE_REGIONS and not rows["regions_length"].any():
        rows = rows[list(BEFORE_REGIONS.names or ())].astype(BEFORE_REGIONS)
    return rows.dtype == stored.dtype and np.array_equal(rows, stored)


def _groups(file: Any, path: Path, problems: list[str]) -> Iterator[_Group]:
    size = path.stat().st_size
    group = _Group("", {})
    for member in _members(file, path, problems):
        if member.isdir():
            continue
        if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
            problems.append(f"{path}: {member.name}: {_why_refused(member)}; left out")
            continue
        if member.offset_data + member.size > size:
            problems.append(f"{path}: breaks off inside {member.name}; the samples before it are used")
            break
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != group.key:
            if group.members:
                yield group
            group = _Group(key, {})
        kind = _kind(ending.lower())
        if kind and kind not in group.members:
            group.members[kind] = (member.offset_data, member.size)
    if group.members:
        yield group


def _members(file: Any, path: Path, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := _next(tar)) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
            yield member
        # tarfile takes a header that it can't read for the end, which is a block of zeros.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            problems.append(f"{path}: damaged or cut off at byte {tar.offset:,}; the samples before it are used")


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, EOFError):
        return None


def _why_refused(member: tarfile.TarInfo) -> str:
    return "the path leaves the tar" if member.isfile() else "a link or device, not a file"


def _kind(ending: str) -> str:
    if ending in IMAGE_ENDINGS:
        return "image"
    if ending.startswith("second.") and ending[7:] in IMAGE_ENDINGS:
        return "second"
    if ending in _TEXT_ENDINGS:
        return "text"
    return {"json": "record", MEMBER: "regions"}.get(ending, "")


def _row(file: Any, group: _Group) -> tuple[int, ...]:
    members = group.members
    if "image" not in members:
        raise FieldError("no image among its files")
    width, height = upright_size(_content(file, members["image"]))
    record = _content(file, members["record"]) if "record" in members else b""
    text = _content(file, members["text"]) if "text" in members else b""
    captions = sum(1 for caption in captions_of(read_record(record), text) if caption.strip())
    regions = members.get("regions", (0, 0))
    if regions[1] > LARGEST:
        raise FieldError(f"its regions have {regions[1]:,} bytes, more than {LARGEST:,}")
    places = [number for kind in ("image", "second", "record", "text") for number in members.get(kind, (0, 0))]
    return (*places, width, height, captions, *regions)


def _content(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def read_record(content: bytes) -> dict[str, Any]:
    """The JSON object beside an image; empty where there is none.

    Raises:
        FieldError: it is something else.
    """
    if not content:
        return {}
    if len(content) > _LARGEST_RECORD:
        raise FieldError(f"its JSON record has {len(content):,} bytes, more than {_LARGEST_RECORD:,}")
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FieldError(f"its JSON record can't be read ({error})") from None
    if not isinstance(row, dict):
        raise FieldError("its JSON record is no object")
    return row


def captions_of(row: dict[str, Any], text: bytes) -> tuple[str, ...]:
    """The captions of a sample: of vlscale's record, else the text file, else img2dataset's `caption`.

    Raises:
        FieldError: `captions` is no list of strings.
    """
    if "captions" in row:
        return strings(row, "captions")
    if text:
        return (text.decode("utf-8", "replace"),)
    caption = row.get("caption")
    return (caption,) if isinstance(caption, str) else ()


def member_name(header: bytes) -> str:
    """The name in a tar header of 512 bytes (ustar's prefix included)."""
    name, prefix = (header[a:b].split(b"\0")[0].decode("utf-8", "replace") for a, b in ((0, 100), (345, 500)))
    return f"{prefix}/{name}" if prefix and header[257:262] == b"ustar" else name
