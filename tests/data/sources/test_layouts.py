"""Question, pair, phrase and detection formats know their own files only, and name what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import shared
from tests.data.sources import published
from tests.data.sources.layouts import (
    BOX_COLUMNS,
    CLASSES,
    FORMATS,
    annotation,
    detected,
    encoded,
    entities_folder,
    gqa_question,
    nlvr2_line,
    question,
    read,
    regions,
    snli_line,
    touch,
    write,
    write_lines,
)
from vlscale.data.sources import jsonl
from vlscale.data.sources.registry import _is
from vlscale.errors import UserError

LARGE = 2000
"""Rows that make a file longer than what detection reads."""
HEAD = {"info": {"description": "This is v2.0 of the VQA dataset."}, "task_type": "Open-Ended", "license": {"name": ""}}
TAIL = {"data_type": "mscoco", "data_subtype": "train2014"}
OBJECTS = json.dumps(detected(regions(0, 2), ["dog", "cat"], 640, 480))

OWN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "questions": (
        "vqa",
        lambda folder: write(folder / "q.json", {**HEAD, **TAIL, "questions": [question(i, i) for i in range(LARGE)]}),
    ),
    "annotations": (
        "vqa",
        lambda folder: write(
            folder / "a.json", {**HEAD, "annotations": [annotation(i, i, *["no"] * 10) for i in range(LARGE)], **TAIL}
        ),
    ),
    "a question": ("vqa", lambda folder: write(folder / "q.json", {"questions": [question(1, 1)]})),
    "gqa": (
        "gqa",
        lambda folder: write(folder / "val_all.json", {f"{i:08d}": gqa_question(str(i)) for i in range(LARGE)}),
    ),
    "gqa test": ("gqa", lambda folder: write(folder / "test_all.json", {"1": gqa_question("n1", None)})),
    "nlvr2": ("nlvr2", lambda folder: write_lines(folder / "dev.json", *[nlvr2_line("dev-1-0-0")] * LARGE)),
    "nlvr2 jsonl": ("nlvr2", lambda folder: write_lines(folder / "test1.jsonl", nlvr2_line("test1-1-0-0", None))),
    "snli-ve": ("snli-ve", lambda folder: write_lines(folder / "dev.jsonl", *[snli_line("1", 1)] * LARGE)),
    "snli-ve with image": ("snli-ve", lambda folder: write_lines(folder / "x.jsonl", snli_line("1", 1, image="1.jpg"))),
    "entities": ("entities", lambda folder: entities_folder(folder, "A man .", "")),
    "boxes": (
        "open-images",
        lambda folder: write(
            folder / "b.csv", f"{BOX_COLUMNS},IsInside\n" + "0a,x,/m/0x,1,0,1,0,1,0,0,0,0,0\n" * LARGE
        ),
    ),
    "image labels": (
        "open-images",
        lambda folder: write(folder / "l.csv", "ImageID,Source,LabelName,Confidence\n0a,verification,/m/0x,1\n"),
    ),
    "features": (
        "vinvl",
        lambda folder: write_lines(folder / "features.tsv", *[f"9\t54\t{encoded(regions(0, 54))}"] * 2),
    ),
    "features in JSON": (
        "vinvl",
        lambda folder: write_lines(
            folder / "features.tsv", f'9\t{{"num_boxes": 54, "features": "{encoded(regions(0, 54))}"}}'
        ),
    ),
    "no features": ("vinvl", lambda folder: write_lines(folder / "features.tsv", "9\t0\t", "10\t0\t")),
    "predictions": (
        "vinvl",
        lambda folder: write_lines(
            folder / "predictions.tsv", f'9\t{{"image_h": 480, "image_w": 640, "objects": {OBJECTS}}}'
        ),
    ),
    "labels": ("vinvl", lambda folder: write_lines(folder / "x.label.tsv", f"9\t{OBJECTS}")),
}

OTHERS: dict[str, tuple[str, Any]] = {
    "jsonl": ("captions.jsonl", '{"image": "a.jpg", "captions": ["a dog"], "split": "train"}\n'),
    "jsonl with everything": (
        "captions.json",
        [
            {
                "image": "a.jpg",
                "captions": ["x"],
                "questions": [{"id": "1", "text": "?", "answers": ["yes"]}],
                "statements": [{"id": "dev-1-0-0", "text": "x", "label": "true"}],
            }
        ],
    ),
    "COCO captions": ("captions_val2014.json", published.coco_captions()),
    "COCO instances": ("instances_val2014.json", published.coco_instances()),
    "Karpathy": ("dataset_coco.json", published.karpathy_coco()),
    "regions": ("region_descriptions.json", published.regions()),
    "attributes": ("attributes.json", published.attributes()),
    "Visual Genome questions": ("question_answers.json", published.question_answers()),
    "image data": ("image_data.json", published.image_data()),
    "CC3M": ("Train_GCC-training.tsv", published.CC3M),
    "CC12M": ("cc12m.tsv", published.CC12M),
    "SBU": ("sbu-captions-all.json", published.sbu_json()),
    "VinVL sizes": ("train.hw.tsv", '9\t[{"height": 480, "width": 640}]\n'),
    "images in a TSV": ("train.tsv", f"000000522418\t{encoded(regions(0, 1))}\n"),
    "classes": ("class-descriptions-boxable.csv", CLASSES),
    "classes with header": ("oidv7-class-descriptions.csv", f"LabelName,DisplayName\n{CLASSES}"),
    "image ids": ("train-images-boxable.csv", "ImageID,Subset,OriginalURL\n0a,train,http://a/b.jpg\n"),
    "VQA results": ("results.json", [{"question_id": 1, "answer": "yes"}]),
    "SNLI": ("snli_1.0_dev.jsonl", '{"pairID": "1.jpg#0r1n", "sentence2": "x", "gold_label": "neutral"}\n'),
    "NLVR": ("dev.json", '{"identifier": "1304-0", "sentence": "x", "label": "true", "structured_rep": []}\n'),
    "GQA scene graphs": ("train_sceneGraphs.json", {"1": {"width": 5, "height": 5, "objects": {}}}),
}


def _claimed(path: Path) -> list[str]:
    return [name for name, entry in FORMATS.items() if _is(entry, path)]


@pytest.mark.parametrize("what", OWN)
def test_a_format_knows_its_own_files(tmp_path: Path, what: str) -> None:
    form, make = OWN[what]
    path = make(tmp_path)
    assert _claimed(path) == [form]
    others = (*jsonl.FORMATS, *published.FORMATS.values())
    assert [entry.name for entry in others if _is(entry, path)] == []


@pytest.mark.parametrize("what", OTHERS)
def test_and_nobody_elses(tmp_path: Path, what: str) -> None:
    name, content = OTHERS[what]
    assert _claimed(write(tmp_path / name, content)) == []


@pytest.mark.parametrize(
    ("file", "forms"),
    [
        ("coco/v2_OpenEnded_mscoco_subset_questions.json", ["vqa"]),
        ("coco/v2_mscoco_subset_annotations.json", ["vqa"]),
        ("nlvr2/balanced_dev.json", ["nlvr2"]),
        ("flickr8k/snli_ve.jsonl", ["snli-ve"]),
        ("flickr8k", ["entities"]),
        ("flickr8k/captions.jsonl", []),
        ("coco/captions.json", []),
        ("coco/instances_val2017.json", []),
        ("daquar/qa.json", []),
        ("coco", []),
    ],
)
def test_real_files(file: str, forms: list[str]) -> None:
    assert _claimed(shared(f"data/{file}")) == forms


def _changed(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The row with other fields; without those that are `...`."""
    return {key: value for key, value in (row | fields).items() if value is not ...}


