"""NLVR2 as published, and the real balanced development set with rendered photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import picture, shared
from tests.data.sources.layouts import nlvr2_line, read, touch, write_lines
from vlscale.data.sample import Statement


def test_the_real_development_set(tmp_path: Path) -> None:
    file = shared("data/nlvr2/balanced_dev.json")
    _, bare = read("nlvr2", file)
    assert len(set(bare.missing)) == 2 * 1150
    for number, name in enumerate(bare.missing[:60]):
        (tmp_path / "dev").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "dev" / name)
    samples, notes = read("nlvr2", file, images=tmp_path)
    assert len(samples) == 30
    assert len(notes.missing) == 2 * 1150 - 60
    assert {sample.split for sample in samples} == {"dev"}
    first = samples[0]
    assert (first.id, first.image.name) == ("dev-896-0", "dev-896-0-img0.png")
    assert first.second == tmp_path / "dev" / "dev-896-0-img1.png"
    assert first.statements[0] == Statement("dev-896-0-1", "There are exactly six bottles in the right image.", "true")
    touch(tmp_path, *(f"dev/{name}" for name in bare.missing))
    samples, notes = read("nlvr2", file, images=tmp_path)
    statements = [statement for sample in samples for statement in sample.statements]
    assert (len(samples), len(statements), notes.missing) == (1150, 2300, [])
    assert len({statement.id for statement in statements}) == 2300
    assert Counter(statement.label for statement in statements) == {"true": 1150, "false": 1150}


def test_sentences_of_a_pair_need_not_be_adjacent(tmp_path: Path) -> None:
    names = [f"dev-{pair}-img{side}.png" for pair in ("1-0", "2-0") for side in (0, 1)]
    touch(tmp_path, *names)
    lines = [nlvr2_line("dev-1-0-0"), nlvr2_line("dev-2-0-0", "False"), nlvr2_line("dev-1-0-1", "False")]
    samples, _ = read("nlvr2", write_lines(tmp_path / "dev.json", *lines))
    assert [[(item.id, item.label) for item in sample.statements] for sample in samples] == [
        [("dev-1-0-0", "true"), ("dev-1-0-1", "false")],
        [("dev-2-0-0", "false")],
    ]


@pytest.mark.parametrize(
    ("identifier", "folder", "split"),
    [
        ("train-10171-0-0", "images/train/67", "train"),
        ("train-10171-0-0", "train/67", "train"),
        ("train-10171-0-0", "67", "train"),
        ("train-10171-0-0", "", "train"),
        ("dev-1-2-0", "images/dev", "dev"),
        ("test1-1-2-0", "test1", "test"),
        ("test2-1-2-0", "test2", "test2"),
    ],
)
def test_where_photographs_are(tmp_path: Path, identifier: str, folder: str, split: str) -> None:
    pair = identifier.rsplit("-", 1)[0]
    touch(tmp_path / folder, f"{pair}-img0.png", f"{pair}-img1.png")
    fields = {"directory": 67} if split == "train" else {}
    (sample,), _ = read("nlvr2", write_lines(tmp_path / "x.json", nlvr2_line(identifier, None, **fields)))
    assert (sample.image, sample.split) == (tmp_path / folder / f"{pair}-img0.png", split)
    assert sample.statements[0].label == ""  # the hidden test set has none


def test_a_pair_with_one_photograph_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "dev-1-0-img0.png")
    samples, notes = read("nlvr2", write_lines(tmp_path / "x.json", nlvr2_line("dev-1-0-0")))
    assert (samples, notes.missing) == ([], ["dev-1-0-img1.png"])


def test_a_directory_that_leads_out(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.json", nlvr2_line("train-1-0-0", directory="../.."))
    _, notes = read("nlvr2", file, strict=False)
    (problem,) = notes.problems
    assert problem.startswith(f"{file}, line 1: expected an image path inside the image folder")
