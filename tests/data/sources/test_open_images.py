"""Open Images' CSV files as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sources.layouts import BOX_COLUMNS, CLASSES, read, touch, write
from vlscale.data.sources.open_images import IMAGE_TAGS
from vlscale.errors import UserError

BOXES = (
    f"{BOX_COLUMNS}\n"
    "000a,xclick,/m/0bt9lr,1,0.1,0.5,0.2,0.6,0,0,0,0\n"
    "000a,activemil,/m/01g317,0.9,0,1.000000,0,1,1,-1,0,0\n"
    "000a,xclick,/m/0bt9lr,1,0.25,0.75,0.25,0.75,0,0,1,0\n"
    "000b,xclick,/m/0x,1,0.5,0.5,0,1,0,0,0,0\n"
)
LABELS = (
    "ImageID,Source,LabelName,Confidence\n"
    "000a,verification,/m/07j7r,1\n"
    "000a,crowdsource-verification,/m/07j7r,0.7\n"
    "000a,verification,/m/0x,0\n"
    "000c,machine,/m/01g317,0.8\n"
    "000d,verification,/m/0x,0\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    touch(tmp_path, *(f"images/000{letter}.jpg" for letter in "abcd"))
    write(tmp_path / "classes.csv", CLASSES)
    write(tmp_path / "validation-annotations-bbox.csv", BOXES)
    write(tmp_path / "validation-annotations-human-imagelabels.csv", LABELS)
    return tmp_path


def test_boxes(folder: Path) -> None:
    samples, notes = read("open-images", folder / "validation-annotations-bbox.csv", classes=folder / "classes.csv")
    assert [sample.id for sample in samples] == ["000a", "000b"]
    first, second = samples
    assert first.boxes == ((0.1, 0.2, 0.5, 0.6), (0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75))
    assert (first.tags, first.confidences) == (("dog", "person", "dog"), (1, 0.9, 1))
    assert (first.split, first.aliases, first.captions, first.extra) == ("val", ("openimages:000a",), (), {})
    assert first.image == folder / "images" / "000a.jpg"
    assert second.tags == ("tree, old",)
    assert not notes.counts


def test_boxes_and_labels(folder: Path) -> None:
    samples, notes = read(
        "open-images",
        folder / "validation-annotations-bbox.csv",
        classes=folder / "classes.csv",
        labels=folder / "validation-annotations-human-imagelabels.csv",
        text="tags",
    )
    assert [(sample.id, sample.tags, sample.captions) for sample in samples] == [
        ("000a", ("dog", "person", "dog"), ("dog, person, tree",)),
        ("000b", ("tree, old",), ("tree, old",)),
        ("000c", ("person",), ("person",)),
    ]
    assert samples[0].extra == {IMAGE_TAGS: {"tree": 1}}
    assert (samples[2].boxes, samples[2].confidences, samples[2].extra) == ((), (0.8,), {})
    assert notes.counts == {"labels verified absent": 2}


def test_labels_alone(folder: Path) -> None:
    samples, _ = read(
        "open-images", folder / "validation-annotations-human-imagelabels.csv", classes=folder / "classes.csv"
    )
    found = [(sample.id, sample.tags, sample.confidences) for sample in samples]
    assert found == [("000a", ("tree",), (1,)), ("000c", ("person",), (0.8,))]


def test_columns_in_another_order_and_a_class_header(folder: Path) -> None:
    file = write(
        folder / "test-annotations-bbox.csv",
        "\ufeffImageID,LabelName,XMin,YMin,XMax,YMax,Confidence,Source\r\n000a,/m/0bt9lr,0.1,0.2,0.5,0.6,1,x\r\n\r\n",
    )
    classes = write(folder / "oidv7-class-descriptions.csv", "LabelName,DisplayName\n" + CLASSES)
    (sample,), _ = read("open-images", file, classes=classes)
    assert (sample.boxes, sample.tags, sample.split) == (((0.1, 0.2, 0.5, 0.6),), ("dog",), "test")


def test_images_in_the_folders_of_a_download(tmp_path: Path) -> None:
    touch(tmp_path, "train_0/000a.jpg", "train/000b.jpg")
    write(tmp_path / "classes.csv", CLASSES)
    file = write(tmp_path / "oidv6-train-annotations-bbox.csv", BOXES)
    samples, notes = read("open-images", file, classes=tmp_path / "classes.csv")
    assert [str(sample.image.parent.name) for sample in samples] == ["train_0", "train"]  # type: ignore[union-attr]
    (tmp_path / "train" / "000b.jpg").unlink()
    samples, notes = read("open-images", file, classes=tmp_path / "classes.csv")
    assert ([sample.id for sample in samples], notes.missing) == (["000a"], ["000b.jpg"])


@pytest.mark.parametrize(
    "rows", ["000b,x,/m/0x,1\n000a,x,/m/0x,1\n", "000a,x,/m/0x,1\n000b,x,/m/0x,1\n000a,x,/m/0x,1\n"]
)
def test_rows_have_to_be_sorted(folder: Path, rows: str) -> None:
    file = write(folder / "x.csv", "ImageID,Source,LabelName,Confidence\n" + rows)
    for strict in (True, False):
        with pytest.raises(
            UserError, match=r"x\.csv, line \d: field \"ImageID\": '000a' comes after '000b'; the file must"
        ):
            read("open-images", file, strict, classes=folder / "classes.csv")


def test_what_is_needed(folder: Path) -> None:
    boxes = folder / "validation-annotations-bbox.csv"
    with pytest.raises(UserError, match="needs classes=FILE"):
        read("open-images", boxes)
    with pytest.raises(UserError, match=r"empty\.csv: is empty; expected a CSV with the columns ImageID"):
        read("open-images", write(folder / "empty.csv", ""), classes=folder / "classes.csv")
    with pytest.raises(UserError, match=r"a\.csv, line 1: no column YMax; expected a CSV"):
        read("open-images", write(folder / "a.csv", BOXES.replace("YMax", "y")), classes=folder / "classes.csv")
    with pytest.raises(UserError, match=r"c\.csv, line 2: expected LabelName,DisplayName, got 1 columns"):
        read("open-images", boxes, classes=write(folder / "c.csv", "/m/0x,Tree\n/m/0y\n"))
    with pytest.raises(UserError, match=r"c\.csv: holds no class"):
        read("open-images", boxes, classes=write(folder / "c.csv", "LabelName,DisplayName\n"))
