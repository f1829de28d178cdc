"""Checked access to the fields of a record: whatever is missing or of another kind is named, with what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from vlscale.data.sample import Box
from vlscale.errors import UserError

T = TypeVar("T")

NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class FieldError(ValueError):
    """A field that is not what was expected: names both; who reads the file adds file and record."""


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "nothing"
    if value == "":
        return "an empty string"
    return NAMES[type(value)]


def record(value: Any) -> dict[str, Any]:
    """The value as an object."""
    if not isinstance(value, dict):
        raise FieldError(f"expected an object, got {kind(value)}")
    return value


def get(row: dict[str, Any], key: str, wanted: type[T], expected: str = "", default: T | None = None) -> T:
    """The field as `wanted`, or `default` where it is absent or null.

    Args:
        wanted: str, int, float (whole numbers count), list, dict or bool.
        expected: what to say instead of the type's name.

    Raises:
        FieldError: absent without default, or of another type.
    """
    value = row.get(key)
    if value is None and default is not None:
        return default
    fits = isinstance(value, wanted) if wanted is not float else is_number(value)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise FieldError(f'field "{key}": expected {expected or NAMES[wanted]}, got {kind(value)}')
    return value  # type: ignore[return-value]


def text(row: dict[str, Any], key: str, expected: str = "a string") -> str:
    """The field as a string that is not empty; a whole number counts (ids come as both)."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise FieldError(f'field "{key}": expected {expected}, got {kind(value)}')
    return value


def strings(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """The field as a list of strings; absent: none."""
    value = get(row, key, list, "a list of strings", default=[])
    for item in value:
        if not isinstance(item, str):
            raise FieldError(f'field "{key}": expected a list of strings, got {kind(item)} in it')
    return tuple(value)


def is_number(value: Any) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def share_box(x: float, y: float, width: float, height: float, image_width: float, image_height: float) -> Box:
    """Left, top, width, height in pixels → x1, y1, x2, y2 as shares, cut at the image's edges."""
    if image_width <= 0 or image_height <= 0:
        raise FieldError(f"expected an image size above 0 for its boxes, got {image_width:g} × {image_height:g}")

    def cut(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    x1, y1 = cut(x / image_width), cut(y / image_height)
    return x1, y1, cut((x + width) / image_width), cut((y + height) / image_height)


def read_json(path: Path, expected: str) -> Any:
    """A whole JSON file; `expected` says what it should be."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {expected}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise UserError(f"{path}: not JSON ({reason}); expected {expected}") from None


def read_json_array(path: Path, expected: str) -> Iterator[Any]:
    """The elements of a file that is one JSON list, parsed one at a time: Visual Genome's lists take gigabytes whole.

    Raises:
        UserError: the file can't be read or is no list.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {expected}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None
    decoder, place = json.JSONDecoder(), _skip(content, 0)
    if content[place : place + 1] != "[":
        raise UserError(f"{path}: not a JSON list; expected {expected}")
    place = _skip(content, place + 1)
    while content[place : place + 1] != "]":
        try:
            value, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not JSON at character {place}; expected {expected}") from None
        yield value
        place = _skip(content, place)
        if content[place : place + 1] == ",":
            place = _skip(content, place + 1)
        elif content[place : place + 1] != "]":
            raise UserError(f"{path}: the list breaks off at character {place}; expected {expected}")


def _skip(content: str, place: int) -> int:
    while place < len(content) and content[place] in " \t\r\n":
        place += 1
    return place
