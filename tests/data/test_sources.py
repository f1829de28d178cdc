"""jsonl files as they come, and which of their records train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import shared, write_jsonl
from vlscale.config import Data
from vlscale.data.open import evaluation_split, read_data, training_split
from vlscale.data.sample import Sample
from vlscale.data.sources.jsonl import read_jsonl
from vlscale.errors import UserError


def test_flickr8k_is_read_as_it_is() -> None:
    samples = read_data(Data(path=str(shared("data/flickr8k/captions.jsonl"))))
    assert len(samples) == 7000
    assert len(training_split(samples)) == 6000
    name, dev = evaluation_split(samples, None)
    assert (name, len(dev)) == ("dev", 1000)
    assert all(sample.image.is_file() and len(sample.captions) == 5 for sample in samples)
    assert samples[0].id == samples[0].image.name == "1000268201_693b08cb0e.jpg"
    assert samples[0].extra == {"flickr30k_id": "1000268201"}


def test_every_field(tmp_path: Path) -> None:
    record = {
        "image": "a.jpg",
        "id": 7,
        "split": "val",
        "captions": ["x"],
        "boxes": [[0, 0.5, 1, 1]],
        "tags": ["red ball"],
        "tuples": [["ball"], ["red", "ball"], ["ball", "on", "grass"]],
        "licence": {"by": 4},
    }
    (sample,) = read_jsonl(write_jsonl(tmp_path / "c.jsonl", [record]))
    assert (sample.id, sample.split, sample.captions, sample.tags) == ("7", "val", ("x",), ("red ball",))
    assert sample.boxes == ((0.0, 0.5, 1.0, 1.0),)
    assert sample.tuples == (("ball",), ("red", "ball"), ("ball", "on", "grass"))
    assert sample.extra == {"licence": {"by": 4}}


def test_where_images_are_looked_for(tmp_path: Path) -> None:
    root, data = tmp_path / "root", tmp_path / "data"
    for folder in (root, data, data / "images"):
        folder.mkdir()
        (folder / "everywhere.png").touch()
    (data / "beside.png").touch()
    (data / "images" / "below.png").touch()
    outside = tmp_path / "outside.png"
    outside.touch()
    names = ["everywhere.png", "beside.png", "below.png", "nowhere.png", "../outside.png", str(outside)]
    file = write_jsonl(data / "c.jsonl", [{"image": name} for name in names])
    beside = data / "beside.png"
    below = data / "images" / "below.png"
    with_root = [sample.image for sample in read_jsonl(file, root)]
    assert with_root == [root / names[0], beside, below, root / "nowhere.png", root / "../outside.png", outside]
    without = [sample.image for sample in read_jsonl(file)]
    assert without == [data / names[0], beside, below, data / "nowhere.png", data / "../outside.png", outside]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"image": ', "not JSON"),
        ("[1]", "expected an object, got a list"),
        ("[" * 100_000, "not JSON"),
        ('{"captions": ["a"]}', 'field "image": expected the path of an image, got nothing'),
        ('{"image": 3}', 'field "image": expected the path of an image, got a number'),
        ('{"image": "a\\u0000b"}', 'field "image": the path holds a zero byte'),
        ('{"image": "a", "captions": "one"}', 'field "captions": expected a list of strings, got a string'),
        ('{"image": "a", "captions": ["x", 1]}', 'field "captions": expected a list of strings, got a number in it'),
        ('{"image": "a", "id": [1]}', 'field "id": expected a string or a whole number, got a list'),
        ('{"image": "a", "split": 1}', 'field "split"'),
        ('{"image": "a", "boxes": [[0, 1, 2]]}', 'field "boxes": expected a list of [x1, y1, x2, y2]'),
        ('{"image": "a", "boxes": [[0, 1, 2, NaN]]}', 'field "boxes"'),
        ('{"image": "a", "tuples": [[]]}', 'field "tuples": expected a list of lists of one to three strings'),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"image": "good.jpg"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_jsonl(file)
    assert str(caught.value).startswith(f"{file}, line 3: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"image": "with a byte order mark"}\n{"image": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8 at byte 14"):
        read_jsonl(file)


def test_paths_no_file_system_knows_stay_in_the_list(tmp_path: Path) -> None:
    names = ["x" * 5000, "\ud800.jpg", "http://example.org/a.jpg", "a/../../../../../../../../etc"]
    samples = read_jsonl(write_jsonl(tmp_path / "c.jsonl", [{"image": name} for name in names]))
    assert [sample.id for sample in samples] == names


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(UserError, match="holds no record"):
        read_jsonl(tmp_path / "c.jsonl")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_data(Data(path=str(tmp_path / "no.jsonl")))
    with pytest.raises(UserError, match=r"a folder without captions\.jsonl"):
        read_data(Data(path=str(tmp_path)))
    file = write_jsonl(tmp_path / "captions.jsonl", [{"image": "a"}])
    with pytest.raises(UserError, match=r"image root .*no such folder"):
        read_data(Data(path=str(file), image_root=str(tmp_path / "no")))
    assert len(read_data(Data(path=str(tmp_path)))) == 1


def _samples(*splits: str, **fields: Any) -> list[Sample]:
    return [Sample(f"{i}", Path("a.jpg"), fields.get("captions", ("a dog",)), split) for i, split in enumerate(splits)]


def test_training_takes_train_and_restval_only() -> None:
    chosen = training_split(_samples("train", "restval", "val", "dev", "test", "testB"))
    assert [sample.split for sample in chosen] == ["train", "restval"]
    with pytest.raises(UserError, match=r"split 'train' is empty.*test \(1\)"):
        training_split(_samples("test"))


def test_records_without_split_train(tmp_path: Path) -> None:
    samples = read_jsonl(write_jsonl(tmp_path / "c.jsonl", [{"image": "a", "captions": ["b"]}]))
    assert list(training_split(samples)) == samples


def test_evaluation_prefers_test_and_knows_that_dev_is_val() -> None:
    both = _samples("train", "dev", "test")
    assert evaluation_split(both, None)[0] == "test"
    assert evaluation_split(_samples("train", "dev"), None)[0] == "dev"
    assert [sample.split for sample in evaluation_split(both, "val")[1]] == ["dev"]
    assert [sample.split for sample in evaluation_split(_samples("val"), "dev")[1]] == ["val"]
    assert evaluation_split(_samples("testB"), "testB")[0] == "testB"
    for split in (None, "test", "minival"):
        with pytest.raises(UserError, match=r"splits there are: train \(2\)"):
            evaluation_split(_samples("train", "train"), split)


def test_records_without_captions_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    samples = _samples("train", "train") + _samples("train", captions=()) + _samples("train", captions=(" ",))
    assert list(training_split(samples)) == samples[:2]
    assert "2 of 4 records have no caption" in caplog.text
    with pytest.raises(UserError, match="its 1 records have no captions"):
        training_split(_samples("train", captions=()))
