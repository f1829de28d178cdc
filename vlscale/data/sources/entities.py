"""Flickr30k Entities: captions whose phrases are marked, and the boxes of what they mean, a file per photograph."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlscale.data.sample import Box, Phrase, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source
from vlscale.data.sources.fields import FieldError, is_number, share_box, utf8
from vlscale.errors import UserError

_MARKED = re.compile(r"\[/EN#([0-9]+)((?:/[^\s/\]]*)*) ([^\]]+)\]")
"""[/EN#283585/people/other A man in a hat]: entity, kinds, words."""
_MOST_BYTES = 1 << 20
"""Of one file; the official ones have a hundredth of it."""
_SPLITS = ("train", "val", "test")


@dataclass(slots=True)
class _Entities:
    """What a photograph's annotation file knows, by entity."""

    boxes: dict[str, list[Box]] = field(default_factory=dict)
    scenes: set[str] = field(default_factory=set)
    """Entities that are the whole photograph."""


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    """One sample per photograph, ordered by its number."""
    root, annotations, sentences = _folders(source)
    images = Images(source, notes, root)
    splits = _splits(root)
    there = _stems(annotations, ".xml")
    captioned = _stems(sentences, ".txt")
    for name, number in (
        ("photographs without annotations", len(captioned - there)),
        ("photographs without sentences", len(there - captioned)),
    ):
        if number:
            notes.counts[name] += number
    for identity in sorted(captioned & there):
        phrases: list[Phrase] = []
        captions: list[str] = []
        found = entities = None
        with notes.record(annotations / f"{identity}.xml", "annotation"):
            entities = _entities(_text(annotations / f"{identity}.xml"))
        if entities is None:
            continue
        with notes.record(sentences / f"{identity}.txt", "sentences"):
            captions, phrases = _sentences(_text(sentences / f"{identity}.txt"), entities)
            found = images.find(f"{identity}.jpg", prefix=f"{identity}_")
        if found is not None:
            yield Sample(
                id=identity,
                image=found,
                captions=tuple(captions),
                split=splits.get(identity, "train"),
                phrases=tuple(phrases),
                aliases=(f"flickr:{identity}",),
            )


def _folders(source: Source) -> tuple[Path, Path, Path]:
    """The data set's folder, its annotations and its sentences."""
    path = Path(source.path)
    inside = (path / "Annotations").is_dir()
    root = path if inside else path.parent
    annotations = path / "Annotations" if inside else path
    sentences = root / "Sentences" if source.sentences is None else Path(source.sentences)
    for folder, hint in ((annotations, "the folder with Annotations and Sentences"), (sentences, "sentences=FOLDER")):
        if not folder.is_dir():
            raise UserError(f"{source}: {folder}: no such folder; give {hint}")
    return root, annotations, sentences


def _stems(folder: Path, suffix: str) -> set[str]:
    try:
        return {name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix)}
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror or error})") from None


def _splits(root: Path) -> dict[str, str]:
    """Photograph → split, of the lists train.txt, val.txt and test.txt that are there.

    Raises:
        UserError: a photograph is in two of them.
    """
    found: dict[str, str] = {}
    for split in _SPLITS:
        file = root / f"{split}.txt"
        if not file.is_file():
            continue
        try:
            names = _text(file, limit=1 << 26).split()
        except FieldError as error:
            raise UserError(f"{file}: {error}") from None
        for name in names:
            identity = name.removesuffix(".jpg")
            if found.setdefault(identity, split) != split:
                raise UserError(f"{file}: photograph {identity[:40]} is in {found[identity]}.txt too")
    return found


def _text(file: Path, limit: int = _MOST_BYTES) -> str:
    """A file's text.

    Raises:
        FieldError: it can't be read, is far too long, or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise FieldError(f"can't be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise FieldError(f"expected at most {limit >> 20} MiB")
    return utf8(content)


def _sentences(content: str, entities: _Entities) -> tuple[list[str], list[Phrase]]:
    """The captions without their marks, and the phrases that were marked."""
    captions: list[str] = []
    phrases: list[Phrase] = []
    for line in filter(None, (line.strip() for line in content.split("\n"))):
        caption, end = "", 0
        for match in _MARKED.finditer(line):
            caption += line[end : match.start()]
            spaces = len(match[3]) - len(match[3].lstrip())
            phrases.append(_phrase(match, entities, len(captions), caption.count(" ") + spaces))
            caption, end = caption + match[3], match.end()
        caption += line[end:]
        if "[/EN#" in caption:
            raise FieldError(
                f"sentence {len(captions) + 1}: expected marks such as [/EN#7/people A man], "
                f"got {caption[caption.index('[/EN#') :][:40]!r}"
            )
        captions.append(caption)
    if not captions:
        raise FieldError("expected a caption a line, got none")
    return captions, phrases


def _phrase(match: re.Match[str], entities: _Entities, caption: int, first_word: int) -> Phrase:
    entity, kinds = match[1], tuple(filter(None, match[2].split("/")))
    boxes: tuple[Box, ...] = ()
    unseen = ""
    if entity == "0" or "notvisual" in kinds:
        unseen = "notvisual"
    elif entity in entities.boxes:
        boxes = tuple(entities.boxes[entity])
    else:
        unseen = "scene" if entity in entities.scenes else "nobox"
    return Phrase(match[3].strip(), boxes, caption, first_word, entity, kinds, unseen)


def _entities(content: str) -> _Entities:
    """Boxes and scenes of an annotation file.

    Raises:
        FieldError: it is no such XML. One that defines entities of its own could blow up to gigabytes: refused.
    """
    if "<!doctype" in content.lower() or "<!entity" in content.lower():
        raise FieldError("expected plain XML, got a document type")
    try:
        tree = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError) as error:
        raise FieldError(f"not XML ({str(error)[:80]})") from None
    width, height = _number(tree, "size/width"), _number(tree, "size/height")
    found = _Entities()
    for number, item in enumerate(tree.findall("object"), start=1):
        try:
            _object(item, width, height, found)
        except FieldError as error:
            raise FieldError(f"object {number}: {error}") from None
    return found


def _object(item: ElementTree.Element, width: float, height: float, found: _Entities) -> None:
    """Add what one <object> says of the entities that it names."""
    names = [(element.text or "").strip() for element in item.findall("name")]
    if not all(names) or not names:
        raise FieldError('field "name": expected the number of an entity')
    if item.find("bndbox") is None:
        if item.find("scene") is not None and _number(item, "scene") > 0:
            found.scenes.update(names)
        return
    x1, y1, x2, y2 = (_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    if x2 < x1 or y2 < y1:
        raise FieldError(f'field "bndbox": expected xmin <= xmax and ymin <= ymax, got {x1:g}, {y1:g}, {x2:g}, {y2:g}')
    box = share_box(x1, y1, x2 - x1, y2 - y1, width, height)
    for name in names:
        found.boxes.setdefault(name, []).append(box)


def _number(tree: ElementTree.Element, path: str) -> float:
    content = tree.findtext(path)
    try:
        value = float(content or "")
    except ValueError:
        value = float("nan")
    if not is_number(value):
        raise FieldError(f'field "{path}": expected a number, got {repr(content[:40]) if content else "nothing"}')
    return value


FORMATS = (
    Format(
        "entities",
        "Flickr30k Entities: the folder with Annotations and Sentences",
        _read,
        signs=("Annotations/*.xml", "Sentences/*.txt"),
        keys=frozenset({"sentences"}),
    ),
)
