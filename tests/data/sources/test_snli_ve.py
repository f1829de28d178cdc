"""SNLI-VE as published, and the real rows on Flickr8k's photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import shared
from tests.data.sources.layouts import read, snli_line, touch, write_lines
from vlscale.data.sample import Statement


def test_the_real_rows() -> None:
    samples, notes = read("snli-ve", shared("data/flickr8k/snli_ve.jsonl"))
    statements = [statement for sample in samples for statement in sample.statements]
    assert (len(samples), len(statements), notes.missing) == (452, 6451, [])
    labels = Counter(statement.label for statement in statements)
    assert labels == {"contradiction": 2546, "entailment": 2303, "neutral": 1602}
    assert samples[0].image.name == "2181846120_3744ca3942.jpg"
    assert samples[0].aliases == ("flickr:2181846120",)
    assert samples[0].statements[0].id == "2181846120.jpg#2r1c"


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_hypotheses_are_gathered_by_photograph(tmp_path: Path, part: str) -> None:
    touch(tmp_path, "flickr30k-images/11.jpg", "flickr30k-images/12_ab.jpg")
    lines = [snli_line("11", 1), snli_line("12", 2, "entailment"), snli_line("11", 3, "-"), snli_line("11", 4)]
    file = write_lines(tmp_path / f"snli_ve_{part}.jsonl", *lines)
    samples, notes = read("snli-ve", file, images=tmp_path / "flickr30k-images")
    assert [(sample.id, sample.split, sample.image.name) for sample in samples] == [
        ("11", part, "11.jpg"),
        ("12", part, "12_ab.jpg"),
    ]
    assert samples[0].statements == (
        Statement("11.jpg#1r1n", "Hypothesis 1.", "neutral"),
        Statement("11.jpg#4r1n", "Hypothesis 4.", "neutral"),
    )
    assert notes.counts == {"hypotheses without agreed label": 1}


def test_the_first_release_spelt_the_id_otherwise(tmp_path: Path) -> None:
    touch(tmp_path, "11.jpg")
    row = {"Flikr30kID": "11.jpg", **snli_line("", 1)}
    del row["Flickr30K_ID"]
    (sample,), _ = read("snli-ve", write_lines(tmp_path / "x.jsonl", row))
    assert sample.id == "11"


def test_missing_photographs_are_noted_once(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", snli_line("11", 1), snli_line("11", 2))
    samples, notes = read("snli-ve", file)
    assert (samples, notes.missing) == ([], ["11.jpg"])
