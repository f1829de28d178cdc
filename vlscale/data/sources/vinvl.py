"""VinVL's and Oscar's TSV files: regions that a detector found, with their features, names and confidences.

Features are rows of key, number of boxes, base64, or of key and {"num_boxes", "features"}; predictions are rows of key
and {"objects": [{"class", "conf", "rect", "feature"?}], "image_w", "image_h"}; labels are rows of key and such objects.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlscale.data.sample import Box, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, each, get, is_number, kind, record, share_box, text, utf8
from vlscale.data.sources.tsv_file import TsvFile
from vlscale.errors import UserError

REGION_FEATURES = "region_features"
"""Key of `Sample.extra`: where the features are, for `read_features`."""
WIDTH = 2054
"""Of a region: 2048 features, then x1/W, y1/H, x2/W, y2/H, (x2-x1)/W, (y2-y1)/H."""

_PLACES = 6
_SLACK = 0.1
"""How far a detector's box may reach out of the image before it is taken for something else than a share."""
_OBJECTS = 'a list of {"class", "conf", "rect": [x1, y1, x2, y2]}'

Features = npt.NDArray[np.float32]
Size = tuple[float, float]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class _Object:
    name: str
    confidence: float | None
    rect: Box
    """In pixels."""
    feature: bool
    """Whether its features are there too."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row says; `pointer` leads to its features and `shares` are their boxes."""

    key: str
    objects: list[_Object] | None = None
    size: Size | None = None
    pointer: dict[str, Any] | None = None
    shares: tuple[Box, ...] = ()


def read_features(pointer: Mapping[str, Any]) -> Features:
    """[boxes, WIDTH] float32: the features that `Sample.extra[REGION_FEATURES]` points to.

    Raises:
        UserError: the file is gone or was changed, or what is there are no such features.
    """
    row = dict(pointer)
    file = str(row.get("file"))
    try:
        file = get(row, "file", str)
        offset, length = get(row, "offset", int), get(row, "length", int)
        content = _bytes_at(file, offset, length)
        if "size" in row:
            return _object_features(json.loads(utf8(content)), row)
        return _decoded(content, get(row, "boxes", int))
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error}); expected region features") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, byte {row.get('offset')}: {str(error)[:200]}; expected region features") from None


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    path = Path(source.path)
    images = None if source.images is None else Images(source, notes, path)
    labels = None if source.labels is None else TsvFile(Path(source.labels))
    sizes = {} if source.sizes is None else _sizes(TsvFile(Path(source.sizes)), notes)
    split = file_split(path)
    for number, offset, line in TsvFile(path).lines():
        sample = None
        with notes.record(path, f"line {number}"):
            unlabelled = _row(path, offset, line)
            row = unlabelled if labels is None else _labelled(unlabelled, labels, number - 1)
            if row is None:
                notes.counts["rows without labels"] += 1
                continue
            image = _image(row.key, images)
            sample = None if image is None else _sample(row, image, row.size or sizes.get(row.key), split)
        if sample is not None:
            yield sample


def _sample(row: _Row, image: Path, size: Size | None, split: str) -> Sample:
    objects = row.objects or []
    confidences = tuple(item.confidence for item in objects if item.confidence is not None)
    if len(confidences) not in {0, len(objects)}:
        raise FieldError(f'field "conf": expected it in all objects or in none, got it in {len(confidences)}')
    boxes, pointer = row.shares, row.pointer
    if objects and size is not None:
        boxes = tuple(share_box(x1, y1, x2 - x1, y2 - y1, *size) for x1, y1, x2, y2 in (item.rect for item in objects))
    elif objects and not boxes:
        raise FieldError('field "image_w" or "image_h": expected the image\'s size for its boxes; or give sizes=FILE')
    if pointer is not None and "size" in pointer and size is not None:
        pointer = pointer | {"size": list(size)}
    return Sample(
        id=row.key,
        image=image,
        split=split,
        boxes=boxes,
        tags=tuple(item.name for item in objects),
        confidences=confidences,
        extra={} if pointer is None else {REGION_FEATURES: pointer},
    )


