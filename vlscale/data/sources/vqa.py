"""VQA v2: a question file and, but for test splits, the annotation file with ten answers to each question."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.answers import MULTIPLE_CHOICE, most_common, normalise
from vlscale.data.sample import Question, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, each, get, kind, read_json_members, record, text
from vlscale.errors import UserError

_QUESTIONS = 'VQA v2 questions: {"questions": [{"question_id", "image_id", "question"}]}'
_ANNOTATIONS = 'VQA v2 annotations: {"annotations": [{"question_id", "answer_type", "answers"}]}'
_SUBSETS = ("train2014", "val2014", "test2015")
_SUBSET = re.compile(r"(train|val|test|test-dev)(20\d\d)")


@dataclass(frozen=True, slots=True)
class _Annotation:
    answers: tuple[str, ...]
    kind: str
    choice: str
    """The file's multiple_choice_answer; empty where `most_common` gives the same."""


@dataclass(slots=True)
class _Asked:
    """What was asked of one image."""

    questions: list[Question] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per image and split, in the order of the questions."""
    path, annotations_path = _files(source)
    images = Images(source, notes, path)
    annotations = None if annotations_path is None else _annotations(annotations_path, notes)
    header, asked = _questions(path, notes, annotations)
    subset = _subset(path, header)
    default = _split_of(subset) or file_split(path)
    seen: set[str] = set()
    for (image, own), group in asked.items():
        split = own or default
        found = images.find(*_image_names(image, subset))
        # An image whose questions are in several splits: the first keeps the plain id.
        identity = str(image) if str(image) not in seen else f"{image}-{split}"
        seen.add(identity)
        if found is not None:
            yield Sample(
                id=identity,
                image=found,
                split=split,
                questions=tuple(group.questions),
                aliases=(f"coco:{image}",),
                extra={MULTIPLE_CHOICE: group.choices} if group.choices else {},
            )


def _files(source: Source) -> tuple[Path, Path | None]:
    """The question file, and the annotation file if there is one."""
    if source.questions is not None and source.annotations is not None:
        raise UserError(f"{source}: has questions= and annotations=; the path is one of the two, give only the other")
    if source.questions is not None:
        return Path(source.questions), Path(source.path)
    return Path(source.path), None if source.annotations is None else Path(source.annotations)


def _questions(
    path: Path, notes: Notes, annotations: dict[str, _Annotation] | None
) -> tuple[dict[str, Any], dict[tuple[int, str], _Asked]]:
    """The file's other fields, and what was asked by image and the split that the questions themselves name."""
    header: dict[str, Any] = {}
    asked: dict[tuple[int, str], _Asked] = {}
    number = used = 0
    for key, value in read_json_members(path, _QUESTIONS, ("questions", "annotations")):
        if key == "annotations":
            raise UserError(f"{path}: holds answers but not the questions; add questions=FILE, the file that has them")
        if key != "questions":
            header[key] = value
            continue
        number += 1
        with notes.record(path, f"question {number}"):
            row = record(value)
            identity, question = text(row, "question_id"), text(row, "question")
            place = _image_id(row), _split_of(get(row, "split", str, default=""))
            annotation = None if annotations is None else annotations.get(identity)
            if annotations is not None and annotation is None:
                notes.counts["questions without annotation"] += 1
                continue
            used += annotation is not None
            group = asked.setdefault(place, _Asked())
            if annotation is None:
                group.questions.append(Question(identity, question))
            else:
                group.questions.append(Question(identity, question, annotation.answers, annotation.kind))
                if annotation.choice:
                    group.choices[identity] = annotation.choice
    if not number:
        raise UserError(f'{path}: holds no "questions"; expected {_QUESTIONS}')
    if annotations is not None and len(annotations) > used:
        notes.counts["annotations without question"] += len(annotations) - used
    return header, asked


def _annotations(path: Path, notes: Notes) -> dict[str, _Annotation]:
    """By question id."""
    found: dict[str, _Annotation] = {}
    number = 0
    for key, value in read_json_members(path, _ANNOTATIONS, ("annotations", "questions")):
        if key == "questions":
            raise UserError(f"{path}: holds questions; expected {_ANNOTATIONS}")
        if key == "annotations":
            number += 1
            with notes.record(path, f"annotation {number}"):
                row = record(value)
                found[text(row, "question_id")] = _annotation(row)
    if not number:
        raise UserError(f'{path}: holds no "annotations"; expected {_ANNOTATIONS}')
    return found


def _annotation(row: dict[str, Any]) -> _Annotation:
    answers = tuple(each(row, "answers", _answer, 'a list of {"answer": "yes"}'))
    choice = get(row, "multiple_choice_answer", str, default="")
    if answers and normalise(choice) == most_common(answers):
        choice = ""
    return _Annotation(answers, sys.intern(get(row, "answer_type", str, default="")), choice)


def _answer(row: dict[str, Any]) -> str:
    """Interned: millions of answers are a few thousand words."""
    return sys.intern(get(row, "answer", str))


def _image_id(row: dict[str, Any]) -> int:
    value = text(row, "image_id", "a whole number")
    if not re.fullmatch("[0-9]{1,12}", value):
        raise FieldError(f'field "image_id": expected a whole number of up to 12 digits, got {value[:20]!r}')
    return int(value)


def _subset(path: Path, header: dict[str, Any]) -> str:
    """`train2014`, as the question file says itself or its name does; else empty."""
    told = header.get("data_subtype", "")
    if not isinstance(told, str):
        raise UserError(f'{path}: field "data_subtype": expected a name such as "train2014", got {kind(told)}')
    match = _SUBSET.fullmatch(told) or _SUBSET.search(path.name)
    return "" if match is None else match[0]


def _split_of(name: str) -> str:
    """`train2014` → `train`; `valid` → `val`."""
    name = re.sub(r"20\d\d$", "", name)
    return "val" if name in {"valid", "validation"} else name


def _image_names(image: int, subset: str) -> list[str]:
    """Where COCO's image may be: as 2014 or 2017 call it, in its subset's folder or without."""
    own = subset.replace("test-dev", "test")
    number = f"{image:012d}.jpg"
    names = []
    for name in dict.fromkeys(filter(None, (own, *_SUBSETS))):
        names += [f"COCO_{name}_{number}", f"{name}/COCO_{name}_{number}", f"{name}/{number}"]
    return [*names, number, f"train2017/{number}", f"val2017/{number}"]


FORMATS = (
    Format(
        "vqa",
        "VQA v2: annotations with questions=FILE, or questions with annotations=FILE (none for test splits)",
        _read,
        suffixes=(".json",),
        signs=(r'"question_id"\s*:\s*\d', r'"image_id"\s*:\s*\d', r'"(?:questions|annotations)"\s*:\s*\['),
        keys=frozenset({"questions", "annotations"}),
    ),
)
