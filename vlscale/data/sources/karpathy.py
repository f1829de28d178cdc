"""Karpathy's splits of COCO, Flickr30k and Flickr8k: dataset_coco.json and its siblings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlscale.data.sample import Sample
from vlscale.data.sources.base import Format, Images, Notes, Source
from vlscale.data.sources.fields import each, get, read_json_members, record, text
from vlscale.data.sources.naming import coco_files
from vlscale.errors import UserError

_EXPECTED = "one of Karpathy's dataset_*.json: an object with images, each with filename, split and sentences"
_FLICKR = re.compile(r"([1-9]\d{5,})(?:_[0-9a-f]{6,})?\.jpg")
"""Flickr30k's file names are photo ids; Flickr8k's have a secret behind them."""


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    path = Path(source.path)
    images = Images(source, notes, path)
    number = 0
    for key, value in read_json_members(path, _EXPECTED, ("images",)):
        if key != "images":
            continue
        number += 1
        sample = None
        with notes.record(path, f"images, record {number}"):
            sample = _sample(record(value), images, notes)
        if sample is not None:
            yield sample
    if not number:
        raise UserError(f'{path}: field "images": expected a list, got nothing or an empty one; expected {_EXPECTED}')


def _sample(row: dict[str, Any], images: Images, notes: Notes) -> Sample | None:
    """None where the image is missing."""
    name = text(row, "filename", "the name of the image file")
    split = text(row, "split", "train, restval, val or test")
    captions = each(row, "sentences", lambda sentence: get(sentence, "raw", str, "a caption").strip(), "a list")
    folder = get(row, "filepath", str, "the image's folder", default="").strip("/")
    names = [f"{folder}/{name}" if folder else name, *coco_files(name)]
    coco = text(row, "cocoid", "a number") if row.get("cocoid") is not None else ""
    photo = _FLICKR.fullmatch(name)
    image = images.find(*names)
    if image is None:
        return None
    if empty := captions.count(""):
        notes.counts["empty captions"] += empty
    aliases = (f"coco:{coco}",) if coco else () if photo is None else (f"flickr:{photo[1]}",)
    return Sample(name, image, tuple(caption for caption in captions if caption), split, aliases=aliases)


FORMATS = (
    Format(
        "karpathy",
        "Karpathy's splits (dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json): captions",
        _read,
        suffixes=(".json",),
        signs=(r'"sentids"\s*:', r'"sentences"\s*:', r'"filename"\s*:'),
    ),
)
