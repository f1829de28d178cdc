"""Visual Genome: region descriptions, attributes and questions, every release from 1.0 on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlscale.data.images import ImageError, upright_size
from vlscale.data.sample import Box, Phrase, Question, Sample
from vlscale.data.sources.base import Format, Images, Notes, Source
from vlscale.data.sources.fields import (
    FieldError,
    each,
    get,
    read_json_array,
    record,
    share_box,
    strings,
    text,
)

_NO_AREA = "boxes without area in the image"


@dataclass(frozen=True, slots=True)
class _Thing:
    """An object of attributes.json."""

    name: str
    attributes: tuple[str, ...]
    pixels: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What image_data.json says of an image."""

    width: float
    height: float
    aliases: tuple[str, ...]


class _Album:
    """The images: files, names elsewhere, sizes."""

    def __init__(self, source: Source, notes: Notes) -> None:
        path = Path(source.path)
        self._images = Images(source, notes, path)
        self._notes = notes
        data = path.parent / "image_data.json" if source.image_data is None else Path(source.image_data)
        known = source.image_data is not None or data.is_file()
        self._facts = read_image_data(data, notes) if known else {}

    def open(self, identity: str) -> Sample | None:
        """A sample with nothing but the image; None where that is missing."""
        name = f"{identity}.jpg"
        file = self._images.find(f"VG_100K/{name}", f"VG_100K_2/{name}", name)
        facts = self._facts.get(identity)
        aliases = (f"vg:{identity}", *(facts.aliases if facts else ()))
        return None if file is None else Sample(identity, file, aliases=aliases)

    def shares(self, sample: Sample, boxes: list[tuple[float, float, float, float]]) -> list[Box | None]:
        """Boxes in pixels as shares; None for one with nothing of it inside the image."""
        if not boxes:
            return []
        width, height = self._size(sample)
        shares = [share_box(*box, width, height) for box in boxes]
        kept = [box if box[0] < box[2] and box[1] < box[3] else None for box in shares]
        if lost := kept.count(None):
            self._notes.counts[_NO_AREA] += lost
        return kept

    def _size(self, sample: Sample) -> tuple[float, float]:
        """From image_data.json, else from the file, which takes a look into every image."""
        if facts := self._facts.get(sample.id):
            return facts.width, facts.height
        assert isinstance(sample.image, Path)
        try:
            return upright_size(sample.image.read_bytes())
        except (OSError, ImageError):
            raise FieldError(
                f"expected its size in image_data.json or a readable {sample.image}; got neither"
            ) from None


def read_image_data(path: Path, notes: Notes) -> dict[str, ImageFacts]:
    """image_data.json: image id → size and names elsewhere.

    Raises:
        UserError: it can't be read, or (strict notes) a record is wrong.
    """
    expected = "Visual Genome's image_data.json, a list with image_id, width, height, coco_id and flickr_id"
    facts = {}
    for number, item in enumerate(read_json_array(path, expected), start=1):
        with notes.record(path, f"record {number}"):
            row = record(item)
            width, height = (float(get(row, key, float, "a number of pixels")) for key in ("width", "height"))
            if width <= 0 or height <= 0:
                raise FieldError(f'fields "width" and "height": expected numbers above 0, got {width:g}, {height:g}')
            elsewhere = [key for key in ("coco", "flickr") if row.get(f"{key}_id") is not None]
            aliases = tuple(f"{key}:{text(row, f'{key}_id')}" for key in elsewhere)
            facts[_image_id(row)] = ImageFacts(width, height, aliases)
    return facts


def _image_id(row: dict[str, Any]) -> str:
    """Release 1.0 says `id` or `image` for it."""
    key = next((key for key in ("image_id", "id", "image") if row.get(key) is not None), "image_id")
    return text(row, key, "the image's id")


class _Attributes:
    """attributes.json beside another file: read along with it, since both are in one order and take gigabytes whole."""

    def __init__(self, path: Path, notes: Notes) -> None:
        self._path, self._notes = path, notes
        self._rows = enumerate(read_json_array(path, _ATTRIBUTES), start=1)
        self._waiting: dict[str, list[_Thing]] = {}

    def take(self, identity: str) -> list[_Thing]:
        """The image's objects; none where the file doesn't know it."""
        while identity not in self._waiting:
            number, item = next(self._rows, (0, None))
            if number == 0:
                return []
            with self._notes.record(self._path, f"record {number}"):
                row = record(item)
                self._waiting[_image_id(row)] = each(row, "attributes", _thing, "a list of objects")
        return self._waiting.pop(identity)


_ATTRIBUTES = "Visual Genome's attributes.json, a list with image_id and attributes"
_REGIONS = "Visual Genome's region_descriptions.json, a list with id and regions"
_QUESTIONS = "Visual Genome's question_answers.json, a list with id and qas"


