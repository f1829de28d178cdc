"""GQA as published: one file, chunks of a file, and test splits without answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sources.layouts import gqa_question, read, touch, write
from vlscale.data.sample import Question
from vlscale.errors import UserError


def test_questions_are_gathered_by_image(tmp_path: Path) -> None:
    touch(tmp_path, "images/2405722.jpg", "images/n161313.jpg")
    file = write(
        tmp_path / "val_balanced_questions.json",
        {
            "07333408": gqa_question("2405722"),
            "07333405": gqa_question("n161313", "cat", types={"semantic": "cat", "structural": "query"}),
            "15736264": gqa_question("2405722", "yes"),
        },
    )
    samples, notes = read("gqa", file)
    assert [(sample.id, sample.split, sample.aliases) for sample in samples] == [
        ("2405722", "val", ("vg:2405722",)),
        ("n161313", "val", ()),
    ]
    assert samples[0].questions == (
        Question("07333408", "Is it overcast?", ("no",), "attr"),
        Question("15736264", "Is it overcast?", ("yes",), "attr"),
    )
    assert samples[1].questions[0].kind == "cat"
    assert samples[0].image == tmp_path / "images" / "2405722.jpg"
    assert not notes.missing


def test_a_folder_of_chunks(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    folder = tmp_path / "train_all_questions"
    write(folder / "train_all_questions_0.json", {"a": gqa_question("1"), "b": gqa_question("2")})
    write(folder / "train_all_questions_1.json", {"c": gqa_question("1")})
    samples, _ = read("gqa", folder, images=tmp_path / "images")
    found = [(sample.split, [item.id for item in sample.questions]) for sample in samples]
    assert found == [("train", ["a", "c"]), ("train", ["b"])]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.json file"):
        read("gqa", tmp_path / "empty")


def test_names_elsewhere_come_from_visual_genome(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    file = write(tmp_path / "train_balanced_questions.json", {"a": gqa_question("1"), "b": gqa_question("2")})
    row = {"image_id": 1, "width": 8, "height": 9, "coco_id": 5, "flickr_id": None}
    facts = write(tmp_path / "image_data.json", [row])
    samples, _ = read("gqa", file, image_data=facts)
    assert [sample.aliases for sample in samples] == [("vg:1", "coco:5"), ("vg:2",)]


@pytest.mark.parametrize("part", ["testdev", "test", "challenge", "submission"])
def test_splits_without_answers(tmp_path: Path, part: str) -> None:
    touch(tmp_path, "n1.jpg")
    row = gqa_question("n1", None)
    del row["types"]
    (sample,), _ = read("gqa", write(tmp_path / f"{part}_balanced_questions.json", {"201": row}))
    assert sample.split == part
    assert sample.questions == (Question("201", "Is it overcast?"),)


def test_missing_images_and_names_that_lead_out(tmp_path: Path) -> None:
    file = write(tmp_path / "q.json", {"1": gqa_question("5"), "2": gqa_question("../x")})
    samples, notes = read("gqa", file, strict=False)
    assert (samples, notes.missing) == ([], ["5.jpg"])
    assert notes.problems == [f"{file}, image '../x': expected an image path inside the image folder, got '../x.jpg'"]
