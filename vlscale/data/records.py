"""Sample ↔ JSON object: a line of a jsonl file, and what lies beside an image in a shard."""

from __future__ import annotations

import json
from typing import Any

from vlscale.data.sample import Box, ImageFile, Phrase, Question, Sample, Statement
from vlscale.data.sources.fields import FieldError, get, is_number, kind, record, strings, text

KNOWN = (
    "image",
    "captions",
    "id",
    "split",
    "boxes",
    "tags",
    "confidences",
    "tuples",
    "phrases",
    "questions",
    "statements",
    "second",
    "aliases",
)
"""Keys with a meaning; every other key goes to `Sample.extra` as it is."""


def from_record(row: dict[str, Any], identity: str, image: ImageFile, second: ImageFile | None = None) -> Sample:
    """The sample that a record describes; `identity` where it has no id of its own.

    Raises:
        FieldError: a field is not what it should be.
    """
    own = row.get("id")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int) or own == ""):
        raise FieldError(f'field "id": expected a string or a whole number, got {kind(own)}')
    return Sample(
        id=identity if own is None else str(own),
        image=image,
        captions=strings(row, "captions"),
        split=get(row, "split", str, 'a name such as "train"', default="train") or "train",
        boxes=_boxes(row),
        tags=strings(row, "tags"),
        confidences=_numbers(row, "confidences"),
        tuples=_tuples(row),
        phrases=tuple(_phrase(record(item)) for item in get(row, "phrases", list, default=[])),
        questions=tuple(_question(record(item)) for item in get(row, "questions", list, default=[])),
        statements=tuple(_statement(record(item)) for item in get(row, "statements", list, default=[])),
        second=second,
        aliases=strings(row, "aliases"),
        extra={key: value for key, value in row.items() if key not in KNOWN},
    )


def to_record(sample: Sample) -> dict[str, Any]:
    """A JSON object that `from_record` reads back; without the images, and without what is empty."""
    row: dict[str, Any] = {"id": sample.id, "captions": sample.captions, "split": sample.split}
    for key in ("boxes", "tags", "confidences", "tuples", "aliases"):
        if value := getattr(sample, key):
            row[key] = value
    for key in ("phrases", "questions", "statements"):
        if items := getattr(sample, key):
            row[key] = [_filled(item) for item in items]
    return row | sample.extra


def _filled(item: Phrase | Question | Statement) -> dict[str, Any]:
    """The fields of an item that differ from their defaults, and its text."""
    fields = type(item).__dataclass_fields__
    return {name: value for name in fields if (value := getattr(item, name)) != fields[name].default}


def _phrase(row: dict[str, Any]) -> Phrase:
    return Phrase(
        text=text(row, "text"),
        boxes=_boxes(row),
        caption=get(row, "caption", int, default=-1),
        first_word=get(row, "first_word", int, default=-1),
        entity=get(row, "entity", str, default=""),
        kinds=strings(row, "kinds"),
        unseen=get(row, "unseen", str, default=""),
    )


def _question(row: dict[str, Any]) -> Question:
    kind_of = get(row, "kind", str, default="")
    return Question(text(row, "id"), text(row, "text"), strings(row, "answers"), kind_of)


def _statement(row: dict[str, Any]) -> Statement:
    return Statement(text(row, "id"), text(row, "text"), get(row, "label", str, default=""))


def _boxes(row: dict[str, Any]) -> tuple[Box, ...]:
    wanted = "a list of [x1, y1, x2, y2] in shares of width and height"
    boxes = []
    for box in get(row, "boxes", list, wanted, default=[]):
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_number(x) for x in box):
            raise FieldError(f'field "boxes": expected {wanted}, got {json.dumps(box)[:60]}')
        boxes.append((float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    return tuple(boxes)


def _numbers(row: dict[str, Any], key: str) -> tuple[float, ...]:
    values = get(row, key, list, "a list of numbers", default=[])
    if not all(is_number(value) for value in values):
        raise FieldError(f'field "{key}": expected a list of numbers, got {json.dumps(values)[:60]}')
    return tuple(float(value) for value in values)


def _tuples(row: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    wanted = "a list of lists of one to three strings"
    items = get(row, "tuples", list, wanted, default=[])
    for item in items:
        if not isinstance(item, list) or not 1 <= len(item) <= 3 or not all(isinstance(word, str) for word in item):
            raise FieldError(f'field "tuples": expected {wanted}, got {json.dumps(item)[:60]}')
    return tuple(tuple(item) for item in items)
