"""vlscale's own format: one JSON object a line, `{"image": path, "captions": [...], "id"?, "split"?, …}`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.data.sample import Sample
from vlscale.errors import UserError

KNOWN = ("image", "captions", "id", "split", "boxes", "tags", "tuples")
"""Keys with a meaning; every other key goes to `Sample.extra` as it is."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file: what it holds, or why it can't be used."""

    number: int
    sample: Sample | None
    error: str = ""


def read_jsonl(path: Path, image_root: Path | None = None) -> list[Sample]:
    """Every record of the file, in its order.

    Image paths are looked for under `image_root`, else beside the file, else in `images/` beside it; one that is in
    none of them stays in the list (the stream replaces and names it). Absolute paths and `..` are taken as written.

    Raises:
        UserError: the file can't be read, holds no record, or one is wrong (names line, field and expectation).
    """
    samples = []
    for line in scan_jsonl(path, image_root):
        if line.sample is None:
            raise UserError(line.error)
        samples.append(line.sample)
    if not samples:
        raise UserError(f'{path}: holds no record; expected lines such as {{"image": "a.jpg", "captions": ["a dog"]}}')
    return samples


def scan_jsonl(path: Path, image_root: Path | None = None) -> Iterator[Line]:
    """Every line that is not blank, with its record or its error; raises UserError only if the file can't be read."""
    if image_root is not None and not image_root.is_dir():
        raise UserError(f"image root {image_root}: no such folder; give the folder that image paths are relative to")
    roots = [path.parent, path.parent / "images"]
    if image_root is not None:
        roots.insert(0, image_root)
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _line(path, number, raw, roots)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected a jsonl file") from None


def _line(path: Path, number: int, raw: bytes, roots: list[Path]) -> Line:
    try:
        return Line(number, _sample(json.loads(raw.decode("utf-8-sig")), roots))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; save the file as UTF-8"
    except (json.JSONDecodeError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        reason = f"not JSON ({message}); expected one object a line"
    except ValueError as error:
        reason = str(error)
    return Line(number, None, f"{path}, line {number}: {reason}")


def _sample(record: Any, roots: list[Path]) -> Sample:
    """Raises ValueError naming the field and what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_kind(record)}")
    image = record.get("image")
    if not isinstance(image, str) or not image:
        raise ValueError(f'field "image": expected the path of an image, got {_kind(image)}')
    identity = record.get("id")
    if identity is not None and (not isinstance(identity, str | int) or identity == ""):
        raise ValueError(f'field "id": expected a string or a whole number, got {_kind(identity)}')
    split = record.get("split")
    if split is not None and not isinstance(split, str):
        raise ValueError(f'field "split": expected a name such as "train", got {_kind(split)}')
    return Sample(
        id=image if identity is None else str(identity),
        image=_locate(image, roots),
        captions=_strings(record, "captions"),
        split=split or "train",
        boxes=_boxes(record),
        tags=_strings(record, "tags"),
        tuples=_tuples(record),
        extra={key: value for key, value in record.items() if key not in KNOWN},
    )


def _locate(image: str, roots: list[Path]) -> Path:
    if "\0" in image:
        raise ValueError('field "image": the path holds a zero byte')
    for root in roots:
        candidate = os.path.join(root, image)
        if os.path.isfile(candidate):
            return Path(candidate)
    return Path(os.path.join(roots[0], image))


def _strings(record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f'field "{key}": expected a list of strings, got {_kind(value)}')
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f'field "{key}": expected a list of strings, got {_kind(item)} in it')
    return tuple(value)


def _boxes(record: dict[str, Any]) -> tuple[tuple[float, float, float, float], ...]:
    value = record.get("boxes")
    if value is None:
        return ()
    wanted = "expected a list of [x1, y1, x2, y2] in shares of width and height"
    if not isinstance(value, list):
        raise ValueError(f'field "boxes": {wanted}, got {_kind(value)}')
    boxes = []
    for box in value:
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
            raise ValueError(f'field "boxes": {wanted}, got {json.dumps(box)[:60]}')
        boxes.append((float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    return tuple(boxes)


def _tuples(record: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    value = record.get("tuples")
    if value is None:
        return ()
    wanted = "expected a list of lists of one to three strings"
    if not isinstance(value, list):
        raise ValueError(f'field "tuples": {wanted}, got {_kind(value)}')
    for item in value:
        if not isinstance(item, list) or not 1 <= len(item) <= 3 or not all(isinstance(word, str) for word in item):
            raise ValueError(f'field "tuples": {wanted}, got {json.dumps(item)[:60]}')
    return tuple(tuple(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    """A JSON value's type in words, for errors."""
    if value is None:
        return "nothing"
    if value == "":
        return "an empty string"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]
