"""Checked access to the fields of a record: whatever is missing or of another kind is named, with what was expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
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
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_number(value):
        return "a number that is not finite or too large"
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
    """A finite number that a float can hold; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def each(row: dict[str, Any], key: str, read: Callable[[dict[str, Any]], T], expected: str) -> list[T]:
    """Every object of the field's list, as `read` makes it.

    Raises:
        FieldError: no list, or an item is wrong; says which, counted from 1.
    """
    items = []
    for number, item in enumerate(get(row, key, list, expected), start=1):
        try:
            items.append(read(record(item)))
        except FieldError as error:
            raise FieldError(f"{key}, item {number}: {error}") from None
    return items


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
    content = _Content(path, expected)
    if content.next() != "[":
        raise UserError(f"{path}: not a JSON list; expected {expected}")
    yield from content.elements()


def read_json_members(path: Path, expected: str, lists: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """The members of a file that is one JSON object, parsed one at a time: VQA v2's take gigabytes whole.

    Args:
        lists: keys that hold a list; its elements come one by one, each with the key.

    Raises:
        UserError: the file can't be read or is no object, or one of `lists` holds no list.
    """
    content = _Content(path, expected)
    if content.next() != "{":
        raise UserError(f"{path}: not a JSON object; expected {expected}")
    for key in content.members():
        if key in lists:
            if content.next() != "[":
                raise UserError(f'{path}: field "{key}": expected a list, got {kind(content.value())}')
            for element in content.elements():
                yield key, element
        else:
            yield key, content.value()


def json_object(line: bytes) -> dict[str, Any]:
    """A line that is one JSON object.

    Raises:
        FieldError: it is none.
    """
    try:
        value = json.loads(utf8(line))
    except FieldError:
        raise
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long a number"
        raise FieldError(f"not JSON ({message}); expected one object a line") from None
    return record(value)


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of every line, without its end.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {expected}") from None


def utf8(line: bytes) -> str:
    """A line's text; a byte order mark is cut off.

    Raises:
        FieldError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FieldError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None


class _Content:
    """A JSON text and the place in it up to which it is read."""

    def __init__(self, path: Path, expected: str) -> None:
        try:
            self.text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {expected}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None
        self.place = 0
        self._path, self._expected = path, expected
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is no space, empty at the end."""
        match = _SPACES.match(self.text, self.place)
        self.place = self.place if match is None else match.end()
        return self.text[self.place : self.place + 1]

    def value(self) -> Any:
        try:
            self.next()
            value, self.place = self._decoder.raw_decode(self.text, self.place)
        except (ValueError, RecursionError):
            raise self._broken("not JSON at") from None
        return value

    def elements(self) -> Iterator[Any]:
        """Of the list that starts here."""
        for _ in self._items("]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """Keys of the object that starts here; each value has to be read before the next key is asked for."""
        for _ in self._items("}"):
            key = self.value()
            if not isinstance(key, str) or self.next() != ":":
                raise self._broken("not JSON at")
            self.place += 1
            yield key

    def _items(self, end: str) -> Iterator[None]:
        """Stands before one item after the other, up to the closing bracket `end`."""
        self.place += 1
        mark = "," if self.next() != end else end
        self.place += mark == end
        while mark != end:
            yield
            mark = self.next()
            if mark not in {",", end}:
                raise self._broken("breaks off at")
            self.place += 1

    def _broken(self, how: str) -> UserError:
        return UserError(f"{self._path}: {how} character {self.place}; expected {self._expected}")


_SPACES = re.compile(r"[ \t\r\n]*")
