"""Open Images: CSV files of boxes and of labels of whole images, sorted by image."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from vlscale.data.sample import Box, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, read_lines, utf8
from vlscale.errors import UserError

IMAGE_TAGS = "image_tags"
"""Key of `Sample.extra`: name → confidence of the whole image's labels, where `tags` are those of the boxes."""

_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
_SIDES = ("XMin", "XMax", "YMin", "YMax")
_SLACK = 0.01
"""How far rounding may lead a box out of the image."""


@dataclass(frozen=True, slots=True)
class _Label:
    image: str
    name: str
    confidence: float
    box: Box | None


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per image, ordered by id; boxes and labels are merged as they are read."""
    path = Path(source.path)
    if source.classes is None:
        raise UserError(f"{source}: needs classes=FILE, the class descriptions CSV, which has the labels' names")
    names = _classes(Path(source.classes), notes)
    images = Images(source, notes, path)
    split = file_split(path)
    files = [path] if source.labels is None else [path, Path(source.labels)]
    rows = heapq.merge(*(_rows(file, names, notes) for file in files), key=lambda row: row.image)
    for image, group in groupby(rows, key=lambda row: row.image):
        labels = list(group)
        found = None
        with notes.record(path, f"image {image[:40]!r}"):
            found = images.find(*_image_names(image, split))
        if found is not None:
            yield _sample(image, found, split, labels, source.text == "tags")


def _sample(image: str, found: Path, split: str, labels: list[_Label], caption: bool) -> Sample:
    boxed = [label for label in labels if label.box is not None]
    whole: dict[str, float] = {}  # several people's verdicts on one label: the surest
    for label in labels:
        if label.box is None:
            whole[label.name] = max(label.confidence, whole.get(label.name, 0.0))
    names = [label.name for label in boxed]
    return Sample(
        id=image,
        image=found,
        captions=(", ".join(dict.fromkeys([*names, *whole])),) if caption else (),
        split=split,
        boxes=tuple(label.box for label in boxed if label.box is not None),
        tags=tuple(names or whole),
        confidences=tuple(label.confidence for label in boxed) or tuple(whole.values()),
        aliases=(f"openimages:{image}",),
        extra={IMAGE_TAGS: whole} if boxed and whole else {},
    )


def _image_names(image: str, split: str) -> list[str]:
    """Where an image may be: the train part is also downloaded in sixteen folders, by the id's first digit."""
    folder = "validation" if split == "val" else split
    name = f"{image}.jpg"
    return [name, f"{folder}/{name}", f"{folder}_{image[:1]}/{name}"]


def _classes(path: Path, notes: Notes) -> dict[str, str]:
    """Label → name in lower case, of a CSV with two columns and perhaps a header."""
    expected = "class descriptions: rows of LabelName,DisplayName"
    found: dict[str, str] = {}
    for number, line in read_lines(path, expected):
        with notes.record(path, f"line {number}"):
            cells = _cells(line)
            if cells and cells[0] != "LabelName":
                if len(cells) != 2 or not all(cells):
                    raise FieldError(f"expected LabelName,DisplayName, got {len(cells)} columns or an empty one")
                found[cells[0]] = cells[1].lower()
    if not found:
        raise UserError(f"{path}: holds no class; expected {expected}")
    return found


def _rows(path: Path, names: dict[str, str], notes: Notes) -> Iterator[_Label]:
    """The file's labels, without those that people found absent.

    Raises:
        UserError: there is no header, or rows are not sorted by image.
    """
    expected = "a CSV with the columns ImageID, LabelName, Confidence, and for boxes XMin, XMax, YMin, YMax"
    header: list[str] = []
    last = ""
    for number, line in read_lines(path, expected):
        label = None
        with notes.record(path, f"line {number}"):
            cells = _cells(line)
            if not header:
                header = _header(path, cells, expected)
            elif cells:
                if len(cells) != len(header):
                    raise FieldError(f"expected {len(header)} columns as in the header, got {len(cells)}")
                label = _label(dict(zip(header, cells, strict=True)), names)
        if label is None:
            continue
        if label.image < last:
            raise UserError(
                f'{path}, line {number}: field "ImageID": {label.image[:40]!r} comes after {last[:40]!r}; '
                "the file must be sorted by ImageID"
            )
        last = label.image
        # Confidence 0 of an image-level label: people looked and found that it is not there.
        if label.box is None and label.confidence == 0:
            notes.counts["labels verified absent"] += 1
        else:
            yield label
    if not header:
        raise UserError(f"{path}: is empty; expected {expected}")


def _cells(line: bytes) -> list[str]:
    """Of one line; no field of these files goes over several."""
    try:
        return next(csv.reader([utf8(line)], strict=True), [])
    except csv.Error as error:
        raise FieldError(f"not CSV ({error})") from None


def _header(path: Path, cells: list[str], expected: str) -> list[str]:
    boxes = any(side in cells for side in _SIDES)
    for column in (*_LABEL_COLUMNS, *(_SIDES if boxes else ())):
        if column not in cells:
            raise UserError(f"{path}, line 1: no column {column}; expected {expected}")
    return cells


def _label(row: dict[str, str], names: dict[str, str]) -> _Label:
    if not row["ImageID"]:
        raise FieldError('field "ImageID": expected the id of an image, got an empty string')
    name = names.get(row["LabelName"])
    if name is None:
        raise FieldError(f'field "LabelName": expected a label of the classes, got {row["LabelName"][:40]!r}')
    box = None
    if "XMin" in row:
        x1, x2, y1, y2 = (_share(row, side) for side in _SIDES)
        if x2 < x1 or y2 < y1:
            sides = ", ".join(f"{value:g}" for value in (x1, x2, y1, y2))
            raise FieldError(f'field "XMax" or "YMax": expected XMin <= XMax and YMin <= YMax, got {sides}')
        box = x1, y1, x2, y2
    return _Label(row["ImageID"], name, _share(row, "Confidence"), box)


def _share(row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    if not -_SLACK <= value <= 1 + _SLACK:
        raise FieldError(f'field "{column}": expected a number from 0 to 1, got {row[column][:40]!r}')
    return min(max(value, 0.0), 1.0)


FORMATS = (
    Format(
        "open-images",
        "Open Images: boxes CSV or image-level labels CSV, with classes=FILE, and labels=FILE beside boxes",
        _read,
        suffixes=(".csv",),
        signs=(r"\A\ufeff?ImageID,(?:\w+,)*LabelName,(?:\w+,)*Confidence\b",),
        keys=frozenset({"classes", "labels"}),
    ),
)
