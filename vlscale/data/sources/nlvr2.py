"""NLVR2: a JSON object a line, each a sentence on a pair of photographs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.sample import Sample, Statement
from vlscale.data.sources.base import Format, Images, Notes, Source, json_lines
from vlscale.data.sources.fields import FieldError, text

_EXPECTED = 'NLVR2 lines: {"identifier": "dev-896-0-1", "sentence", "label"}'
_IDENTIFIER = re.compile(r"(([a-z]+[0-9]*)-[0-9]+-[0-9]+)-[0-9]+")
"""Split, set, pair and sentence."""
_SPLITS = {"test1": "test"}
"""The public test set; other parts keep their names."""


@dataclass(slots=True)
class _Pair:
    where: str
    part: str
    directory: str
    statements: list[Statement] = field(default_factory=list)


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per pair of photographs: their sentences need not be adjacent in the file."""
    path = Path(source.path)
    images = Images(source, notes, path)
    pairs: dict[str, _Pair] = {}
    for where, row in json_lines(path, notes, _EXPECTED):
        with notes.record(path, where):
            identifier, match = _identifier(row)
            statement = Statement(identifier, text(row, "sentence"), _label(row))
            directory = text(row, "directory") if row.get("directory") is not None else ""
            pairs.setdefault(match[1], _Pair(where, match[2], directory)).statements.append(statement)
    for name, pair in pairs.items():
        left = right = None
        with notes.record(path, pair.where):
            left, right = images.find(*_names(name, pair, 0)), images.find(*_names(name, pair, 1))
        if left is not None and right is not None:
            split = _SPLITS.get(pair.part, pair.part)
            yield Sample(id=name, image=left, second=right, split=split, statements=tuple(pair.statements))


def _identifier(row: dict[str, Any]) -> tuple[str, re.Match[str]]:
    identifier = text(row, "identifier")
    match = _IDENTIFIER.fullmatch(identifier)
    if match is None:
        raise FieldError(f'field "identifier": expected one such as "dev-896-0-1", got {identifier[:40]!r}')
    return identifier, match


def _label(row: dict[str, Any]) -> str:
    """`true` or `false`; empty where the hidden test set keeps it to itself."""
    value = row.get("label")
    if value is None:
        return ""
    label = str(value).lower() if isinstance(value, bool | str) else ""
    if label not in {"true", "false"}:
        raise FieldError('field "label": expected "True" or "False"')
    return label


def _names(name: str, pair: _Pair, side: int) -> list[str]:
    """Where a photograph may be: the download's folders, or without."""
    file = f"{name}-img{side}.png"
    folders = [f"{pair.part}/{pair.directory}", pair.directory] if pair.directory else []
    folders.append(pair.part)
    return [file, *(f"{folder}/{file}" for folder in folders), *(f"images/{folder}/{file}" for folder in folders)]


FORMATS = (
    Format(
        "nlvr2",
        "NLVR2: a JSON object a line with identifier, sentence and label; two images a sample",
        _read,
        suffixes=(".json", ".jsonl"),
        signs=(r'"identifier"\s*:\s*"[a-z]+[0-9]*-[0-9]+-[0-9]+-[0-9]+"', r'"sentence"\s*:'),
    ),
)
