"""`vlscale data answers`: the vocabulary of whole data sets, images or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.data.corpus import shared, write_jsonl
from vlscale.cli.data import app
from vlscale.data.collect_answers import collect_answers
from vlscale.errors import UserError


def test_answers_of_two_sources(tmp_path: Path) -> None:
    def asked(name: str, *answers: str) -> str:
        questions = [{"id": f"{n}", "text": "?", "answers": [answer]} for n, answer in enumerate(answers)]
        records = [{"image": "nowhere.jpg", "captions": [], "questions": questions}]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", records))

    specs = [asked("a", "Two", "a dog", "cat"), asked("b", "2", "dog.", "mouse")]
    found = collect_answers(specs, min_count=2, size=None)
    assert (found.answers, found.questions, found.covered) == (["2", "dog"], 6, pytest.approx(4 / 6))
    assert collect_answers(specs, 1, size=3).answers == ["2", "dog", "cat"]
    out = tmp_path / "answers.json"
    result = CliRunner().invoke(app, ["answers", *specs, "--out", str(out), "--min-count", "2"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text()) == ["2", "dog"]
    assert "66.7%" in result.output
    with pytest.raises(UserError, match="no answer is given to 9 of 6 questions; lower --min-count"):
        collect_answers(specs, 9, None)


def test_vqa_as_published() -> None:
    found = collect_answers(
        [
            f"vqa:{shared('data/coco/v2_mscoco_subset_annotations.json')},questions="
            f"{shared('data/coco/v2_OpenEnded_mscoco_subset_questions.json')}"
        ],
        2,
        None,
    )
    assert found.questions == 112
    assert found.answers[:2] == ["yes", "no"]
    assert 0.5 < found.covered < 1