ASKED = question(5, 7)
ANSWERED = annotation(5, 7, "no", "yes")
NUMBER = 'field "image_id": expected a whole number'
ANSWERS = 'field "answers": expected a list of {"answer": "yes"}'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([ASKED], "question 2: expected an object, got a list"),
        ("text", "question 2: expected an object, got a string"),
        (None, "question 2: expected an object, got nothing"),
        (_changed(ASKED, question=...), 'question 2: field "question": expected a string, got nothing'),
        (_changed(ASKED, question=["a"]), 'question 2: field "question": expected a string, got a list'),
        (_changed(ASKED, question=""), 'question 2: field "question": expected a string, got an empty string'),
        (_changed(ASKED, question_id=...), 'question 2: field "question_id": expected a string, got nothing'),
        (_changed(ASKED, question_id=True), 'question 2: field "question_id": expected a string, got true or false'),
        (_changed(ASKED, image_id=...), f"question 2: {NUMBER}, got nothing"),
        (_changed(ASKED, image_id=7.5), f"question 2: {NUMBER}, got a number"),
        (_changed(ASKED, image_id=float("nan")), f"question 2: {NUMBER}, got a number"),
        (_changed(ASKED, image_id=-7), f"question 2: {NUMBER} of up to 12 digits, got '-7'"),
        (_changed(ASKED, image_id="../7"), f"question 2: {NUMBER} of up to 12 digits, got '../7'"),
        (_changed(ASKED, image_id=10**12), f"question 2: {NUMBER} of up to 12 digits, got '1000000000000'"),
        (_changed(ASKED, split=3), 'question 2: field "split": expected a string, got a number'),
    ],
)
def test_a_wrong_vqa_question(tmp_path: Path, row: Any, expected: str) -> None:
    touch(tmp_path, "000000000007.jpg")
    file = write(tmp_path / "q.json", {"questions": [question(4, 7), row, question(6, 7)]})
    _named(
        "vqa", file, expected, lambda samples: [item.id for sample in samples for item in sample.questions], ["4", "6"]
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([ANSWERED], "annotation 1: expected an object, got a list"),
        (_changed(ANSWERED, question_id=...), 'annotation 1: field "question_id": expected a string, got nothing'),
        (_changed(ANSWERED, answers=...), f"annotation 1: {ANSWERS}, got nothing"),
        (_changed(ANSWERED, answers="yes"), f"annotation 1: {ANSWERS}, got a string"),
        (_changed(ANSWERED, answers=["yes"]), "annotation 1: answers, item 1: expected an object, got a string"),
        (
            _changed(ANSWERED, answers=[{}]),
            'annotation 1: answers, item 1: field "answer": expected a string, got nothing',
        ),
        (_changed(ANSWERED, answer_type=[1]), 'annotation 1: field "answer_type": expected a string, got a list'),
        (
            _changed(ANSWERED, multiple_choice_answer={}),
            'annotation 1: field "multiple_choice_answer": expected a string, got an object',
        ),
    ],
)
def test_a_wrong_vqa_annotation(tmp_path: Path, row: Any, expected: str) -> None:
    touch(tmp_path, "000000000007.jpg")
    questions = write(tmp_path / "q.json", {"questions": [question(5, 7), question(6, 7)]})
    file = write(tmp_path / "a.json", {"annotations": [row, annotation(6, 7, "no")]})
    _named(
        "vqa",
        file,
        expected,
        lambda samples: [item.id for sample in samples for item in sample.questions],
        ["6"],
        questions=questions,
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], "expected an object, got a list"),
        (_changed(gqa_question("7"), imageId=...), 'field "imageId": expected a string, got nothing'),
        (_changed(gqa_question("7"), imageId=[7]), 'field "imageId": expected a string, got a list'),
        (_changed(gqa_question("7"), question=...), 'field "question": expected a string, got nothing'),
        (_changed(gqa_question("7"), answer=True), 'field "answer": expected a string, got true or false'),
        (_changed(gqa_question("7"), types="attr"), 'field "types": expected an object, got a string'),
        (_changed(gqa_question("7"), types={"semantic": 1}), 'field "semantic": expected a string, got a number'),
    ],
)
def test_a_wrong_gqa_question(tmp_path: Path, row: Any, expected: str) -> None:
    touch(tmp_path, "7.jpg")
    file = write(tmp_path / "train.json", {"01": row, "02": gqa_question("7")})
    ids = ["02"]
    _named("gqa", file, f"question '01': {expected}", lambda s: [item.id for x in s for item in x.questions], ids)


