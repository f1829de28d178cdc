"""vlscale's own format: one JSON object a line, `{"image": path, "captions": [...], "id"?, "split"?, …}`, or a list."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.data.records import from_record
from vlscale.data.sample import Sample
from vlscale.data.sources.base import Format, Notes, Source
from vlscale.data.sources.fields import FieldError, kind, read_json, record
from vlscale.errors import UserError


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
    if _is_list(path):
        for number, item in enumerate(read_json(path, "a list of records"), start=1):
            yield _checked(Line(number, None, f"{path}, record {number}: "), item, roots)
        return
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _line(path, number, raw, roots)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected a jsonl file") from None


def _is_list(path: Path) -> bool:
    """Whether the file is one JSON list instead of one record a line."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".json" and file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False


def _line(path: Path, number: int, raw: bytes, roots: list[Path]) -> Line:
    blank = Line(number, None, f"{path}, line {number}: ")
    try:
        return _checked(blank, json.loads(raw.decode("utf-8-sig")), roots)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; save the file as UTF-8"
    except (json.JSONDecodeError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        reason = f"not JSON ({message}); expected one object a line"
    return Line(number, None, blank.error + reason)


def _checked(blank: Line, item: Any, roots: list[Path]) -> Line:
    """The line with its sample, or with the reason why it has none."""
    try:
        return Line(blank.number, _sample(record(item), roots))
    except FieldError as error:
        return Line(blank.number, None, blank.error + str(error))


def _sample(row: dict[str, Any], roots: list[Path]) -> Sample:
    """Raises FieldError."""
    image = _path(row, "image")
    second = _locate(_path(row, "second"), roots) if row.get("second") is not None else None
    return from_record(row, image, _locate(image, roots), second)


def _path(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise FieldError(f'field "{key}": expected the path of an image, got {kind(value)}')
    if "\0" in value:
        raise FieldError(f'field "{key}": the path holds a zero byte')
    return value


def _locate(image: str, roots: list[Path]) -> Path:
    for root in roots:
        candidate = os.path.join(root, image)
        if os.path.isfile(candidate):
            return Path(candidate)
    return Path(os.path.join(roots[0], image))


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    for line in scan_jsonl(Path(source.path), None if source.images is None else Path(source.images)):
        if line.sample is not None:
            yield line.sample
        elif notes.strict:
            raise UserError(line.error)
        else:
            notes.problems.append(line.error)


FORMATS = (
    Format(
        "jsonl",
        "vlscale's own: a JSON object a line (or a list of them) with image, captions, split, …",
        _read,
        suffixes=(".jsonl", ".json"),
        signs=(r'\A(?![\s\S]*"(?:gold_label|sentences|annotations)"\s*:)[\s\S]*"image"\s*:',),
    ),
)
