"""Small files in the layouts that caption and region data sets are published in, and the images they name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.data.corpus import picture
from vlscale.data.sample import Sample
from vlscale.data.sources import coco, conceptual, karpathy, sbu, visual_genome
from vlscale.data.sources.base import Notes, Source

FORMATS = {entry.name: entry for module in (coco, karpathy, visual_genome, conceptual, sbu) for entry in module.FORMATS}


def read(form: str, path: Path, notes: Notes | None = None, **options: Any) -> list[Sample]:
    """What the format's reader makes of the file; strict without notes."""
    return list(FORMATS[form].read(Source(format=form, path=str(path), **options), notes or Notes()))


def write(path: Path, value: Any) -> Path:
    """JSON, or bytes and text as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = value if isinstance(value, str | bytes) else json.dumps(value)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_images(folder: Path, names: Iterable[str], width: int = 40, height: int = 30) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, width, height).save(path, "JPEG")


def coco_images() -> list[dict[str, Any]]:
    urls = ("http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg", "http://example.org/9.jpg")
    return [
        {
            "license": 3,
            "file_name": f"COCO_val2014_{number:012d}.jpg",
            "coco_url": f"http://mscoco.org/images/{number}",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": url,
            "id": number,
        }
        for number, url in zip((391895, 9), urls, strict=True)
    ]


def coco_captions() -> dict[str, Any]:
    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": coco_images(),
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "annotations": [
            {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet on a small moped.\n"},
            {"image_id": 9, "id": 661611, "caption": "Closeup of bins of food."},
            {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike on a dirt road."},
        ],
    }


def coco_instances() -> dict[str, Any]:
    def instance(number: int, image: int, box: list[float], category: int, crowd: int = 0) -> dict[str, Any]:
        outline = {"counts": [20, 11], "size": [480, 640]} if crowd else [[1.5, 2.5, 3.5, 2.5, 3.5, 4.5]]
        row = {"segmentation": outline, "area": 4.0, "iscrowd": crowd, "image_id": image, "bbox": box}
        return row | {"category_id": category, "id": number}

    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": coco_images(),
        "licenses": [],
        "annotations": [
            instance(1, 391895, [64, 48, 320, 240], 1),
            instance(2, 9, [0, 0, 640, 480], 53),
            instance(3, 391895, [600, 400, 100, 100], 4),
            instance(4, 391895, [0, 0, 640, 100], 1, crowd=1),
            instance(5, 391895, [10, 10, 5, 0], 4),
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "vehicle", "id": 4, "name": "motorcycle"},
            {"supercategory": "food", "id": 53, "name": "apple"},
        ],
    }


def karpathy_coco() -> dict[str, Any]:
    def sentence(number: int, image: int, raw: str) -> dict[str, Any]:
        tokens = raw.lower().rstrip(".").split()
        return {"tokens": tokens, "raw": raw, "imgid": image, "sentid": number}

    def image(number: int, coco: int, split: str, year: str, *texts: str) -> dict[str, Any]:
        first = 10 * number
        return {
            "filepath": year,
            "sentids": [first + i for i in range(len(texts))],
            "filename": f"COCO_{year}_{coco:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": [sentence(first + i, number, text) for i, text in enumerate(texts)],
            "cocoid": coco,
        }

    return {
        "images": [
            image(0, 391895, "test", "val2014", "A man with a red helmet.", "Man riding a motor bike."),
            image(1, 522418, "restval", "val2014", "A woman wearing a net on her head."),
            image(2, 57870, "train", "train2014", "A restaurant has modern wooden tables and chairs."),
        ],
        "dataset": "coco",
    }


def karpathy_flickr(*names: str) -> dict[str, Any]:
    return {
        "images": [
            {
                "sentids": [number],
                "imgid": number,
                "sentences": [{"tokens": ["a", "dog"], "raw": "A dog.", "imgid": number, "sentid": number}],
                "split": "val",
                "filename": name,
            }
            for number, name in enumerate(names)
        ],
        "dataset": "flickr30k",
    }


def regions() -> list[dict[str, Any]]:
    def region(number: int, image: int, phrase: str, x: int, y: int, width: int, height: int) -> dict[str, Any]:
        box = {"width": width, "height": height, "image_id": image, "phrase": phrase, "y": y, "x": x}
        return {"region_id": number} | box

    return [
        {
            "regions": [
                region(1382, 1, "the clock is green in colour ", 200, 150, 80, 60),
                region(1383, 1, "shade is along the street", -1, 300, 401, 450),
                region(1384, 1, "the clock is green in colour", 0, 0, 400, 300),
            ],
            "id": 1,
        },
        {"regions": [region(2000, 2, "a sidewalk", 0, 0, 20, 15)], "id": 2},
    ]


def attributes() -> list[dict[str, Any]]:
    def thing(number: int, name: str, x: int, y: int, w: int, h: int, *words: str) -> dict[str, Any]:
        row = {"synsets": [f"{name}.n.01"], "h": h, "object_id": number, "names": [name, f"a {name}"], "w": w}
        return row | ({"attributes": list(words)} if words else {}) | {"y": y, "x": x}

    return [
        {
            "image_id": 1,
            "attributes": [
                thing(1058498, "clock", 200, 150, 80, 60, "green", "tall"),
                thing(1058534, "street", 0, 300, 800, 300),
                thing(1058508, "clock", 0, 0, 400, 300, "green"),
                thing(1058509, "shade", 900, 10, 5, 5, "dark"),
            ],
        },
        {"image_id": 2, "attributes": [thing(2, "sidewalk", 0, 0, 20, 15, "wide")]},
    ]


def question_answers() -> list[dict[str, Any]]:
    def qa(number: int, image: int, question: str, answer: str) -> dict[str, Any]:
        row = {"a_objects": [], "question": question, "image_id": image, "qa_id": number, "answer": answer}
        return row | {"q_objects": [{"object_id": 1, "synsets": ["clock.n.01"], "names": ["clock"]}]}

    return [
        {"id": 1, "qas": [qa(986768, 1, "What color is the clock?", "Green."), qa(986777, 1, "When?", "During day.")]},
        {"id": 2, "qas": [qa(986800, 2, "Where is the sidewalk?", "Left.")]},
    ]


def image_data() -> list[dict[str, Any]]:
    folder = "https://cs.stanford.edu/people/rak248/VG_100K_2"
    second = {"image_id": 2, "coco_id": 248774, "flickr_id": 6273011878}
    return [
        {"width": 800, "url": f"{folder}/1.jpg", "height": 600, "image_id": 1, "coco_id": None, "flickr_id": None},
        {"width": 40, "url": f"{folder}/2.jpg", "height": 30} | second,
    ]


CC3M = (
    "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/IM6o/photo.jpg?imgmax=800\n"
    "sierra looked stunning in this top\thttp://78.media.tumblr.com/3b133294bdc7c7784b781b45befaea07/tumblr.jpg\n"
)
CC12M = (
    "https://chinese.jordantimes.com/sites/default/files/a%20b.jpg\tSyrian refugees, <PERSON>, wait\n"
    "https://img.example.com/5/big.png\tan apple\n"
)
SBU_URLS = (
    "http://static.flickr.com/2723/4385058960_b0f291553e.jpg\nhttp://static.flickr.com/3348/3183472382_156bcbc461.jpg\n"
)
SBU_CAPTIONS = "A wooden chair in the living room\nthe water the boat was in\n"


def sbu_json() -> dict[str, Any]:
    return {
        "image_urls": SBU_URLS.split(),
        "user_ids": ["47889917@N08", "26682566@N02"],
        "captions": SBU_CAPTIONS.splitlines(),
    }