LINES = [
    (b'{"identifier": ', "not JSON"),
    (b"[1]", "expected an object, got a list"),
    (b"[" * 100_000, "not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"a": "caf\xe9"}', "not UTF-8 at byte 10"),
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *LINES,
        (_changed(nlvr2_line("dev-1-0-0"), identifier=...), 'field "identifier": expected a string, got nothing'),
        (
            _changed(nlvr2_line("dev-1-0-0"), identifier="dev-1\n"),
            'field "identifier": expected one such as "dev-896-0-1", got \'dev-1\\n\'',
        ),
        (_changed(nlvr2_line("dev-1-0-0"), sentence={}), 'field "sentence": expected a string, got an object'),
        (_changed(nlvr2_line("dev-1-0-0"), label="maybe"), 'field "label": expected "True" or "False"'),
        (_changed(nlvr2_line("dev-1-0-0"), label=1), 'field "label": expected "True" or "False"'),
        (_changed(nlvr2_line("dev-1-0-0"), directory=[1]), 'field "directory": expected a string, got a list'),
    ],
)
def test_a_wrong_nlvr2_line(tmp_path: Path, row: Any, expected: str) -> None:
    touch(tmp_path, "dev-2-0-img0.png", "dev-2-0-img1.png")
    file = write_lines(tmp_path / "dev.json", "", row, nlvr2_line("dev-2-0-0"))
    _named("nlvr2", file, f"line 2: {expected}", lambda samples: [sample.id for sample in samples], ["dev-2-0"])