def _read_regions(source: Source, notes: Notes) -> Iterator[Sample]:
    album = _Album(source, notes)
    attributes = None if source.attributes is None else _Attributes(Path(source.attributes), notes)

    def fill(row: dict[str, Any]) -> Sample | None:
        identity = _image_id(row)
        regions = each(row, "regions", _region, "a list of regions")
        things = [] if attributes is None else attributes.take(identity)  # also of missing images: nothing shall wait
        sample = album.open(identity)
        if sample is None:
            return None
        return _with_things(_with_regions(sample, regions, album, notes), things, album, notes)

    return _samples(Path(source.path), _REGIONS, fill, notes)


def _read_attributes(source: Source, notes: Notes) -> Iterator[Sample]:
    album = _Album(source, notes)

    def fill(row: dict[str, Any]) -> Sample | None:
        things = each(row, "attributes", _thing, "a list of objects")
        sample = album.open(_image_id(row))
        return None if sample is None else _with_things(sample, things, album, notes)

    return _samples(Path(source.path), _ATTRIBUTES, fill, notes)


def _read_questions(source: Source, notes: Notes) -> Iterator[Sample]:
    album = _Album(source, notes)

    def fill(row: dict[str, Any]) -> Sample | None:
        questions = each(row, "qas", _question, "a list of questions")
        sample = album.open(_image_id(row))
        return None if sample is None else replace(sample, questions=tuple(questions))

    return _samples(Path(source.path), _QUESTIONS, fill, notes)


def _samples(
    path: Path, expected: str, fill: Callable[[dict[str, Any]], Sample | None], notes: Notes
) -> Iterator[Sample]:
    """What `fill` makes of each of the file's records; None where the image is missing."""
    for number, item in enumerate(read_json_array(path, expected), start=1):
        sample = None
        with notes.record(path, f"record {number}"):
            sample = fill(record(item))
        if sample is not None:
            yield sample


def _region(row: dict[str, Any]) -> tuple[str, tuple[float, float, float, float]]:
    return get(row, "phrase", str).strip(), _pixels(row, "width", "height")


def _thing(row: dict[str, Any]) -> _Thing:
    names = strings(row, "names" if "names" in row else "object_names")  # the latter in release 1.0
    attributes = dict.fromkeys(word.strip() for word in strings(row, "attributes"))
    attributes.pop("", None)
    return _Thing(names[0].strip() if names else "", tuple(attributes), _pixels(row, "w", "h"))


def _question(row: dict[str, Any]) -> Question:
    key = "qa_id" if "qa_id" in row else "id"
    return Question(text(row, key, "a number"), text(row, "question"), (text(row, "answer"),))


def _pixels(row: dict[str, Any], width: str, height: str) -> tuple[float, float, float, float]:
    x, y, w, h = (float(get(row, key, float, "a number of pixels")) for key in ("x", "y", width, height))
    return x, y, w, h


def _with_regions(
    sample: Sample, regions: list[tuple[str, tuple[float, float, float, float]]], album: _Album, notes: Notes
) -> Sample:
    """Phrases that come several times are one caption, and one phrase with several boxes."""
    places: dict[str, dict[Box, None]] = {}
    boxes = album.shares(sample, [pixels for _, pixels in regions])
    for (phrase, _), box in zip(regions, boxes, strict=True):
        if not phrase:
            notes.counts["empty captions"] += 1
            continue
        if phrase in places:
            notes.counts["repeated captions of an image"] += 1
        there = places.setdefault(phrase, {})
        if box is not None:
            there[box] = None
    phrases = tuple(
        Phrase(phrase, tuple(there), caption=number, first_word=0)
        for number, (phrase, there) in enumerate(places.items())
        if there
    )
    return replace(sample, captions=tuple(places), phrases=phrases)


def _with_things(sample: Sample, things: list[_Thing], album: _Album, notes: Notes) -> Sample:
    named = [thing for thing in things if thing.name]
    if nameless := len(things) - len(named):
        notes.counts["objects without name"] += nameless
    shares = album.shares(sample, [thing.pixels for thing in named])
    visible = [(box, thing.name) for box, thing in zip(shares, named, strict=True) if box is not None]
    tuples = dict.fromkeys((attribute, thing.name) for thing in named for attribute in thing.attributes)
    return replace(
        sample,
        boxes=tuple(box for box, _ in visible),
        tags=tuple(name for _, name in visible),
        tuples=tuple(tuples),
    )


FORMATS = (
    Format(
        "vg-regions",
        "Visual Genome's region_descriptions.json: captions with their boxes; with attributes= also objects",
        _read_regions,
        suffixes=(".json",),
        signs=(r'"regions"\s*:', r'"phrase"\s*:'),
        keys=frozenset({"attributes", "image_data"}),
    ),
    Format(
        "vg-attributes",
        "Visual Genome's attributes.json: objects with boxes, names and attributes",
        _read_attributes,
        suffixes=(".json",),
        signs=(r'"attributes"\s*:\s*\[\s*\{', r'"(?:names|object_names)"\s*:'),
        keys=frozenset({"image_data"}),
    ),
    Format(
        "vg-qa",
        "Visual Genome's question_answers.json: questions with one answer each",
        _read_questions,
        suffixes=(".json",),
        signs=(r'"qas"\s*:', r'"question"\s*:', r'"answer"\s*:'),
        keys=frozenset({"image_data"}),
    ),
)