def _image(key: str, images: Images | None) -> Path | None:
    """The key's image; without a folder a name that nobody looked for: the features stand for the image."""
    if images is None:
        return Path(f"{key}.jpg")
    return images.find(f"{key}.jpg", f"{key}.png", key)


def _row(path: Path, offset: int, line: bytes) -> _Row:
    """A row of the file."""
    columns = line.split(b"\t")
    key = _key(columns[0])
    pointer = {"file": str(path), "offset": offset, "length": 0, "boxes": 0, "width": WIDTH}
    if len(columns) == 3:
        if not columns[1].isdigit() or len(columns[1]) > 9:
            raise FieldError(f"column 2: expected the number of boxes, got {utf8(columns[1][:40])!r}")
        pointer |= {"offset": offset + len(columns[0]) + len(columns[1]) + 2, "boxes": int(columns[1])}
        return _featured(key, columns[2], pointer)
    if len(columns) != 2:
        raise FieldError(f"expected 2 or 3 columns, got {len(columns)}")
    start = offset + len(columns[0]) + 1
    value = _json(columns[1])
    if isinstance(value, dict) and "features" in value:
        encoded = get(value, "features", str, "base64").encode("utf-8", "surrogatepass")
        place = columns[1].find(encoded)
        if place < 0:
            raise FieldError('field "features": expected base64 without escapes')
        count = get(value, "num_boxes", int)
        return _featured(key, encoded, pointer | {"offset": start + place, "boxes": count})
    objects, size = _objects(value), _size(value) if isinstance(value, dict) and "image_w" in value else None
    if not objects or not all(item.feature for item in objects):
        return _Row(key, objects, size)
    place_in_file = {"offset": start, "length": len(columns[1]), "boxes": len(objects)}
    return _Row(key, objects, size, pointer | place_in_file | {"size": []})


def _featured(key: str, encoded: bytes, pointer: dict[str, Any]) -> _Row:
    """A row of features: checked, then only their places are kept."""
    encoded = encoded.rstrip()
    places = _decoded(encoded, pointer["boxes"])[:, WIDTH - _PLACES : WIDTH - 2].astype(float)
    if ((places < -_SLACK) | (places > 1 + _SLACK)).any():
        raise FieldError(
            f"expected x1/W, y1/H, x2/W, y2/H in columns 2048 to 2051, got {places.min():g} to {places.max():g}"
        )
    shares = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in places.clip(0, 1))
    return _Row(key, pointer=pointer | {"length": len(encoded)}, shares=shares)


def _labelled(row: _Row, labels: TsvFile, number: int) -> _Row | None:
    """The row with its objects from the labels file: in the row of the same number, or wherever its key is."""
    if row.objects is not None:
        raise FieldError("expected features beside labels=, got objects that have their own labels")
    key = row.key.encode()
    columns = labels[number] if number < len(labels) else [b""]
    if columns[0] != key:
        found = labels.row_of(key)
        if found is None:
            return None
        number, columns = found, labels[found]
    try:
        if len(columns) != 2:
            raise FieldError(f"expected 2 columns, got {len(columns)}")
        value = _json(columns[1])
        objects = _objects(value)
        if row.pointer is not None and len(objects) != row.pointer["boxes"]:
            raise FieldError(
                f"expected {row.pointer['boxes']} objects, one per region of the features, got {len(objects)}"
            )
        size = _size(value) if isinstance(value, dict) and "image_w" in value else None
    except FieldError as error:
        raise FieldError(f"labels in {labels.path}, line {number + 1}: {error}") from None
    return _Row(row.key, objects, size, row.pointer, row.shares)


def _sizes(file: TsvFile, notes: Notes) -> dict[str, Size]:
    """Key → width and height, of rows such as `key<TAB>[{"height": 480, "width": 640}]`."""
    found: dict[str, Size] = {}
    for number, _, line in file.lines():
        with notes.record(file.path, f"line {number}"):
            key, _, content = line.partition(b"\t")
            value = _json(content)
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            found[_key(key)] = _size(record(value), "width", "height")
    return found