LABELS = 'field "gold_label": expected entailment, neutral, contradiction or "-"'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *LINES,
        (_changed(snli_line("1", 1), Flickr30K_ID=...), 'field "Flickr30K_ID": expected a string, got nothing'),
        (_changed(snli_line("1", 1), Flickr30K_ID=1.5), 'field "Flickr30K_ID": expected a string, got a number'),
        (_changed(snli_line("1", 1), gold_label=...), f"{LABELS}, got nothing"),
        (_changed(snli_line("1", 1), gold_label=2), f"{LABELS}, got a number"),
        (_changed(snli_line("1", 1), gold_label="yes\n"), f"{LABELS}, got 'yes\\n'"),
        (_changed(snli_line("1", 1), sentence2=None), 'field "sentence2": expected a string, got nothing'),
        (_changed(snli_line("1", 1), pairID=...), 'field "pairID": expected a string, got nothing'),
        (_changed(snli_line("1", 1), image=5), 'field "image": expected a string, got a number'),
        (
            _changed(snli_line("1", 1), image="/etc/passwd"),
            "expected an image path inside the image folder, got '/etc/passwd'",
        ),
    ],
)
def test_a_wrong_snli_ve_line(tmp_path: Path, row: Any, expected: str) -> None:
    touch(tmp_path, "2.jpg")
    file = write_lines(tmp_path / "dev.jsonl", "", row, snli_line("2", 1))
    _named("snli-ve", file, f"line 2: {expected}", lambda samples: [sample.id for sample in samples], ["2"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"0a,x,/m/0x,1,0,1,0,1,0,0,0", "expected 12 columns as in the header, got 11"),
        (b"caf\xe9,x,/m/0x,1,0,1,0,1,0,0,0,0", "not UTF-8 at byte 3"),
        (b'0a,x,"/m/0x,1,0,1,0,1,0,0,0,0', "not CSV"),
        (b",x,/m/0x,1,0,1,0,1,0,0,0,0", 'field "ImageID": expected the id of an image, got an empty string'),
        (b"0a,x,/m/0y,1,0,1,0,1,0,0,0,0", "field \"LabelName\": expected a label of the classes, got '/m/0y'"),
        (b"0a,x,/m/0x,sure,0,1,0,1,0,0,0,0", "field \"Confidence\": expected a number from 0 to 1, got 'sure'"),
        (b"0a,x,/m/0x,1,nan,1,0,1,0,0,0,0", "field \"XMin\": expected a number from 0 to 1, got 'nan'"),
        (b"0a,x,/m/0x,1,0,640,0,1,0,0,0,0", "field \"XMax\": expected a number from 0 to 1, got '640'"),
        (b"0a,x,/m/0x,1,0,1,,1,0,0,0,0", "field \"YMin\": expected a number from 0 to 1, got ''"),
        (b"0a,x,/m/0x,1,0.5,0.25,0,1,0,0,0,0", "expected XMin <= XMax and YMin <= YMax, got 0.5, 0.25, 0, 1"),
    ],
)
def test_a_wrong_open_images_row(tmp_path: Path, row: bytes, expected: str) -> None:
    touch(tmp_path, "0a.jpg", "0b.jpg")
    classes = write(tmp_path / "classes.csv", CLASSES)
    file = write_lines(tmp_path / "x.csv", BOX_COLUMNS, row, "0b,x,/m/0x,1,0,1,0,1,0,0,0,0")
    ids = ["0b"]
    _named(
        "open-images", file, expected, lambda samples: [sample.id for sample in samples], ids, "line 2", classes=classes
    )


