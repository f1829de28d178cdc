"""VinVL's TSV files as published: features, predictions and labels, read whole and by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.sources.layouts import detected, encoded, read, regions, touch, write, write_lines
from vlscale.data.records import from_record, to_record
from vlscale.data.sources.vinvl import REGION_FEATURES, read_features
from vlscale.errors import UserError

NAMES = {"9": ["dog", "grass", "red ball"], "25": ["cat"], "30": []}
FEATURES = {key: regions(int(key), len(names)) for key, names in NAMES.items()}
SIZES = {"9": (640, 480), "25": (300, 400), "30": (10, 10)}


def _features(folder: Path, form: str = "columns") -> Path:
    rows = []
    for key, values in FEATURES.items():
        content = {"num_boxes": len(values), "features": encoded(values)}
        if form == "columns":
            rows.append(f"{key}\t{len(values)}\t{content['features']}")
        else:
            rows.append(f"{key}\t{json.dumps(content)}")
    return write_lines(folder / "features.tsv", *rows)


def _labels(folder: Path, keys: tuple[str, ...] = ("9", "25", "30")) -> Path:
    rows = [f"{key}\t{json.dumps(detected(FEATURES[key], NAMES[key], *SIZES[key]))}" for key in keys]
    return write_lines(folder / "labels.tsv", *rows)


def _sizes(folder: Path) -> Path:
    rows = [f'{key}\t[{{"height": {height}, "width": {width}}}]' for key, (width, height) in SIZES.items()]
    return write_lines(folder / "hw.tsv", *rows)


@pytest.mark.parametrize("form", ["columns", "json"])
def test_features_have_their_boxes_in_them(tmp_path: Path, form: str) -> None:
    samples, notes = read("vinvl", _features(tmp_path, form))
    assert [sample.id for sample in samples] == ["9", "25", "30"]
    assert [str(sample.image) for sample in samples] == ["9.jpg", "25.jpg", "30.jpg"]
    for sample in samples:
        values = FEATURES[sample.id]
        assert np.array(sample.boxes).reshape(-1, 4) == pytest.approx(values[:, 2048:2052])
        pointer = sample.extra[REGION_FEATURES]
        assert (pointer["boxes"], pointer["width"]) == (len(values), 2054)
        assert np.array_equal(read_features(pointer), values)
        assert read_features(pointer).flags.writeable
    assert not notes.missing


@pytest.mark.parametrize("order", [("9", "25", "30"), ("30", "25", "9")])
def test_labels_beside_features_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    samples, _ = read("vinvl", _features(tmp_path), labels=_labels(tmp_path, order))
    assert [list(sample.tags) for sample in samples] == list(NAMES.values())
    assert samples[0].confidences == (0.25, 0.5, 0.75)
    with_sizes, _ = read("vinvl", tmp_path / "features.tsv", labels=tmp_path / "labels.tsv", sizes=_sizes(tmp_path))
    for one, other in zip(samples, with_sizes, strict=True):
        assert np.array(one.boxes).reshape(-1, 4) == pytest.approx(np.array(other.boxes).reshape(-1, 4), abs=1e-6)
        assert np.array_equal(read_features(other.extra[REGION_FEATURES]), FEATURES[other.id])


def test_rows_without_labels_are_counted(tmp_path: Path) -> None:
    samples, notes = read("vinvl", _features(tmp_path), labels=_labels(tmp_path, ("30", "9")))
    assert [sample.id for sample in samples] == ["9", "30"]
    assert notes.counts == {"rows without labels": 1}


@pytest.mark.parametrize("size", ["inside", "beside"])
def test_predictions_with_features(tmp_path: Path, size: str) -> None:
    rows = []
    for key, values in FEATURES.items():
        objects = detected(values, NAMES[key], *SIZES[key])
        for item, row in zip(objects, values, strict=True):
            item["feature"] = encoded(row[:2048])
        width, height = SIZES[key]
        inside = {"image_h": height, "image_w": width} if size == "inside" else {}
        rows.append(f"{key}\t{json.dumps({**inside, 'objects': objects})}")
    file = write_lines(tmp_path / "predictions.tsv", *rows)
    samples, _ = read("vinvl", file, **({} if size == "inside" else {"sizes": _sizes(tmp_path)}))
    assert [list(sample.tags) for sample in samples] == list(NAMES.values())
    for sample in samples[:2]:
        values = FEATURES[sample.id]
        assert np.array(sample.boxes) == pytest.approx(values[:, 2048:2052], abs=1e-6)
        # What leads to the features goes through JSON with the sample.
        again = from_record(json.loads(json.dumps(to_record(sample))), sample.id, sample.image)
        assert read_features(again.extra[REGION_FEATURES]) == pytest.approx(values, abs=1e-6)
    assert (samples[2].boxes, samples[2].extra) == ((), {})


def test_labels_alone_need_sizes(tmp_path: Path) -> None:
    labels = _labels(tmp_path)
    samples, _ = read("vinvl", labels, sizes=_sizes(tmp_path))
    assert np.array(samples[0].boxes) == pytest.approx(FEATURES["9"][:, 2048:2052], abs=1e-6)
    assert samples[0].extra == {}
    with pytest.raises(UserError, match=r'labels\.tsv, line 1: field "image_w" or "image_h": .*or give sizes=FILE'):
        read("vinvl", labels)
    with pytest.raises(UserError, match=r"labels\.tsv, line 1: expected features beside labels="):
        read("vinvl", labels, labels=labels)


def test_labels_without_confidence(tmp_path: Path) -> None:
    row = '9\t[{"class": "Dog", "rect": [0, 0, 5, 5]}, {"class": "Cat", "rect": [5, 5, 20, 10]}]'
    (sample,), _ = read("vinvl", write_lines(tmp_path / "train.label.tsv", row), sizes=_write_size(tmp_path))
    assert (sample.tags, sample.confidences) == (("Dog", "Cat"), ())
    assert sample.boxes == ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))  # cut at the image's edge


def _write_size(folder: Path) -> Path:
    return write_lines(folder / "hw.tsv", '9\t[{"height": 10, "width": 10}]')


def test_images_are_looked_for_where_there_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path / "images", "9.jpg", "30.png")
    samples, notes = read("vinvl", _features(tmp_path), images=tmp_path / "images")
    assert [sample.image.name for sample in samples] == ["9.jpg", "30.png"]
    assert notes.missing == ["25.jpg"]


GOOD = f"25\t1\t{encoded(FEATURES['25'])}"
BAD_PLACES = FEATURES["25"].copy()
BAD_PLACES[0, 2048:2052] = [10, 20, 200, 300]
NOT_FINITE = FEATURES["25"].copy()
NOT_FINITE[0, 7] = np.nan
OBJECT = '{"class": "dog", "conf": 0.5, "rect": [0, 0, 1, 1]}'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("9", "expected 2 or 3 columns, got 1"),
        ("9\t1\t2\t3", "expected 2 or 3 columns, got 4"),
        ("\t1\tAAAA", "column 1: expected the key of an image"),
        ("../9\t1\tAAAA", "column 1: expected the key of an image, got '../9'"),
        (b"\xff\t1\tAAAA", "not UTF-8 at byte 0"),
        ("9\tone\tAAAA", "column 2: expected the number of boxes, got 'one'"),
        ("9\t-1\tAAAA", "column 2: expected the number of boxes, got '-1'"),
        ("9\t1\tAA*A", "features: not base64"),
        ("9\t1\tAAAAA", "features: not base64"),
        ("9\t1\tAAAA", "features: expected 1 boxes × 2054 numbers = 8216 bytes, got 3"),
        (GOOD.replace("\t1\t", "\t2\t"), "features: expected 2 boxes × 2054 numbers = 16432 bytes, got 8216"),
        (f"9\t1\t{encoded(BAD_PLACES)}", "expected x1/W, y1/H, x2/W, y2/H in columns 2048 to 2051, got 10 to 300"),
        (f"9\t1\t{encoded(NOT_FINITE)}", "features: expected finite numbers"),
        ('9\t{"num_boxes": 1, "features": ', "column 2: not JSON"),
        ('9\t{"num_boxes": 1, "features": 5}', 'field "features": expected base64, got a number'),
        ('9\t{"num_boxes": true, "features": "AAAA"}', 'field "num_boxes": expected a number, got true or false'),
        ('9\t{"num_boxes": 1, "features": "\\ud800"}', 'field "features": expected base64 without escapes'),
        ('9\t{"num_boxes": 1}', 'field "objects": expected a list of {"class"'),
        ("9\t5", 'column 2: expected a list of {"class"'),
        ("9\t" + "[" * 100_000, "column 2: not JSON"),
        ('9\t["dog"]', "objects, item 1: expected an object, got a string"),
        (f'9\t[{OBJECT}, {{"class": "dog", "conf": 0.5}}]', 'objects, item 2: field "rect": expected [x1, y1, x2, y2]'),
        ('9\t[{"class": "dog", "rect": [0, 0, 1]}]', 'field "rect": expected [x1, y1, x2, y2], got [0, 0, 1]'),
        ('9\t[{"class": "dog", "rect": [5, 0, 1, 1]}]', 'field "rect": expected [x1, y1, x2, y2], got [5, 0, 1, 1]'),
        ('9\t[{"class": "dog", "rect": [0, 0, 1, NaN]}]', 'field "rect": expected [x1, y1, x2, y2]'),
        ('9\t[{"conf": 0.5, "rect": [0, 0, 1, 1]}]', 'field "class": expected a string, got nothing'),
        (
            '9\t[{"class": "dog", "conf": "high", "rect": [0, 0, 1, 1]}]',
            'field "conf": expected a number, got a string',
        ),
        (
            f'9\t[{OBJECT}, {{"class": "dog", "rect": [0, 0, 1, 1]}}]',
            'field "conf": expected it in all objects or in none',
        ),
        (
            f'9\t{{"image_w": 0, "image_h": 4, "objects": [{OBJECT}]}}',
            'field "image_w": expected a number above 0, got 0',
        ),
        (f'9\t{{"image_w": 4, "objects": [{OBJECT}]}}', 'field "image_h": expected a number, got nothing'),
    ],
)
def test_a_wrong_row_is_named_and_left_out(tmp_path: Path, row: str | bytes, expected: str) -> None:
    file = write_lines(tmp_path / "x.tsv", row, GOOD)
    with pytest.raises(UserError) as caught:
        read("vinvl", file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 1: ")
    assert expected in message
    assert "\n" not in message
    samples, notes = read("vinvl", file, strict=False)
    assert ([sample.id for sample in samples], notes.problems) == (["25"], [message])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("9\t[]", "line 1: expected 3 objects, one per region of the features, got 0"),
        ("9", "line 1: expected 2 columns, got 1"),
        ("9\tnone", "line 1: column 2: not JSON"),
    ],
)
def test_wrong_labels_are_named_with_their_file(tmp_path: Path, labels: str, expected: str) -> None:
    file = write_lines(tmp_path / "labels.tsv", labels)
    with pytest.raises(UserError) as caught:
        read("vinvl", _features(tmp_path), labels=file)
    assert str(caught.value).startswith(f"{tmp_path / 'features.tsv'}, line 1: labels in {file}, {expected}")


@pytest.mark.parametrize("row", ["9\t[]", '9\t{"width": 5}', '9\t[{"width": 5, "height": 0}]', "9\t480 640", "9"])
def test_wrong_sizes_are_named(tmp_path: Path, row: str) -> None:
    sizes = write_lines(tmp_path / "hw.tsv", row)
    with pytest.raises(UserError, match=r"hw\.tsv, line 1: "):
        read("vinvl", _features(tmp_path), sizes=sizes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"file": "/nowhere/features.tsv"}, "can't be read"),
        ({"file": 5}, 'field "file": expected'),
        ({"offset": -5}, "the file has"),
        ({"offset": 1 << 62}, "the file has"),
        ({"offset": 0}, "features: "),
        ({"length": 100}, "features: "),
        ({"length": 1 << 62}, "the file has"),
        ({"boxes": 2}, "features: expected 2 boxes"),
        ({"boxes": "3"}, 'field "boxes": expected a number'),
        ({"size": [5, 5]}, "expected region features"),
        ({"size": [0, 0]}, "expected region features"),
    ],
)
def test_features_that_are_no_more_where_they_were(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    samples, _ = read("vinvl", _features(tmp_path))
    with pytest.raises(UserError) as caught:
        read_features({**samples[0].extra[REGION_FEATURES], **change})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.tsv: can't be read"):
        read("vinvl", tmp_path / "no.tsv")
    with pytest.raises(UserError, match=r"no\.tsv: can't be read"):
        read("vinvl", _features(tmp_path), labels=tmp_path / "no.tsv")
    assert read("vinvl", write(tmp_path / "empty.tsv", ""))[0] == []
