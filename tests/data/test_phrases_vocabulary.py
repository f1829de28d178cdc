"""The vocabulary of phrases, the captions' phrases, statistics, comparison, and the command."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.data.corpus import shared, write_jsonl
from vlscale.cli.data import app
from vlscale.data.phrases import (
    Built,
    LightExtractor,
    PhraseTuple,
    PhraseVocabulary,
    build_phrases,
    compare,
    is_phrase,
    make_extractor,
    open_corpora,
    parallel,
    phrase_text,
    some_captions,
)
from vlscale.errors import UserError

CAPTIONS = (
    "a black dog runs through the snow",
    "a black dog and a black dog",
    "two men ride big waves",
    "a man rides a big wave",
    "dogs",
    "a black dog chases a big black dog",
)


def records(count: int = 9) -> list[dict[str, Any]]:
    """Images with one to three captions, one without."""
    rows: list[dict[str, Any]] = [
        {
            "image": f"{n}.jpg",
            "id": f"im{n}",
            "split": ("train", "train", "val")[n % 3],
            "captions": [CAPTIONS[(n + k) % len(CAPTIONS)] for k in range(n % 3 + 1)],
        }
        for n in range(count)
    ]
    return [*rows, {"image": "none.jpg", "id": "none", "captions": [], "tuples": [["red", "car"]]}]


def build(folder: Path, rows: list[dict[str, Any]], min_count: int = 2, workers: int = 1, name: str = "light") -> Built:
    folder.mkdir(exist_ok=True)
    source = str(write_jsonl(folder / "captions.jsonl", rows))
    return build_phrases(
        open_corpora([source]), make_extractor(name), folder / "phrases.jsonl", min_count, workers=workers
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_counts_against_a_slow_count(tmp_path: Path) -> None:
    rows = records()
    built = build(tmp_path, rows)
    light = LightExtractor()
    sentences = [caption for row in rows if row.get("split") != "val" for caption in row["captions"]]
    found = [{phrase_text(words) for words in light.extract(caption) if is_phrase(words)} for caption in sentences]
    counts = Counter(phrase for phrases in found for phrase in phrases)
    expected = sorted((-n, phrase) for phrase, n in counts.items() if n >= 2)
    header, *entries = lines(built.files[0])
    assert [(-entry["count"], entry["text"]) for entry in entries] == expected
    assert [entry["id"] for entry in entries] == list(range(len(expected)))
    assert header["sentences"] == len(sentences)
    assert (header["extractor"], header["version"], header["min_count"]) == ("light", light.version, 2)
    assert header["phrases"] == len(entries)

    loaded = PhraseVocabulary.load(built.files[0])
    assert list(loaded) == list(built.vocabulary)
    assert loaded.origin == built.vocabulary.origin
    listed = {(row["id"], row["caption"]): row["phrases"] for row in lines(built.files[1])}
    assert listed == {
        (row["id"], number): loaded.phrases_of(caption)
        for row in rows
        for number, caption in enumerate(row["captions"])
    }
    assert [loaded[place].text for place in listed["im2", 0]] == ["two man", "big wave", "man ride wave"]

    numbers = built.statistics
    valid = [[phrase for phrase in phrases if counts[phrase] >= 2] for phrases in found]
    assert numbers.all_phrases == sum(map(len, valid))
    assert numbers.unique_phrases == len(expected)
    assert numbers.per_text == pytest.approx(sum(map(len, valid)) / len(sentences))
    assert numbers.coverage == pytest.approx(sum(map(bool, valid)) / len(sentences))
    kept = [n for n in counts.values() if n >= 2]
    assert numbers.mean_frequency == pytest.approx(statistics.mean(kept))
    assert numbers.median_frequency == pytest.approx(statistics.median(kept))
    pairs = [entry for entry in entries if len(entry["tuple"]) == 2]
    assert numbers.attributes == pytest.approx(len(pairs) / len(entries))
    assert numbers.attribute_occurrences == pytest.approx(sum(e["count"] for e in pairs) / numbers.all_phrases)
    assert numbers.by_threshold["1"] == len(counts)
    assert numbers.by_threshold["5"] == sum(n >= 5 for n in counts.values())
    assert [part.name for part in numbers.parts] == ["captions.jsonl, train", "captions.jsonl, val"]
    assert numbers.parts[1].texts == sum(len(row["captions"]) for row in rows if row.get("split") == "val")
    assert json.loads(built.files[2].read_text())["unique_phrases"] == len(expected)
    assert not list(tmp_path.glob("*.draft")) + list(tmp_path.glob("*.tmp"))


def test_per_image_counts_different_phrases(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", "id": "1", "captions": ["a black dog", "the black dogs", "a red car"]}]
    numbers = build(tmp_path, rows, min_count=1).statistics
    assert (numbers.per_image, numbers.per_text, numbers.all_phrases) == (2, 1, 3)


def test_same_bytes_whatever_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_WORTH", {"light": 1})
    monkeypatch.setattr(parallel, "CHUNK", 3)
    one, two = (build(tmp_path / str(n), records(40), workers=n) for n in (1, 2))
    assert [file.read_bytes() for file in one.files] == [file.read_bytes() for file in two.files]
    other = build(tmp_path / "3", records(41))
    assert other.vocabulary.origin.corpus != one.vocabulary.origin.corpus


def test_own_tuples_of_an_image_without_captions(tmp_path: Path) -> None:
    built = build(tmp_path, records(), min_count=1, name="data")
    assert [phrase.text for phrase in built.vocabulary] == ["red car"]
    assert lines(built.files[1])[-1] == {"source": 0, "id": "none", "caption": -1, "phrases": [0]}
    with pytest.raises(UserError, match="extractor 'data' can't parse unseen captions; take the phrases from"):
        PhraseVocabulary.load(built.files[0]).phrases_of("a red car")


def test_nothing_to_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no phrase occurs in 50 of 9 sentences, the most frequent in 5; lower --min-c"):
        build(tmp_path, records(), min_count=50)
    rows = [{"image": "1.jpg", "split": "test", "captions": ["a black dog"]}]
    with pytest.raises(
        UserError, match="no sample is in the splits restval, train; there are test; name one with --split"
    ):
        build(tmp_path, rows)
    with pytest.raises(UserError, match="no sample of the splits restval, train has a caption"):
        build(tmp_path, [{"image": "1.jpg", "captions": []}])
    assert not list(tmp_path.glob("phrases*"))


def test_sources_with_the_same_ids_stay_apart(tmp_path: Path) -> None:
    sources = []
    for name, caption in (("a", "a black dog"), ("b", "a red car")):
        (tmp_path / name).mkdir()
        row = {"image": "1.jpg", "id": "1", "captions": [caption]}
        sources.append(str(write_jsonl(tmp_path / name / "captions.jsonl", [row])))
    built = build_phrases(open_corpora(sources), make_extractor("light"), tmp_path / "p.jsonl", 1)
    assert [(row["source"], row["phrases"]) for row in lines(built.files[1])] == [(0, [0]), (1, [1])]
    assert [part.texts for part in built.statistics.parts] == [1, 1]


def edited(path: Path, number: int, **changes: object) -> None:
    rows = lines(path)
    rows[number] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"format": "x"}, 'line 1: field "format": expected "vlscale-phrases-1"'),
        (0, {"min_count": "two"}, 'line 1: field "min_count"'),
        (0, {"phrases": 99}, "expected 99 phrases, got"),
        (1, {"id": -1}, "line 2: expected an id from 0"),
        (1, {"id": 1 << 40}, "line 2: expected an id from 0"),
        (1, {"id": 1}, "expected different ids, got 1 twice"),
        (1, {"text": "x" * 101}, "line 2: expected a phrase of at most 100 characters, got 101"),
        (2, {"tuple": ["dog"]}, 'line 3: field "tuple": expected two or three strings, got 1'),
        (2, {"count": None}, 'line 3: field "count"'),
    ],
)
def test_broken_vocabulary(tmp_path: Path, number: int, changes: dict[str, object], message: str) -> None:
    path = build(tmp_path, records()).files[0]
    edited(path, number, **changes)
    with pytest.raises(UserError) as raised:
        PhraseVocabulary.load(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(UserError, match="empty; expected a vocabulary"):
        PhraseVocabulary.load(empty)
    for read in (PhraseVocabulary.load, PhraseVocabulary.from_id2phrase):
        with pytest.raises(UserError, match="can't be read"):
            read(tmp_path / "nowhere")
    sparse = tmp_path / "large"
    with sparse.open("wb") as file:
        file.truncate((1 << 30) + 1)
    for read in (PhraseVocabulary.load, PhraseVocabulary.from_id2phrase):
        with pytest.raises(UserError, match="1,073,741,825 bytes"):
            read(sparse)


def test_id2phrase_keeps_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "id2phrase.json"
    public = {"30524": "man-sit at-table", "5": "dog", "30530": ["young", "man"], "30529": "group of people"}
    path.write_text(json.dumps(public))
    vocabulary = PhraseVocabulary.from_id2phrase(path)
    assert [phrase.id for phrase in vocabulary] == [5, 30524, 30529, 30530]
    assert (vocabulary.word_ids, vocabulary.missing_ids) == (1, 30526 - 4)
    assert vocabulary[2].words == ("group", "of", "people")
    assert vocabulary[3].words == ("young", "man")
    assert vocabulary.phrases_of("A young man in a group of people sits at a dog") == [30530, 30529]
    assert vocabulary.phrases_of("two men sitting at a table") == [30524]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected MVPTR's id2phrase, an object from id to phrase, got an empty one"),
        ([], "got a list"),
        ({"x": "dog"}, "entry 'x': expected an id"),
        ({"-1": "dog"}, "entry '-1': expected an id"),
        ({"99999999999": "dog"}, "entry '99999999999': expected an id from 0 to"),
        ({"1": 2}, "entry '1': expected a phrase, got a number"),
        ({"1": "  "}, "entry '1': expected a phrase"),
        ({"1": ["a", 2]}, "entry '1': expected a phrase, got a list"),
        ({"1": "dog", "01": "cat"}, "expected different ids, got 1 twice"),
    ],
)
def test_broken_id2phrase(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "id2phrase.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        PhraseVocabulary.from_id2phrase(path)
    assert message in str(raised.value)


def test_other_version_of_the_extractor_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build(tmp_path, records()).files[0]
    edited(path, 0, version="0")
    assert PhraseVocabulary.load(path).phrases_of("a black dog")
    assert "made by light 0, here is 1-" in caplog.text


class Fixed:
    """An extractor that finds what it is told."""

    name, version = "fixed", "1"

    def __init__(self, tuples: dict[str, list[PhraseTuple]]) -> None:
        self._tuples = tuples

    def extract(self, caption: str) -> list[PhraseTuple]:
        return self._tuples[caption]

    def of_sample(self, sample: Any) -> list[list[PhraseTuple]]:
        return [self.extract(caption) for caption in sample.captions]


def test_compare() -> None:
    one = Fixed({"x": [("dog",), ("black", "dog"), ("big", "dog")], "y": [("a", "b", "c")], "z": []})
    other = Fixed({"x": [("dog",), ("black", "dog")], "y": [("a", "b", "d"), ("big", "dog")], "z": [("z",)]})
    result = compare(one, other, ["x", "y", "z"])
    rows = {row.kind: (row.found, row.expected, row.both) for row in result.agreement}
    assert rows == {"object": (1, 2, 1), "attribute": (2, 2, 1), "relation": (1, 1, 0), "phrase": (3, 3, 1)}
    scores = [(row.precision, row.recall, row.f1) for row in result.agreement[:3]]
    assert scores == [(1, 0.5, pytest.approx(2 / 3)), (0.5, 0.5, 0.5), (0, 0, 0)]
    assert (result.extractor.phrases_per_caption, result.reference.coverage) == (1, pytest.approx(2 / 3))
    assert some_captions(map(str, range(100)), 10) == some_captions(map(str, range(100)), 10)
    assert len(some_captions("abc", 10)) == 3


def test_light_agrees_with_the_parser_on_photographs() -> None:
    pytest.importorskip("sng_parser", reason="the extra `phrases` is not installed")
    corpora = open_corpora([str(shared("data/flickr8k/captions.jsonl"))])
    captions = some_captions(corpora.captions(["dev"]), 500)
    rows = {row.kind: row for row in compare(LightExtractor(), make_extractor("parser"), captions).agreement}
    assert rows["attribute"].f1 > 0.75
    assert rows["relation"].f1 > 0.5


def test_command(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "captions.jsonl", records()))
    out = tmp_path / "p.jsonl"
    run = CliRunner().invoke
    result = run(app, ["phrases", source, "--out", str(out), "--min-count", "2", "--split", "val", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "black dog" in result.output
    assert PhraseVocabulary.load(out).origin.sentences == 9
    spice = tmp_path / "spice.json"
    assert run(app, ["phrases", source, "--spice-input", str(spice)]).exit_code == 0
    assert len(json.loads(spice.read_text())) == sum(len(row["captions"]) for row in records())
    compared = run(app, ["phrases", source, "--compare", "light"])
    assert compared.exit_code == 0, compared.output
    assert "1.000" in compared.output
    for options in ([], ["--out", str(out), "--compare", "light"]):
        assert "expected one of --out, --spice-input, --compare" in str(
            run(app, ["phrases", source, *options]).exception
        )
    for options in (["--spice", "x.json"], ["--extractor", "x"], ["--extractor", "spice"]):
        assert isinstance(run(app, ["phrases", source, "--out", str(out), *options]).exception, UserError)
    missing = run(app, ["phrases", source, "--out", str(tmp_path / "no" / "p.jsonl")]).exception
    assert "make it first" in str(missing)