def _size(row: dict[str, Any], width: str = "image_w", height: str = "image_h") -> Size:
    sides = get(row, width, float), get(row, height, float)
    for name, side in zip((width, height), sides, strict=True):
        if side <= 0:
            raise FieldError(f'field "{name}": expected a number above 0, got {side:g}')
    return sides


def _key(column: bytes) -> str:
    key = utf8(column)
    if not key or "\0" in key or key.startswith("/") or ".." in key.split("/"):
        raise FieldError(f"column 1: expected the key of an image, got {key[:40]!r}")
    return key


def _json(column: bytes) -> Any:
    try:
        return json.loads(utf8(column))
    except FieldError:
        raise
    except (ValueError, RecursionError):
        raise FieldError(f"column 2: not JSON, got {utf8(column[:30])!r}") from None


def _objects(value: Any) -> list[_Object]:
    """Of a list of objects, or of {"objects": list}."""
    if not isinstance(value, dict | list):
        raise FieldError(f"column 2: expected {_OBJECTS}, got {kind(value)}")
    return each(value if isinstance(value, dict) else {"objects": value}, "objects", _object, _OBJECTS)


def _object(row: dict[str, Any]) -> _Object:
    rect = get(row, "rect", list, "[x1, y1, x2, y2]")
    if len(rect) != 4 or not all(map(is_number, rect)) or rect[2] < rect[0] or rect[3] < rect[1]:
        raise FieldError(f'field "rect": expected [x1, y1, x2, y2], got {json.dumps(rect)[:60]}')
    confidence = get(row, "conf", float) if row.get("conf") is not None else None
    x1, y1, x2, y2 = map(float, rect)
    return _Object(text(row, "class"), confidence, (x1, y1, x2, y2), isinstance(row.get("feature"), str))


def _decoded(encoded: bytes, boxes: int, width: int = WIDTH) -> Features:
    """[boxes, width] of base64."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise FieldError(f"features: not base64 ({error})") from None
    if boxes < 0 or len(content) != boxes * width * 4:
        raise FieldError(
            f"features: expected {boxes} boxes × {width} numbers = {boxes * width * 4} bytes, got {len(content)}"
        )
    features = np.frombuffer(content, "<f4").reshape(boxes, width).astype(np.float32)
    if not np.isfinite(features).all():
        raise FieldError("features: expected finite numbers")
    return features


def _object_features(value: Any, pointer: dict[str, Any]) -> Features:
    """Of a row of predictions, whose objects have 2048 features each: their places are added."""
    width, height = _size(dict(zip(("image_w", "image_h"), get(pointer, "size", list), strict=True)))
    rows = []
    items = get(value, "objects", list) if isinstance(value, dict) else value
    for item, known in zip(items, _objects(value), strict=True):
        x1, y1, x2, y2 = known.rect
        places = x1 / width, y1 / height, x2 / width, y2 / height, (x2 - x1) / width, (y2 - y1) / height
        features = _decoded(get(item, "feature", str, "base64").encode(), 1, WIDTH - _PLACES)
        rows.append(np.concatenate([features[0], np.array(places, np.float32)]))
    if not rows or len(rows) != get(pointer, "boxes", int):
        raise FieldError(f"expected {get(pointer, 'boxes', int)} objects, got {len(rows)}")
    return np.stack(rows)


def _bytes_at(file: str, offset: int, length: int) -> bytes:
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if not 0 <= offset <= offset + length <= size:
            raise FieldError(f"the file has {size} bytes, expected {length} at {offset}")
        stream.seek(offset)
        return stream.read(length)


FORMATS = (
    Format(
        "vinvl",
        "VinVL/Oscar TSV: features.tsv with labels=FILE, or predictions.tsv; sizes=FILE has heights and widths",
        _read,
        suffixes=(".tsv",),
        signs=(
            r"\A[^\t\n]+\t(?:[0-9]+\t(?:[A-Za-z0-9+/]{64}|\r?\n)"
            r'|\{[^\n]*"(?:num_boxes|features|objects)"\s*:|\[[^\n]*"(?:class|rect)"\s*:)',
        ),
        keys=frozenset({"labels", "sizes"}),
    ),
)
