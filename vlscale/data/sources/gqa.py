"""GQA: questions on Visual Genome's images, a JSON object by question id; one file, or a folder of its chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlscale.data.sample import Question, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import get, read_json_members, record, text
from vlscale.data.sources.visual_genome import read_image_data
from vlscale.errors import UserError

_EXPECTED = 'GQA questions: {"07333408": {"imageId", "question", "answer", "types", …}}'


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per image and split, in the order of the first questions."""
    path = Path(source.path)
    images = Images(source, notes, path)
    facts = {} if source.image_data is None else read_image_data(Path(source.image_data), notes)
    asked: dict[tuple[str, str], list[Question]] = {}
    for file in _files(path):
        split = file_split(file)
        for identity, value in read_json_members(file, _EXPECTED):
            with notes.record(file, f"question {identity[:40]!r}"):
                row = record(value)
                question = _question(identity, row)
                asked.setdefault((text(row, "imageId"), split), []).append(question)
    for (image, split), questions in asked.items():
        found = None
        with notes.record(path, f"image {image[:40]!r}"):
            found = images.find(f"{image}.jpg")
        if found is not None:
            aliases: tuple[str, ...] = (f"vg:{image}",) if image.isascii() and image.isdigit() else ()
            if image in facts:
                aliases += facts[image].aliases
            yield Sample(id=image, image=found, split=split, questions=tuple(questions), aliases=aliases)


def _files(path: Path) -> list[Path]:
    """The file itself, or the folder's chunks."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise UserError(f"{path}: holds no .json file; expected the chunks of train_all_questions, or one such file")
    return files


def _question(identity: str, row: dict[str, Any]) -> Question:
    answer = get(row, "answer", str, default="")
    kind = get(get(row, "types", dict, default={}), "semantic", str, default="")
    # Interned: millions of answers are a few thousand words.
    answers = (sys.intern(answer),) if answer else ()
    return Question(identity, text(row, "question"), answers, sys.intern(kind))


FORMATS = (
    Format(
        "gqa",
        "GQA questions: a JSON file, or the folder of its chunks (gqa:FOLDER)",
        _read,
        suffixes=(".json",),
        signs=(r'"imageId"\s*:', r'"isBalanced"\s*:', r'"question"\s*:'),
        keys=frozenset({"image_data"}),
    ),
)
