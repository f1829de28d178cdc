"""`vlscale data validate`: what is wrong is named, and the exit code says whether anything is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.data.corpus import picture, shared, write_jsonl
from vlscale.cli.data import app
from vlscale.data.validate import validate
from vlscale.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abc":
        picture(ord(name)).save(tmp_path / "images" / f"{name}.png")
    records = [{"image": f"{name}.png", "captions": ["a dog", "two cats"], "split": "train"} for name in "abc"]
    write_jsonl(tmp_path / "captions.jsonl", records)
    return tmp_path


def test_a_clean_folder(folder: Path) -> None:
    done = []
    report = validate(folder, on_progress=lambda *progress: done.append(progress))
    assert report.problems == []
    assert (report.counts["records"], report.counts["captions"], report.counts["images that decode"]) == ("3", "6", "3")
    assert report.counts["image width"] == "40 px"
    assert report.splits == {"train": 3}
    assert done[-1] == ("decoding", 3, 3)
    result = CliRunner().invoke(app, ["validate", str(folder)])
    assert result.exit_code == 0
    assert "no problems" in result.output


def test_everything_wrong_is_named(folder: Path) -> None:
    (folder / "images" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    good = {"image": "a.png", "captions": ["a dog"]}
    records = [
        good,
        [1],
        {"image": "b.png", "id": "a.png", "captions": ["?!"]},
        good,
        {"image": "lost.png", "captions": []},
        {"image": "c.png", "captions": ["a dog"], "boxes": [[0.5, 0, 0.2, 1]], "tags": ["dog", "cat"]},
    ]
    file = write_jsonl(folder / "captions.jsonl", records)
    report = validate(file)
    for expected in [
        f"{file}, line 2: expected an object",
        "line 3: id 'a.png' is on line 1 already",
        "line 3: caption 1 is empty once cleaned: '?!'",
        f"line 4: {folder / 'images' / 'a.png'} is on line 1 already",
        "line 5: no captions",
        "line 6: box 1 is [0.5, 0, 0.2, 1]",
        "line 6: 2 tags for 1 boxes",
        f"{folder / 'lost.png'}: no such file",
        f"{folder / 'images' / 'b.png'}: ",
    ]:
        assert sum(expected in problem for problem in report.problems) == 1, (expected, report.problems)
    assert len(report.problems) == 9
    assert report.counts["problems"] == "9"
    result = CliRunner().invoke(app, ["validate", str(file), "--limit", "2"])
    assert result.exit_code == 1
    assert "and 7 more" in result.output


def test_an_empty_file_is_a_problem_and_a_missing_one_an_error(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").touch()
    assert validate(tmp_path).problems == [f"{tmp_path / 'captions.jsonl'}: holds no record"]
    with pytest.raises(UserError, match="no such file"):
        validate(tmp_path / "nothing")
    assert isinstance(CliRunner().invoke(app, ["validate", str(tmp_path / "nothing")]).exception, UserError)


def test_shared_coco_captions_are_no_jsonl() -> None:
    report = validate(shared("data/coco/captions.json"))
    assert report.problems


def test_rendered_scenes_are_valid(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    result = CliRunner().invoke(
        app, ["scenes", "--out", str(out), "--train", "6", "--test", "3", "--seed", "1", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    report = validate(out)
    assert report.problems == []
    assert report.splits == {"train": 6, "test": 3, "val": 3}
