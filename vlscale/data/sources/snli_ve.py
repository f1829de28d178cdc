"""SNLI-VE: a JSON object a line, each a hypothesis on a Flickr30k photograph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.sample import Sample, Statement
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split, json_lines
from vlscale.data.sources.fields import FieldError, get, kind, text

_EXPECTED = 'SNLI-VE lines: {"Flickr30K_ID", "pairID", "sentence2", "gold_label"}'
_ID_KEYS = ("Flickr30K_ID", "Flikr30kID")
"""The second is how the first release spelt it."""
_LABELS = ("entailment", "neutral", "contradiction")


@dataclass(slots=True)
class _Photograph:
    where: str
    image: str
    statements: list[Statement] = field(default_factory=list)


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per photograph: its hypotheses need not be adjacent in the file."""
    path = Path(source.path)
    images = Images(source, notes, path)
    split = file_split(path)
    photographs: dict[str, _Photograph] = {}
    for where, row in json_lines(path, notes, _EXPECTED):
        with notes.record(path, where):
            identity, label = _identity(row), _label(row)
            if label == "-":
                notes.counts["hypotheses without agreed label"] += 1
                continue
            statement = Statement(text(row, "pairID"), text(row, "sentence2"), label)
            photograph = photographs.setdefault(identity, _Photograph(where, get(row, "image", str, default="")))
            photograph.statements.append(statement)
    for identity, photograph in photographs.items():
        found = None
        with notes.record(path, photograph.where):
            names = [photograph.image] if photograph.image else []
            found = images.find(*names, f"{identity}.jpg", prefix=f"{identity}_")
        if found is not None:
            statements = tuple(photograph.statements)
            yield Sample(id=identity, image=found, split=split, statements=statements, aliases=(f"flickr:{identity}",))


def _identity(row: dict[str, Any]) -> str:
    """The photograph's number on Flickr."""
    key = next((name for name in _ID_KEYS if row.get(name) is not None), _ID_KEYS[0])
    return text(row, key).removesuffix(".jpg")


def _label(row: dict[str, Any]) -> str:
    """One of the three, or `-` where the annotators did not agree."""
    value = row.get("gold_label")
    if not isinstance(value, str):
        raise FieldError(f'field "gold_label": expected {", ".join(_LABELS)} or "-", got {kind(value)}')
    if value not in (*_LABELS, "-"):
        raise FieldError(f'field "gold_label": expected {", ".join(_LABELS)} or "-", got {value[:40]!r}')
    return sys.intern(value)


FORMATS = (
    Format(
        "snli-ve",
        "SNLI-VE: a JSON object a line with Flickr30K_ID, pairID, sentence2 and gold_label",
        _read,
        suffixes=(".jsonl", ".json"),
        signs=(r'"(?:Flickr30K_ID|Flikr30kID)"\s*:', r'"sentence2"\s*:', r'"gold_label"\s*:'),
    ),
)
