"""Karpathy's splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sources.published import karpathy_coco, karpathy_flickr, put_images, read, write
from vlscale.data.sources.base import Notes


def test_coco_in_its_folders(tmp_path: Path) -> None:
    content = karpathy_coco()
    put_images(tmp_path, [f"{image['filepath']}/{image['filename']}" for image in content["images"]])
    samples = read("karpathy", write(tmp_path / "dataset_coco.json", content))
    assert [sample.split for sample in samples] == ["test", "restval", "train"]
    assert [sample.aliases for sample in samples] == [("coco:391895",), ("coco:522418",), ("coco:57870",)]
    assert samples[0].id == "COCO_val2014_000000391895.jpg"
    assert samples[0].image == tmp_path / "val2014" / samples[0].id
    assert samples[0].captions == ("A man with a red helmet.", "Man riding a motor bike.")


@pytest.mark.parametrize("place", ["{}", "train2017/{}", "val2017/{}"])
def test_coco_with_the_images_of_2017(tmp_path: Path, place: str) -> None:
    put_images(tmp_path / "pictures", [place.format("000000391895.jpg")])
    notes = Notes()
    file = write(tmp_path / "dataset_coco.json", karpathy_coco())
    (sample,) = read("karpathy", file, notes, images=str(tmp_path / "pictures"))
    assert sample.image == tmp_path / "pictures" / place.format("000000391895.jpg")
    assert notes.missing == [
        "val2014/COCO_val2014_000000522418.jpg",
        "train2014/COCO_train2014_000000057870.jpg",
    ]


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("1000092795.jpg", ("flickr:1000092795",)),  # Flickr30k
        ("1000268201_693b08cb0e.jpg", ("flickr:1000268201",)),  # Flickr8k
        ("airport_1.jpg", ()),
        ("00012.jpg", ()),
    ],
)
def test_flickr_and_others_in_the_same_layout(tmp_path: Path, name: str, aliases: tuple[str, ...]) -> None:
    put_images(tmp_path / "images", [name])
    (sample,) = read("karpathy", write(tmp_path / "dataset_flickr30k.json", karpathy_flickr(name)))
    assert (sample.id, sample.split, sample.captions, sample.aliases) == (name, "val", ("A dog.",), aliases)


def test_empty_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    put_images(tmp_path, ["1000092795.jpg"])
    content = karpathy_flickr("1000092795.jpg")
    content["images"][0]["sentences"].append({"tokens": [], "raw": " ", "imgid": 0, "sentid": 1})
    notes = Notes()
    (sample,) = read("karpathy", write(tmp_path / "dataset_flickr30k.json", content), notes)
    assert sample.captions == ("A dog.",)
    assert notes.counts == {"empty captions": 1}


def test_splits_alone_need_no_images(tmp_path: Path) -> None:
    file = write(tmp_path / "dataset_flickr30k.json", karpathy_flickr("1000092795.jpg"))
    (sample,) = read("karpathy", file, Notes(need_images=False))
    assert (Path(str(sample.image)).name, sample.split) == ("1000092795.jpg", "val")
