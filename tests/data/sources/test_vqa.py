"""VQA v2 as published, and the real subset."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import shared
from tests.data.sources.layouts import annotation, question, read, touch, write
from vlscale.data.answers import MULTIPLE_CHOICE, accuracy, most_common
from vlscale.data.sample import Question
from vlscale.errors import UserError


def test_the_real_subset() -> None:
    folder = shared("data/coco")
    annotations = folder / "v2_mscoco_subset_annotations.json"
    questions = folder / "v2_OpenEnded_mscoco_subset_questions.json"
    samples, notes = read("vqa", annotations, questions=questions)
    assert (samples, notes.missing) == (read("vqa", questions, annotations=annotations)[0], [])
    assert not notes.counts
    asked = [item for sample in samples for item in sample.questions]
    assert (len(samples), len(asked)) == (82, 112)
    assert len({sample.image for sample in samples}) == 73  # eight images have questions in several splits
    assert len({sample.id for sample in samples}) == 82
    splits = Counter(sample.split for sample in samples for _ in sample.questions)
    assert splits == {"train": 90, "val": 15, "test": 7}
    assert Counter(item.kind for item in asked) == {"number": 40, "yes/no": 37, "other": 35}
    assert all(len(item.answers) == 10 for item in asked)
    assert asked[0] == Question("100667000", "Are those bananas ripe?", asked[0].answers, "yes/no")
    assert samples[0].aliases == ("coco:100667",)
    assert samples[0].image.name == "000000100667.jpg"
    # Where several answers are equally common, the published choice may be another one: it is kept beside them.
    chosen = {key: value for sample in samples for key, value in sample.extra.get(MULTIPLE_CHOICE, {}).items()}
    by_id = {item.id: item for item in asked}
    assert all(most_common(by_id[key].answers) != value for key, value in chosen.items())
    assert sorted(chosen.values()) == ["50", "los angeles", "parking lot", "white and green", "yes"]
    assert accuracy("yes", asked[0].answers) == 1.0


def test_only_the_questions_of_a_test_split(tmp_path: Path) -> None:
    touch(tmp_path, "test2015/COCO_test2015_000000000262.jpg", "test2015/COCO_test2015_000000000016.jpg")
    rows = [question(1, 262), question(2, 16), question(3, 262)]
    file = write(
        tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {"info": {}, "questions": rows, "data_subtype": "test-dev2015"},
    )
    samples, _ = read("vqa", file)
    assert [(sample.id, sample.split) for sample in samples] == [("262", "test-dev"), ("16", "test-dev")]
    assert samples[0].questions == (Question("1", "What is 1?"), Question("3", "What is 3?"))
    assert samples[0].image == tmp_path / "test2015" / "COCO_test2015_000000000262.jpg"


@pytest.mark.parametrize(
    ("name", "fields", "own", "split"),
    [
        ("questions.json", {"data_subtype": "val2014"}, {}, "val"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", {}, {}, "val"),
        ("v2_OpenEnded_mscoco_train2014_questions.json", {"data_subtype": "train2014"}, {}, "train"),
        ("my_validation_questions.json", {}, {}, "val"),
        ("questions.json", {}, {}, "train"),
        ("v2_OpenEnded_mscoco_train2014_questions.json", {}, {"split": "valid"}, "val"),
    ],
)
def test_splits(tmp_path: Path, name: str, fields: dict[str, str], own: dict[str, str], split: str) -> None:
    touch(tmp_path, "000000000007.jpg")
    # data_subtype after the list, as the published files have it too
    (sample,), _ = read("vqa", write(tmp_path / name, {"questions": [question(1, 7, **own)], **fields}))
    assert sample.split == split


@pytest.mark.parametrize(
    "image",
    [
        "COCO_val2014_000000000007.jpg",
        "val2014/COCO_val2014_000000000007.jpg",
        "images/val2014/COCO_val2014_000000000007.jpg",
        "000000000007.jpg",
        "train2017/000000000007.jpg",
        "val2014/000000000007.jpg",
    ],
)
def test_where_images_are(tmp_path: Path, image: str) -> None:
    touch(tmp_path, image)
    file = write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question(1, 7)]})
    (sample,), _ = read("vqa", file)
    assert sample.image == tmp_path / image
    assert sample.aliases == ("coco:7",)


def test_what_has_no_counterpart_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "000000000007.jpg")
    questions = write(tmp_path / "q.json", {"questions": [question(1, 7), question(2, 7), question(3, 8)]})
    annotations = write(
        tmp_path / "a.json", {"annotations": [annotation(1, 7, "red"), annotation(3, 8, "red"), annotation(9, 7, "no")]}
    )
    samples, notes = read("vqa", annotations, questions=questions)
    assert [item.id for sample in samples for item in sample.questions] == ["1"]
    assert notes.counts == {"questions without annotation": 1, "annotations without question": 1}
    assert notes.missing == ["COCO_train2014_000000000008.jpg"]


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.json", {"questions": [question(1, 7)]})
    annotations = write(tmp_path / "a.json", {"annotations": [annotation(1, 7, "red")]})
    with pytest.raises(UserError, match=r"a\.json: holds answers but not the questions; add questions=FILE"):
        read("vqa", annotations)
    with pytest.raises(UserError, match=r"q\.json: holds questions; expected VQA v2 annotations"):
        read("vqa", questions, questions=questions)
    with pytest.raises(UserError, match="give only the other"):
        read("vqa", questions, questions=questions, annotations=annotations)
    with pytest.raises(UserError, match=r'q\.json: holds no "questions"'):
        read("vqa", write(tmp_path / "q.json", {"questions": []}))
    with pytest.raises(UserError, match=r'q\.json: field "data_subtype": expected a name such as "train2014"'):
        read("vqa", write(tmp_path / "q.json", {"questions": [question(1, 7)], "data_subtype": 7}))
    with pytest.raises(UserError, match=r'q\.json: field "questions": expected a list, got an object'):
        read("vqa", write(tmp_path / "q.json", {"questions": {}}))
    with pytest.raises(UserError, match=r"nowhere\.json: can't be read"):
        read("vqa", questions, annotations=tmp_path / "nowhere.json")