def test_an_open_images_id_that_leads_out(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.csv", CLASSES)
    file = write_lines(tmp_path / "x.csv", BOX_COLUMNS, "../a,x,/m/0x,1,0,1,0,1,0,0,0,0")
    with pytest.raises(UserError, match=r"x\.csv, image '\.\./a': expected an image path inside the image folder"):
        read("open-images", file, classes=classes)


def _named(
    form: str,
    file: Path,
    expected: str,
    kept: Callable[[Any], list[str]],
    ids: list[str],
    where: str = "",
    **keys: Any,
) -> None:
    """The file's wrong record ends strict reading in one line; else it is noted and what is right is kept."""
    with pytest.raises(UserError) as caught:
        read(form, file, **keys)
    message = str(caught.value)
    assert message.startswith(f"{file}, {where}")
    assert expected in message
    assert "\n" not in message
    samples, notes = read(form, file, strict=False, **keys)
    assert (kept(samples), notes.problems) == (ids, [message])


WHOLE_FILES = [
    (b'{"questions": [', "at character"),
    (b"[]", "not a JSON object"),
    (b"", "not a JSON object"),
    (b"\xff\xfe{", "not UTF-8 at byte 0"),
    (b'{"a": ' + b"[" * 100_000, "not JSON"),
    (None, "can't be read"),
]


@pytest.mark.parametrize("form", ["vqa", "gqa"])
@pytest.mark.parametrize(("content", "expected"), WHOLE_FILES)
def test_a_file_that_is_no_json_object(tmp_path: Path, form: str, content: bytes | None, expected: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    for strict in (True, False):
        with pytest.raises(UserError) as caught:
            read(form, file, strict)
        assert str(caught.value).startswith(f"{file}: ")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["nlvr2", "snli-ve", "open-images", "vinvl"])
def test_a_file_that_is_not_there(tmp_path: Path, form: str) -> None:
    keys = {"classes": write(tmp_path / "c.csv", CLASSES)} if form == "open-images" else {}
    with pytest.raises(UserError, match=r"nowhere\.x: can't be read \(No such file or directory\)"):
        read(form, tmp_path / "nowhere.x", **keys)
    with pytest.raises(UserError, match=r"no such folder; give the folder that holds the images"):
        read(form, tmp_path / "nowhere.x", images=tmp_path / "no", **keys)
