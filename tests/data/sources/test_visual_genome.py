"""Visual Genome's regions, attributes and questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.published import attributes, image_data, put_images, question_answers, read, regions, write
from vlscale.data.sample import Phrase
from vlscale.data.sources.base import Notes
from vlscale.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put_images(tmp_path, ["VG_100K/1.jpg"], 80, 60)
    put_images(tmp_path, ["VG_100K_2/2.jpg"], 40, 30)
    write(tmp_path / "image_data.json", image_data())
    return tmp_path


def test_regions_are_captions_and_phrases(folder: Path) -> None:
    notes = Notes()
    first, second = read("vg-regions", write(folder / "region_descriptions.json", regions()), notes)
    assert first.captions == ("the clock is green in colour", "shade is along the street")
    assert first.phrases == (
        Phrase(first.captions[0], ((0.25, 0.25, 0.35, 0.35), (0.0, 0.0, 0.5, 0.5)), caption=0, first_word=0),
        Phrase(first.captions[1], ((0.0, 0.5, 0.5, 1.0),), caption=1, first_word=0),
    )
    assert notes.counts == {"repeated captions of an image": 1}
    assert (first.id, first.image, first.aliases) == ("1", folder / "VG_100K" / "1.jpg", ("vg:1",))
    assert (second.id, second.image) == ("2", folder / "VG_100K_2" / "2.jpg")
    assert second.aliases == ("vg:2", "coco:248774", "flickr:6273011878")
    assert second.phrases == (Phrase("a sidewalk", ((0.0, 0.0, 0.5, 0.5),), caption=0, first_word=0),)
    assert (first.boxes, first.tags, first.tuples) == ((), (), ())


def test_attributes_alone(folder: Path) -> None:
    notes = Notes()
    first, second = read("vg-attributes", write(folder / "attributes.json", attributes()), notes)
    assert first.tags == ("clock", "street", "clock")
    assert first.boxes == ((0.25, 0.25, 0.35, 0.35), (0.0, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5))
    assert first.tuples == (("green", "clock"), ("tall", "clock"), ("dark", "shade"))
    assert notes.counts == {"boxes without area in the image": 1}
    assert (second.tags, second.tuples, second.captions) == (("sidewalk",), (("wide", "sidewalk"),), ())


@pytest.mark.parametrize("turn", [False, True])
def test_regions_with_attributes_in_any_order(folder: Path, turn: bool) -> None:
    things = list(reversed(attributes())) if turn else attributes()
    alone = {sample.id: sample for sample in read("vg-attributes", write(folder / "attributes.json", things))}
    file = write(folder / "region_descriptions.json", regions())
    both = read("vg-regions", file, attributes=str(folder / "attributes.json"))
    assert [sample.id for sample in both] == ["1", "2"]
    for sample in both:
        assert (sample.boxes, sample.tags) == (alone[sample.id].boxes, alone[sample.id].tags)
        assert sample.tuples == alone[sample.id].tuples
        assert sample.captions


def test_attributes_know_fewer_images_than_regions(folder: Path) -> None:
    write(folder / "attributes.json", attributes()[:1])
    file = write(folder / "region_descriptions.json", regions())
    first, second = read("vg-regions", file, attributes=str(folder / "attributes.json"))
    assert (len(first.boxes), len(second.boxes), len(second.captions)) == (3, 0, 1)


def test_objects_without_name_are_counted(folder: Path) -> None:
    content = attributes()[:1]
    content[0]["attributes"][0]["names"] = []
    content[0]["attributes"][1]["names"] = [" "]
    notes = Notes()
    (sample,) = read("vg-attributes", write(folder / "attributes.json", content), notes)
    assert sample.tags == ("clock",)
    assert notes.counts["objects without name"] == 2


def test_questions(folder: Path) -> None:
    first, second = read("vg-qa", write(folder / "question_answers.json", question_answers()))
    assert [(q.id, q.text, q.answers) for q in first.questions] == [
        ("986768", "What color is the clock?", ("Green.",)),
        ("986777", "When?", ("During day.",)),
    ]
    assert len(second.questions) == 1
    assert second.aliases == ("vg:2", "coco:248774", "flickr:6273011878")


def test_release_1_0_names_its_keys_otherwise(folder: Path) -> None:
    old_regions = [
        {"id": 2, "regions": [{"id": 7, "image": 2, "phrase": "a path", "x": 0, "y": 0, "width": 40, "height": 30}]}
    ]
    (sample,) = read("vg-regions", write(folder / "region_descriptions.json", old_regions))
    assert (sample.id, sample.captions, sample.phrases[0].boxes) == ("2", ("a path",), ((0.0, 0.0, 1.0, 1.0),))
    old_things: list[dict[str, Any]] = attributes()[1:]
    old_things[0]["id"] = old_things[0].pop("image_id")
    old_things[0]["attributes"][0]["object_names"] = old_things[0]["attributes"][0].pop("names")
    old_things[0]["attributes"][0]["id"] = old_things[0]["attributes"][0].pop("object_id")
    (sample,) = read("vg-attributes", write(folder / "attributes.json", old_things))
    assert (sample.id, sample.tags) == ("2", ("sidewalk",))
    old_questions = [{"id": 2, "qas": [{"id": 5, "image": 2, "question": "Where?", "answer": "Left."}]}]
    (sample,) = read("vg-qa", write(folder / "question_answers.json", old_questions))
    assert [question.id for question in sample.questions] == ["5"]


def test_sizes_come_from_the_images_without_image_data(folder: Path) -> None:
    (folder / "image_data.json").unlink()
    file = write(folder / "region_descriptions.json", regions()[1:])
    (sample,) = read("vg-regions", file)
    assert sample.phrases[0].boxes == ((0.0, 0.0, 0.5, 0.5),)
    assert sample.aliases == ("vg:2",)
    (folder / "VG_100K_2" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"record 1: expected its size in image_data\.json or a readable .*2\.jpg"):
        read("vg-regions", file)
    with pytest.raises(UserError, match=r"none\.json: can't be read"):
        read("vg-regions", file, image_data=str(folder / "none.json"))


def test_missing_images_are_left_out(folder: Path) -> None:
    (folder / "VG_100K" / "1.jpg").unlink()
    write(folder / "attributes.json", attributes())
    notes = Notes()
    file = write(folder / "region_descriptions.json", regions())
    (sample,) = read("vg-regions", file, notes, attributes=str(folder / "attributes.json"))
    assert (sample.id, sample.tags) == ("2", ("sidewalk",))
    assert notes.missing == ["VG_100K/1.jpg"]


def test_a_wrong_record_of_the_other_file_is_named_there(folder: Path) -> None:
    content = attributes()
    content[0]["attributes"][1]["w"] = "wide"
    other = write(folder / "attributes.json", content)
    file = write(folder / "region_descriptions.json", regions())
    line = f'{other}, record 1: attributes, item 2: field "w": expected a number of pixels, got a string'
    with pytest.raises(UserError) as caught:
        read("vg-regions", file, attributes=str(other))
    assert str(caught.value) == line
    notes = Notes(strict=False)
    first, second = read("vg-regions", file, notes, attributes=str(other))
    assert notes.problems == [line]
    assert (first.boxes, len(first.captions), len(second.boxes)) == ((), 2, 1)
