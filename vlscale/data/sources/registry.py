"""Every public format by name; which one a file is; and a source's samples with its split options applied."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from vlscale.config.loading import first_error
from vlscale.data.sample import Sample
from vlscale.data.sources import (
    coco,
    conceptual,
    entities,
    gqa,
    jsonl,
    karpathy,
    nlvr2,
    open_images,
    sbu,
    snli_ve,
    stored,
    vinvl,
    visual_genome,
    vqa,
)
from vlscale.data.sources.base import FILE_KEYS, Format, Notes, Source
from vlscale.data.sources.naming import coco_number
from vlscale.errors import UserError

_MODULES = (
    jsonl,
    stored,
    coco,
    karpathy,
    visual_genome,
    conceptual,
    sbu,
    vqa,
    gqa,
    nlvr2,
    snli_ve,
    entities,
    open_images,
    vinvl,
)
FORMATS: dict[str, Format] = {entry.name: entry for module in _MODULES for entry in module.FORMATS}

_PEEK = 1 << 16


def parse_source(text: str, root: Path | None = None, where: str = "") -> Source:
    """`FORMAT:PATH,key=value,…`, where FORMAT: may be left out if the file tells.

    Args:
        root: what its paths are relative to.
        where: names it in errors.

    Raises:
        UserError: no such format or key, a key that the format doesn't read, or a file that doesn't tell.
    """
    where = where or f"source {text}"
    body, *options = re.split(r",(?=[a-z_]+=)", text)
    name, separator, path = body.partition(":")
    if not separator or name not in FORMATS:
        if separator and re.fullmatch(r"[a-z0-9-]+", name) and not os.path.exists(body):
            raise UserError(f"{where}: no format {name!r}; there are {', '.join(sorted(FORMATS))}")
        name, path = "", body
    tree: dict[str, object] = {"format": name, "path": path}
    for option in options:
        key, _, value = option.partition("=")
        tree[key] = value
    return make_source(tree, where, root)


def make_source(tree: dict[str, object], where: str, root: Path | None = None) -> Source:
    """A source from its keys; `where` names it in errors, `root` is what its paths are relative to.

    Raises:
        UserError: see parse_source.
    """
    tree = dict(tree)
    if isinstance(tree.get("only"), str):
        tree["only"] = str(tree["only"]).split("+")
    for key in FILE_KEYS:
        value = tree.get(key)
        if isinstance(value, str) and value:
            tree[key] = os.path.join(root or "", os.path.expanduser(value))
    if not tree.get("format"):
        tree["format"] = detect(str(tree.get("path", "")), where)
    try:
        source = Source.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error)}") from None
    if source.format not in FORMATS:
        raise UserError(f"{where}: no format {source.format!r}; there are {', '.join(sorted(FORMATS))}")
    known = FORMATS[source.format].known_keys()
    for key in sorted(source.model_fields_set - known):
        raise UserError(f"{where}: {source.format} reads no key {key!r}; it has {', '.join(sorted(known))}")
    return source


def detect(path: str, where: str) -> str:
    """The name of the format that a file or folder is, by its ending and what stands in its first and last 64 KB.

    Raises:
        UserError: there is nothing, or it is none or several of the formats.
    """
    if not os.path.exists(path) and not path.endswith(".tar"):
        raise UserError(f"{where}: {path or '(no path)'}: no such file or folder")
    if stored.is_shards(Path(path)):
        return "shards"
    if path.endswith(".tar") or stored.is_folder_of_tars(Path(path)):
        return "tars"
    found = [entry.name for entry in FORMATS.values() if _is(entry, Path(path))]
    if not found and path.endswith(".jsonl"):
        return "jsonl"  # where its first lines are broken
    if not found and os.path.isdir(path):
        raise UserError(f"{where}: {path}: a folder without captions.jsonl, shards, tars or annotations of its own")
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "is none of the known formats by its looks"
        raise UserError(f"{where}: {path} {what}; write FORMAT:PATH, with one of {', '.join(sorted(FORMATS))}")
    return found[0]


def _is(entry: Format, path: Path) -> bool:
    if path.is_dir():
        return not entry.suffixes and bool(entry.signs) and all(_inside(path, sign) for sign in entry.signs)
    if not entry.suffixes or not path.name.endswith(entry.suffixes):
        return False
    with path.open("rb") as file:
        head = file.read(_PEEK)
        file.seek(max(0, path.stat().st_size - _PEEK))
        tail = file.read(_PEEK)
    seen = (head + b"\n" + tail).decode("utf-8", "replace")
    return all(re.search(sign, seen) for sign in entry.signs)


def _inside(folder: Path, sign: str) -> bool:
    """For folders a sign is a glob pattern of what lies in it."""
    return next(folder.glob(sign), None) is not None


def read_source(source: Source, notes: Notes) -> Iterator[Sample]:
    """The source's samples in the order of its files, with the keys that every format has applied.

    Raises:
        UserError: a file can't be read, or (strict notes) a record is wrong.
    """
    splits = {} if source.splits is None else _splits(source.splits)
    boxed = {} if source.boxes is None else _boxed(source.boxes)
    for sample in FORMATS[source.format].read(source, notes):
        split = source.split or splits.get(_image_name(sample), sample.split)
        if source.only is not None and split not in source.only:
            continue
        for alias in sample.aliases if not sample.boxes else ():
            if alias in boxed:
                other = boxed[alias]
                sample = replace(sample, boxes=other.boxes, tags=other.tags, confidences=other.confidences)
        yield replace(sample, split=split, captions=sample.captions or _captions(sample, source.text))


def _captions(sample: Sample, text: str | None) -> tuple[str, ...]:
    """Captions made of what else the sample has (Oscar's and VinVL's corpora: questions with answers, labels)."""
    if text == "tags" and sample.tags:
        return (", ".join(dict.fromkeys(sample.tags)),)
    if text == "questions":
        return tuple(f"{q.text} {max(q.answers, key=q.answers.count, default='')}".strip() for q in sample.questions)
    return ()


def _splits(path: str) -> dict[str, str]:
    """Image name → split."""
    other = make_source({"path": path}, f"splits={path}")
    return {_image_name(sample): sample.split for sample in read_source(other, Notes(need_images=False))}


def _image_name(sample: Sample) -> str:
    """The image's file name; COCO's number, since 2014 and 2017 call the same file differently."""
    name = Path(str(sample.image)).name
    return coco_number(name) or name


def _boxed(path: str) -> dict[str, Sample]:
    """Name of a photograph → the sample with its boxes."""
    other = make_source({"path": path}, f"boxes={path}")
    found = {
        alias: sample
        for sample in read_source(other, Notes(need_images=False))
        for alias in (sample.aliases if sample.boxes else ())
    }
    if not found:
        raise UserError(f"boxes={path}: no boxes of photographs with a name; give COCO's instances, for example")
    return found
