"""Captions and region formats know their own files by what stands in them, and nobody else's."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import shared
from tests.data.sources import published
from tests.data.sources.published import FORMATS, write
from vlscale.data.sources import jsonl
from vlscale.data.sources.registry import _is


def _long(content: dict[str, Any], key: str) -> dict[str, Any]:
    """As large as the published file: what stands in its middle is out of sight."""
    row = content[key][0]
    return content | {key: [row] * (400_000 // len(json.dumps(row)))}


def _coco(content: dict[str, Any]) -> dict[str, Any]:
    return _long(_long(content, "images"), "annotations")


def _flat(content: dict[str, Any]) -> str:
    return json.dumps(_long({key: value * 10_000 for key, value in content.items()}, "captions"))


OWN: dict[str, tuple[str, str, Any]] = {
    "COCO captions": ("coco", "captions_train2014.json", _coco(published.coco_captions())),
    "COCO instances": ("coco", "instances_train2017.json", _coco(published.coco_instances())),
    "small COCO captions": ("coco", "captions.json", published.coco_captions()),
    "Karpathy's COCO": ("karpathy", "dataset_coco.json", _long(published.karpathy_coco(), "images")),
    "Karpathy's Flickr30k": ("karpathy", "dataset_flickr30k.json", published.karpathy_flickr("1000092795.jpg")),
    "regions": ("vg-regions", "region_descriptions.json", published.regions() * 2000),
    "attributes": ("vg-attributes", "attributes.json", published.attributes() * 2000),
    "questions": ("vg-qa", "question_answers.json", published.question_answers() * 2000),
    "CC3M": ("cc", "Train_GCC-training.tsv", published.CC3M * 2000),
    "CC12M": ("cc", "cc12m.tsv", published.CC12M),
    "CC with header": ("cc", "cc12m.tsv", "url\tcaption\n" + published.CC12M),
    "CC with paths": ("cc", "a.tsv", "an apple\thttp://a.org/1\tpart0/1.jpg\r\n"),
    "SBU": ("sbu", "sbu-captions-all.json", _flat(published.sbu_json())),
    "SBU's URLs": ("sbu", "SBU_captioned_photo_dataset_urls.txt", published.SBU_URLS * 2000),
}

_FEATURES = base64.b64encode(b"\0" * 300).decode()
_VQA = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "train2014"}
OTHERS: dict[str, tuple[str, Any]] = {
    "jsonl": ("captions.jsonl", '{"image": "a.jpg", "captions": ["a dog"], "split": "train"}\n'),
    "list": ("captions.json", [{"image": "a.jpg", "captions": ["a dog"], "image_id": 3, "boxes": [], "tags": []}]),
    "list with everything": (
        "captions.json",
        [{"image": "a.jpg", "captions": ["x"], "questions": [{"id": "1", "text": "?"}], "phrases": [{"text": "x"}]}],
    ),
    "VQA questions": (
        "v2_OpenEnded_mscoco_train2014_questions.json",
        _VQA | {"questions": [{"image_id": 9, "question": "Is it?", "question_id": 9000}]},
    ),
    "VQA annotations": (
        "v2_mscoco_train2014_annotations.json",
        _VQA
        | {
            "annotations": [
                {
                    "question_type": "is",
                    "multiple_choice_answer": "no",
                    "answers": [{"answer": "no", "answer_confidence": "yes", "answer_id": 1}],
                    "image_id": 9,
                    "answer_type": "yes/no",
                    "question_id": 9000,
                }
            ]
        },
    ),
    "NLVR2": ("train.json", '{"validation": {}, "sentence": "There is one.", "left_url": "http://a/b.jpg"}\n'),
    "SNLI-VE": ("snli_ve_train.jsonl", '{"Flickr30K_ID": "1", "sentence2": "A dog.", "gold_label": "neutral"}\n'),
    "GQA": (
        "train_balanced_questions.json",
        {"07333408": {"imageId": "2375429", "question": "What is it?", "answer": "pipe", "fullAnswer": "A pipe."}},
    ),
    "GQA scene graphs": (
        "train_sceneGraphs.json",
        {"1": {"width": 5, "objects": {"2": {"name": "chair", "attributes": ["brown"], "relations": []}}}},
    ),
    "VG scene graphs": (
        "scene_graphs.json",
        [{"image_id": 1, "relationships": [], "objects": [{"names": ["clock"], "attributes": ["green"], "x": 1}]}],
    ),
    "image data": ("image_data.json", published.image_data()),
    "Flickr30k tokens": ("results_20130124.token", "1000092795.jpg#0\tTwo young guys .\n"),
    "Flickr30k sentences": ("1000092795.txt", "[/EN#1/people Two guys] look at [/EN#2/bodyparts hands] .\n"),
    "VinVL features": ("features.tsv", f"9\t54\t{_FEATURES}\n25\t23\t{_FEATURES}\n"),
    "VinVL labels": ("labels.tsv", '9\t[{"class": "dog", "rect": [0, 0, 1, 1], "conf": 0.5}]\n'),
    "VinVL sizes": ("hw.tsv", '9\t[{"height": 480, "width": 640}]\n'),
    "Open Images": ("class-descriptions-boxable.csv", "/m/011k07,Tortoise\n"),
    "SBU's captions": ("SBU_captioned_photo_dataset_captions.txt", published.SBU_CAPTIONS),
}


def _claimed(path: Path) -> list[str]:
    return [name for name, entry in FORMATS.items() if _is(entry, path)]


@pytest.mark.parametrize("what", OWN)
def test_a_format_knows_its_own_files(tmp_path: Path, what: str) -> None:
    form, name, content = OWN[what]
    path = write(tmp_path / name, content)
    assert _claimed(path) == [form]
    assert not any(_is(entry, path) for entry in jsonl.FORMATS)


@pytest.mark.parametrize("what", OTHERS)
def test_and_nobody_elses(tmp_path: Path, what: str) -> None:
    name, content = OTHERS[what]
    assert _claimed(write(tmp_path / name, content)) == []


def test_no_folder_is_theirs(tmp_path: Path) -> None:
    write(tmp_path / "Annotations" / "1.xml", "<annotation/>")
    write(tmp_path / "Sentences" / "1.txt", "a")
    assert _claimed(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "forms"),
    [
        ("coco/instances_train2017.json", ["coco"]),
        ("coco/instances_val2017.json", ["coco"]),
        ("coco/captions.json", []),
        ("coco/v2_OpenEnded_mscoco_subset_questions.json", []),
        ("coco/v2_mscoco_subset_annotations.json", []),
        ("nlvr2/balanced_dev.json", []),
        ("flickr8k/captions.jsonl", []),
        ("flickr8k/snli_ve.jsonl", []),
        ("daquar/qa.json", []),
        ("flickr8k", []),
    ],
)
def test_real_files(file: str, forms: list[str]) -> None:
    assert _claimed(shared(f"data/{file}")) == forms
