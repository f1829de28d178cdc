"""COCO captions and instances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import shared
from tests.data.sources.published import coco_captions, coco_instances, put_images, read, write
from vlscale.data.sources.base import Notes
from vlscale.errors import UserError

NAMES = ("COCO_val2014_000000391895.jpg", "COCO_val2014_000000000009.jpg")


@pytest.mark.parametrize(("split", "images", "boxes", "crowds"), [("train", 80, 731, 8), ("val", 79, 619, 5)])
def test_the_real_instances(split: str, images: int, boxes: int, crowds: int) -> None:
    notes = Notes()
    samples = read("coco", shared(f"data/coco/instances_{split}2017.json"), notes)
    assert (len(samples), sum(len(sample.boxes) for sample in samples)) == (images, boxes)
    assert notes.counts == {"boxes of crowds": crowds}
    assert not notes.missing
    for sample in samples:
        assert sample.split == split
        assert Path(str(sample.image)).name == sample.id
        assert len(sample.tags) == len(sample.boxes)
        assert f"coco:{int(sample.id[:12])}" in sample.aliases
        assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in sample.boxes)
    assert all(len(sample.aliases) == 2 for sample in samples), "every COCO image is a Flickr photograph"


def test_captions_keep_their_order_and_split(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NAMES)
    first, second = read("coco", write(tmp_path / "captions_val2014.json", coco_captions()))
    assert (first.id, first.split, first.boxes, first.tags) == (NAMES[0], "val", (), ())
    assert first.captions == (
        "A man with a red helmet on a small moped.",
        "Man riding a motor bike on a dirt road.",
    )
    assert first.aliases == ("coco:391895", "flickr:6255196340")
    assert second.aliases == ("coco:9",)
    assert second.captions == ("Closeup of bins of food.",)


def test_instances_become_boxes_in_shares_with_their_category(tmp_path: Path) -> None:
    put_images(tmp_path, NAMES)
    notes = Notes()
    first, second = read("coco", write(tmp_path / "instances_train2014.json", coco_instances()), notes)
    assert first.split == "train"
    assert first.tags == ("person", "motorcycle")
    assert first.boxes == ((0.1, 0.1, 0.6, 0.6), (600 / 640, 400 / 480, 1.0, 1.0))
    assert (second.tags, second.boxes) == (("apple",), ((0.0, 0.0, 1.0, 1.0),))
    assert notes.counts == {"boxes of crowds": 1, "boxes without area in the image": 1}


def test_lists_may_stand_in_any_order(tmp_path: Path) -> None:
    put_images(tmp_path, NAMES)
    turned = dict(reversed(list(coco_instances().items())))
    plain = read("coco", write(tmp_path / "a_train.json", coco_instances()))
    assert read("coco", write(tmp_path / "b_train.json", turned)) == plain


def test_an_image_without_annotation_is_there(tmp_path: Path) -> None:
    put_images(tmp_path, NAMES)
    content = coco_captions()
    content["annotations"] = content["annotations"][:1]
    _, bare = read("coco", write(tmp_path / "captions_val2014.json", content))
    assert (bare.id, bare.captions) == (NAMES[1], ())


def test_test_images_are_published_without_annotations(tmp_path: Path) -> None:
    put_images(tmp_path, NAMES)
    content = coco_captions()
    del content["annotations"]
    samples = read("coco", write(tmp_path / "image_info_test2014.json", content))
    assert [sample.split for sample in samples] == ["test", "test"]
    with pytest.raises(UserError, match=r'captions_val2014\.json: field "annotations": expected a list, got nothing'):
        read("coco", write(tmp_path / "captions_val2014.json", content))


@pytest.mark.parametrize(
    "place",
    [
        "images/val2014/COCO_val2014_{}",
        "val2014/COCO_val2014_{}",
        "COCO_val2014_{}",
        "train2017/{}",
        "val2017/{}",
        "{}",
    ],
)
def test_where_images_lie_and_what_the_other_year_calls_them(tmp_path: Path, place: str) -> None:
    put_images(tmp_path, [place.format("000000391895.jpg")])
    notes = Notes()
    (sample,) = read("coco", write(tmp_path / "captions_val2014.json", coco_captions()), notes)
    assert sample.id == NAMES[0]
    assert sample.image == tmp_path / place.format("000000391895.jpg")
    assert notes.missing == [NAMES[1]]


def test_the_2014_images_serve_the_2017_annotations(tmp_path: Path) -> None:
    put_images(tmp_path, [f"train2014/{NAMES[0].replace('val', 'train')}"])
    content = coco_captions()
    content["images"][0]["file_name"] = "000000391895.jpg"
    (sample,) = read("coco", write(tmp_path / "captions_val2017.json", content), Notes())
    assert (sample.id, sample.image.name) == ("000000391895.jpg", "COCO_train2014_000000391895.jpg")  # type: ignore[union-attr]


def test_numbers_of_other_data_sets_are_no_coco_ids(tmp_path: Path) -> None:
    put_images(tmp_path, ["VizWiz_train_00000000.jpg"])
    content = coco_captions()
    content["images"][0]["file_name"] = "VizWiz_train_00000000.jpg"
    content["images"][0]["flickr_url"] = ""
    (sample,) = read("coco", write(tmp_path / "annotations.json", content), Notes())
    assert sample.aliases == ()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_train2014.json", "train"),
        ("instances_val2017.json", "val"),
        ("captions_minival2014.json", "val"),
        ("instances_valminusminival2014.json", "train"),
        ("captions_test2015.json", "test"),
        ("image_info_test-dev2017.json", "test-dev"),
        ("annotations.json", "train"),
    ],
)
def test_splits_are_those_of_the_file_name(tmp_path: Path, name: str, split: str) -> None:
    put_images(tmp_path, NAMES)
    assert {sample.split for sample in read("coco", write(tmp_path / name, coco_captions()))} == {split}


def test_a_wrong_image_takes_only_itself_along(tmp_path: Path) -> None:
    put_images(tmp_path, NAMES)
    content: dict[str, Any] = coco_instances()
    content["images"][0]["width"] = 0
    content["annotations"].append({"image_id": 77, "bbox": [1, 1, 1, 1], "category_id": 1})
    content["annotations"].append({"image_id": 9, "bbox": [1, 1, 1, 1], "category_id": 2})
    file, notes = write(tmp_path / "instances_val2014.json", content), Notes(strict=False)
    (kept,) = read("coco", file, notes)
    assert (kept.id, kept.tags) == (NAMES[1], ("apple",))
    assert notes.problems == [
        f"{file}, annotations, record 6: field \"image_id\": expected the id of one of the images, got '77'",
        f'{file}, images, record 1: fields "width" and "height": expected numbers above 0, got 0 and 480',
        f"{file}, annotations, record 7: field \"category_id\": expected the id of one of the categories, got '2'",
    ]
