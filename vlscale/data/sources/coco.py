"""COCO: captions and instances of 2014 and 2017, and other data sets that come in the same JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.sample import Box, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, get, is_number, read_json_members, record, share_box, text
from vlscale.data.sources.naming import coco_files, coco_number, flickr_alias
from vlscale.errors import UserError

_EXPECTED = "COCO's captions or instances: an object with images and annotations"
_LISTS = ("images", "annotations")
_BOX = "[left, top, width, height] in pixels"


@dataclass(slots=True)
class _Found:
    """What annotations say of one image; numbers are those of the annotation records."""

    captions: list[str] = field(default_factory=list)
    boxes: list[tuple[int, tuple[float, float, float, float], str]] = field(default_factory=list)
    """Number, box in pixels and category id."""
    first: int = 0
    """Number of the first annotation of the image."""


@dataclass(frozen=True, slots=True)
class _Image:
    name: str
    file: Path
    aliases: tuple[str, ...]
    width: float
    height: float


@dataclass(slots=True)
class _File:
    """A file's records: annotations stand before or behind what they refer to, so all are read before the first use."""

    images: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    """Id → number of the record, and the record."""
    found: defaultdict[str, _Found] = field(default_factory=lambda: defaultdict(_Found))
    """Image id → what belongs to it."""
    categories: dict[str, str] = field(default_factory=dict)


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    path = Path(source.path)
    images = Images(source, notes, path)
    file = _load(path, notes)
    for identity, found in file.found.items():
        with notes.record(path, f"annotations, record {found.first}"):
            if identity not in file.images:
                raise FieldError(f'field "image_id": expected the id of one of the images, got {identity!r}')
    split = file_split(path)
    for identity, (number, row) in file.images.items():
        image, found = None, file.found.get(identity, _Found())
        with notes.record(path, f"images, record {number}"):
            image = _image(identity, row, images, sized=bool(found.boxes))
        if image is not None:
            boxes, tags = _boxes(path, image, found, file.categories, notes)
            yield Sample(image.name, image.file, tuple(found.captions), split, boxes, tags, aliases=image.aliases)


def _load(path: Path, notes: Notes) -> _File:
    """Everything but the outlines, which are most of the file."""
    file = _File()
    numbers: defaultdict[str, int] = defaultdict(int)
    for key, value in read_json_members(path, _EXPECTED, _LISTS):
        numbers[key] += 1
        with notes.record(path, f"{key}, record {numbers[key]}"):
            if key == "images":
                _add_image(file, numbers[key], record(value))
            elif key == "annotations":
                _add_annotation(file, numbers[key], record(value), notes)
        if key == "categories":
            _add_categories(file, value, path, notes)
    # test splits are published as images alone
    for key in ("images",) if file_split(path).startswith("test") else _LISTS:
        if not numbers[key]:
            raise UserError(
                f'{path}: field "{key}": expected a list, got nothing or an empty one; expected {_EXPECTED}'
            )
    return file


def _add_image(file: _File, number: int, row: dict[str, Any]) -> None:
    identity = text(row, "id", "a number")
    if identity in file.images:
        raise FieldError(f'field "id": expected another number than that of an earlier image, got {identity!r} again')
    file.images[identity] = number, row


def _add_annotation(file: _File, number: int, row: dict[str, Any], notes: Notes) -> None:
    identity = text(row, "image_id", "the id of an image")
    caption, box, category = None, None, ""
    if "caption" in row:
        caption = get(row, "caption", str).strip()
        if not caption:
            notes.counts["empty captions"] += 1
    elif "bbox" in row:
        box = _box(row)
        category = text(row, "category_id", "the id of a category")
        if get(row, "iscrowd", int, "0 or 1", default=0):
            notes.counts["boxes of crowds"] += 1
            box = None
    else:
        raise FieldError('field "caption": expected a caption, or a box in field "bbox"; got neither')
    found = file.found[identity]
    found.first = found.first or number
    if caption:
        found.captions.append(caption)
    if box is not None:
        found.boxes.append((number, box, category))


def _box(row: dict[str, Any]) -> tuple[float, float, float, float]:
    box = get(row, "bbox", list, _BOX)
    if len(box) != 4 or not all(is_number(value) for value in box):
        raise FieldError(f'field "bbox": expected {_BOX}, got {str(box)[:60]}')
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def _add_categories(file: _File, value: Any, path: Path, notes: Notes) -> None:
    rows: list[Any] = []
    with notes.record(path, "categories"):
        rows = get({"categories": value}, "categories", list)
    for number, item in enumerate(rows, start=1):
        with notes.record(path, f"categories, record {number}"):
            row = record(item)
            file.categories[text(row, "id", "a number")] = text(row, "name")


def _image(identity: str, row: dict[str, Any], images: Images, sized: bool) -> _Image | None:
    """What the record says of the image, its size only where it is needed; None where the file is missing."""
    name = text(row, "file_name", "the name of the image file")
    width = get(row, "width", float, "the image's width in pixels") if sized else 1
    height = get(row, "height", float, "the image's height in pixels") if sized else 1
    if width <= 0 or height <= 0:
        raise FieldError(f'fields "width" and "height": expected numbers above 0, got {width:g} and {height:g}')
    # other data sets in this layout number their images too: those numbers aren't COCO's
    own = (f"coco:{identity}",) if coco_number(name) == identity else ()
    photo = flickr_alias(get(row, "flickr_url", str, default=""))
    file = images.find(*coco_files(name))
    return None if file is None else _Image(name, file, own + photo, float(width), float(height))


def _boxes(
    path: Path, image: _Image, found: _Found, categories: dict[str, str], notes: Notes
) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    """The image's boxes as shares, and the names of their categories."""
    boxes: list[Box] = []
    tags: list[str] = []
    for number, box, category in found.boxes:
        with notes.record(path, f"annotations, record {number}"):
            if category not in categories:
                raise FieldError(f'field "category_id": expected the id of one of the categories, got {category!r}')
            share = share_box(*box, image.width, image.height)
            if share[0] < share[2] and share[1] < share[3]:
                boxes.append(share)
                tags.append(categories[category])
            else:
                notes.counts["boxes without area in the image"] += 1
    return tuple(boxes), tuple(tags)


FORMATS = (
    Format(
        "coco",
        "COCO captions or instances (captions_*.json, instances_*.json): captions, or boxes with category names",
        _read,
        suffixes=(".json",),
        signs=(r'"file_name"\s*:', r'"image_id"\s*:', r'"(?:caption|bbox)"\s*:'),
    ),
)
