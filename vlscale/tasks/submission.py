"""VQA v2's results file, as its evaluation server takes it: `[{"question_id": 262148000, "answer": "down"}, …]`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from vlscale.config import Data
from vlscale.data.open import STORED, load_sources
from vlscale.data.sources.base import Notes
from vlscale.data.sources.registry import read_source
from vlscale.errors import UserError
from vlscale.interop.layout import write_text


def check_submission_path(path: Path) -> None:
    """Raises UserError: it is not the name of a .json file in a folder that is there."""
    if path.suffix != ".json" or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--submission {path}: expected the name of a .json file in a folder that exists")


def all_questions(data: Data, splits: Collection[str]) -> list[str]:
    """Ids of the questions in the annotations of these splits, those about images that are not there among them.

    Shards and tars have no other questions than those of their images: they give none here.
    """
    if data.path is None:
        return []
    sources, _ = load_sources(data.path, data.image_root)
    return [
        question.id
        for source in sources
        if source.format not in STORED
        for sample in read_source(source, Notes(need_images=False))
        if sample.split in splits
        for question in sample.questions
    ]


def write_submission(path: Path, asked: Collection[str], predicted: Mapping[str, str], common: str) -> int:
    """Write every question once, in the order of `asked`.

    Ids that are written as whole numbers become numbers.

    Args:
        predicted: question id → answer.
        common: answer of the questions that have none, because their image can't be read.

    Returns:
        How many of these there were.
    """
    ids = dict.fromkeys([*asked, *predicted])
    rows = [json.dumps({"question_id": _number(one), "answer": predicted.get(one, common)}) for one in ids]
    write_text(path, "[" + ",\n".join(rows) + "]\n")
    return sum(one not in predicted for one in ids)


def _number(identity: str) -> int | str:
    return int(identity) if identity.isascii() and identity.isdigit() and str(int(identity)) == identity else identity
