"""Small files in published layouts, and reading them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.data.sample import Sample
from vlscale.data.sources import entities, gqa, nlvr2, open_images, snli_ve, vinvl, vqa
from vlscale.data.sources.base import Format, Notes, Source

MODULES = (vqa, gqa, nlvr2, snli_ve, entities, open_images, vinvl)
FORMATS: dict[str, Format] = {entry.name: entry for module in MODULES for entry in module.FORMATS}

BOX_COLUMNS = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"
CLASSES = '/m/0bt9lr,Dog\n/m/01g317,Person\n/m/07j7r,Tree\n/m/0x,"Tree, old"\n'


def read(name: str, path: Path, strict: bool = True, **keys: Any) -> tuple[list[Sample], Notes]:
    """All samples that the format's reader makes of the file, and its notes."""
    notes = Notes(strict)
    source = Source.model_validate({"format": name, "path": str(path), **{key: _plain(keys[key]) for key in keys}})
    return list(FORMATS[name].read(source, notes)), notes


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def touch(folder: Path, *names: str) -> None:
    """Empty files that stand for images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(file: Path, content: Any) -> Path:
    """The file with bytes or text as they are, and everything else as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def write_lines(file: Path, *rows: Any) -> Path:
    """A line each: bytes and text as they are, everything else as JSON."""
    lines = [row if isinstance(row, bytes) else _text(row).encode() for row in rows]
    return write(file, b"".join(line + b"\n" for line in lines))


def _text(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def question(number: int, image: int, **fields: Any) -> dict[str, Any]:
    """An entry of a VQA v2 question file."""
    return {"image_id": image, "question": f"What is {number}?", "question_id": number, **fields}


def annotation(number: int, image: int, *answers: str, **fields: Any) -> dict[str, Any]:
    """An entry of a VQA v2 annotation file."""
    people = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]
    row = {"question_type": "what is", "multiple_choice_answer": answers[0] if answers else "", "answers": people}
    return {**row, "image_id": image, "answer_type": "other", "question_id": number, **fields}


def nlvr2_line(identifier: str, label: str | None = "True", **fields: Any) -> dict[str, Any]:
    row = {"identifier": identifier, "sentence": f"There are two in {identifier}.", "left_url": "http://a/b.jpg"}
    return {**row, **({} if label is None else {"label": label}), **fields}


def snli_line(photograph: str, number: int, label: str = "neutral", **fields: Any) -> dict[str, Any]:
    pair = f"{photograph}.jpg#{number}r1n"
    row = {"annotator_labels": [label], "gold_label": label, "pairID": pair, "sentence2": f"Hypothesis {number}."}
    return {"Flickr30K_ID": photograph, **row, **fields}


def gqa_question(image: str, answer: str | None = "no", **fields: Any) -> dict[str, Any]:
    row = {"imageId": image, "question": "Is it overcast?", "isBalanced": True, "types": {"semantic": "attr"}}
    return {**row, **({} if answer is None else {"answer": answer, "fullAnswer": f"{answer}, it is not."}), **fields}


def entities_folder(folder: Path, sentences: str, objects: str, photograph: str = "1000") -> Path:
    """A Flickr30k Entities folder with one photograph of 200 × 100 pixels."""
    size = "<size><width>200</width><height>100</height><depth>3</depth></size>"
    tree = f"<annotation><filename>{photograph}.jpg</filename>{size}{objects}</annotation>"
    write(folder / "Annotations" / f"{photograph}.xml", tree)
    write(folder / "Sentences" / f"{photograph}.txt", sentences)
    return folder


def box_object(box: tuple[int, int, int, int], *names: str) -> str:
    sides = "".join(f"<{tag}>{x}</{tag}>" for tag, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>{''.join(f'<name>{name}</name>' for name in names)}<bndbox>{sides}</bndbox></object>"


def flag_object(name: str, scene: int, nobox: int) -> str:
    return f"<object><name>{name}</name><scene>{scene}</scene><nobndbox>{nobox}</nobndbox></object>"


def regions(seed: int, boxes: int) -> np.ndarray:
    """[boxes, 2054] float32 as VinVL writes them: features, then places as shares of an image."""
    draw = np.random.default_rng(seed)
    corners = np.sort(draw.uniform(0, 1, (boxes, 2, 2)), axis=1)
    places = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 1] - corners[:, 0]], axis=1)
    return np.concatenate([draw.normal(size=(boxes, 2048)), places], axis=1).astype(np.float32)


def encoded(features: np.ndarray) -> str:
    return base64.b64encode(features.astype("<f4").tobytes()).decode()


def detected(features: np.ndarray, names: list[str], width: int, height: int) -> list[dict[str, Any]]:
    """Objects as in predictions.tsv and labels.tsv, where the features' places have them."""
    scale = np.array([width, height, width, height])
    rects = features[:, 2048:2052].astype(float) * scale
    return [
        {"class": name, "conf": 0.25 * (place + 1), "rect": rect.tolist()}
        for place, (name, rect) in enumerate(zip(names, rects, strict=True))
    ]
