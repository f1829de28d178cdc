"""What is wrong in COCO's, Karpathy's, Visual Genome's, Conceptual Captions' and SBU's files is named in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources import published
from tests.data.sources.published import put_images, read, write
from vlscale.data.sources.base import Notes
from vlscale.errors import UserError

MISSING = object()
FILES: dict[str, tuple[str, Any]] = {
    "captions": ("captions_val2014.json", published.coco_captions),
    "instances": ("instances_val2014.json", published.coco_instances),
    "karpathy": ("dataset_coco.json", published.karpathy_coco),
    "regions": ("region_descriptions.json", published.regions),
    "attributes": ("attributes.json", published.attributes),
    "questions": ("question_answers.json", published.question_answers),
    "image_data": ("image_data.json", published.image_data),
    "sbu": ("sbu-captions-all.json", published.sbu_json),
}
READERS = {
    "captions": "coco",
    "instances": "coco",
    "karpathy": "karpathy",
    "regions": "vg-regions",
    "attributes": "vg-attributes",
    "questions": "vg-qa",
    "image_data": "vg-regions",
    "sbu": "sbu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [image["file_name"] for image in published.coco_images()]
    names += [f"{image['filepath']}/{image['filename']}" for image in published.karpathy_coco()["images"]]
    names += ["1.jpg", "2.jpg", *(url.rsplit("/", 1)[1] for url in published.SBU_URLS.split())]
    put_images(tmp_path, names)
    return tmp_path


def changed(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value at the path, or without what is there."""
    whole = copy.deepcopy(content)
    if not path:
        return value
    place = whole
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return whole


def write_kind(folder: Path, kind: str, content: Any) -> tuple[str, Path, Path]:
    """Format, the file to read and the file with the content (image_data.json stands beside the regions)."""
    file = write(folder / FILES[kind][0], content)
    if kind == "image_data":
        return READERS[kind], write(folder / FILES["regions"][0], published.regions()), file
    return READERS[kind], file, file


@pytest.mark.parametrize(
    ("kind", "path", "value", "where", "expected"),
    [
        ("captions", ("images", 0), [], "images, record 1", "expected an object, got a list"),
        ("captions", ("images", 0, "id"), MISSING, "images, record 1", 'field "id": expected a number, got nothing'),
        ("captions", ("images", 1, "id"), 391895, "images, record 2", 'field "id": expected another number'),
        ("captions", ("images", 0, "file_name"), MISSING, "images, record 1", 'field "file_name": expected the name'),
        ("captions", ("images", 0, "file_name"), "../a.jpg", "images, record 1", "inside the image folder"),
        ("captions", ("images", 0, "flickr_url"), 3, "images, record 1", 'field "flickr_url": expected a string'),
        ("captions", ("annotations", 1), "x", "annotations, record 2", "expected an object, got a string"),
        ("captions", ("annotations", 1, "caption"), 3, "annotations, record 2", 'field "caption": expected a string'),
        ("captions", ("annotations", 1, "caption"), MISSING, "annotations, record 2", 'field "caption": expected a'),
        ("captions", ("annotations", 1, "image_id"), MISSING, "annotations, record 2", 'field "image_id": expected'),
        ("captions", ("annotations", 1, "image_id"), {}, "annotations, record 2", 'field "image_id": expected'),
        (
            "captions",
            ("annotations", 1, "image_id"),
            5,
            "annotations, record 2",
            "the id of one of the images, got '5'",
        ),
        ("instances", ("images", 1, "width"), MISSING, "images, record 2", 'field "width": expected the image\'s'),
        ("instances", ("images", 1, "width"), float("nan"), "images, record 2", "got a number that is not finite"),
        ("instances", ("images", 1, "height"), 10**400, "images, record 2", "got a number that is not finite"),
        ("instances", ("annotations", 1, "bbox"), [1, 2, 3], "annotations, record 2", 'field "bbox": expected [left'),
        ("instances", ("annotations", 1, "bbox"), "x", "annotations, record 2", 'field "bbox": expected [left'),
        ("instances", ("annotations", 1, "bbox", 2), True, "annotations, record 2", 'field "bbox": expected [left'),
        ("instances", ("annotations", 1, "iscrowd"), "no", "annotations, record 2", 'field "iscrowd": expected 0 or 1'),
        (
            "instances",
            ("annotations", 1, "category_id"),
            99,
            "annotations, record 2",
            "one of the categories, got '99'",
        ),
        ("instances", ("categories",), {}, "categories", 'field "categories": expected a list, got an object'),
        ("instances", ("categories", 0, "name"), None, "categories, record 1", 'field "name": expected a string'),
        ("karpathy", ("images", 0), None, "images, record 1", "expected an object, got nothing"),
        ("karpathy", ("images", 0, "filename"), 1.5, "images, record 1", 'field "filename": expected the name'),
        ("karpathy", ("images", 0, "split"), MISSING, "images, record 1", 'field "split": expected train, restval'),
        ("karpathy", ("images", 0, "sentences"), "x", "images, record 1", 'field "sentences": expected a list'),
        ("karpathy", ("images", 0, "sentences", 1), [], "images, record 1", "sentences, item 2: expected an object"),
        (
            "karpathy",
            ("images", 0, "sentences", 1, "raw"),
            7,
            "images, record 1",
            'item 2: field "raw": expected a cap',
        ),
        ("karpathy", ("images", 0, "cocoid"), [], "images, record 1", 'field "cocoid": expected a number, got a list'),
        ("karpathy", ("images", 0, "filepath"), True, "images, record 1", 'field "filepath": expected the image\'s'),
        ("regions", (0,), [], "record 1", "expected an object, got a list"),
        ("regions", (0, "id"), MISSING, "record 1", 'field "image_id": expected the image\'s id, got nothing'),
        ("regions", (0, "regions"), {}, "record 1", 'field "regions": expected a list of regions, got an object'),
        ("regions", (0, "regions", 1, "phrase"), MISSING, "record 1", 'regions, item 2: field "phrase": expected a'),
        ("regions", (0, "regions", 1, "x"), "12", "record 1", 'regions, item 2: field "x": expected a number of'),
        ("regions", (0, "regions", 1, "height"), False, "record 1", 'field "height": expected a number of pixels'),
        ("attributes", (0, "attributes"), "x", "record 1", 'field "attributes": expected a list of objects'),
        ("attributes", (0, "attributes", 0, "names"), "x", "record 1", 'item 1: field "names": expected a list of'),
        ("attributes", (0, "attributes", 0, "attributes"), [1], "record 1", 'field "attributes": expected a list of s'),
        ("attributes", (0, "attributes", 0, "w"), MISSING, "record 1", 'item 1: field "w": expected a number of'),
        ("questions", (0, "qas"), MISSING, "record 1", 'field "qas": expected a list of questions, got nothing'),
        ("questions", (0, "qas", 1, "question"), 1.5, "record 1", 'qas, item 2: field "question": expected a string'),
        ("questions", (0, "qas", 1, "answer"), None, "record 1", 'qas, item 2: field "answer": expected a string'),
        ("questions", (0, "qas", 1, "qa_id"), [], "record 1", 'qas, item 2: field "qa_id": expected a number'),
        ("image_data", (0, "width"), "wide", "record 1", 'field "width": expected a number of pixels, got a string'),
        ("image_data", (0, "height"), -3, "record 1", 'fields "width" and "height": expected numbers above 0'),
        ("image_data", (0, "coco_id"), [], "record 1", 'field "coco_id": expected a string, got a list'),
        ("sbu", ("image_urls", 0), 7, "record 1", 'field "image_urls": expected a list of strings, got a number in it'),
        ("sbu", ("image_urls", 0), "a.jpg", "record 1", "expected the URL of an image, got 'a.jpg'"),
        ("sbu", ("captions", 0), None, "record 1", 'field "captions": expected a list of strings, got nothing in it'),
    ],
)
def test_a_wrong_record_is_named_and_the_others_are_read(
    folder: Path, kind: str, path: tuple[str | int, ...], value: Any, where: str, expected: str
) -> None:
    form, file, wrong = write_kind(folder, kind, changed(FILES[kind][1](), path, value))
    with pytest.raises(UserError) as caught:
        read(form, file)
    message = str(caught.value)
    assert message.startswith(f"{wrong}, {where}: ")
    assert expected in message
    assert "\n" not in message
    notes = Notes(strict=False)
    samples = read(form, file, notes)
    assert message in notes.problems
    assert samples, "the other records are still read"


JSON_KINDS = sorted(FILES)


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_file_that_is_no_such_file_at_all(folder: Path, kind: str, strict: bool) -> None:
    whole = json.dumps(FILES[kind][1]())
    other: Any = {"a": 1} if whole.startswith("[") else [1]
    contents: list[Any] = [whole[: len(whole) * 2 // 3], b"\xff\xfe" + whole.encode(), other, "", "null", "[" * 100_000]
    for content in contents:
        form, file, wrong = write_kind(folder, kind, content)
        with pytest.raises(UserError) as caught:
            read(form, file, Notes(strict=strict))
        assert str(caught.value).startswith(f"{wrong}: ")
        assert "expected" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted({"captions", "karpathy", "regions", "attributes", "questions", "sbu"}))
def test_files_that_are_not_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read(READERS[kind], tmp_path / "none.json")
    if kind != "sbu":
        with pytest.raises(UserError, match="can't be read"):
            read(READERS[kind], tmp_path)


def _places(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of everything in the content."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


GARBAGE = (
    None,
    True,
    -1,
    0,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\nb",
    "\0",
    "\ud800",
    "../x",
    [],
    [[]],
    {},
)


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_whatever_stands_there_never_a_traceback(folder: Path, kind: str) -> None:
    good = FILES[kind][1]()
    for path in _places(good):
        for value in (MISSING, *GARBAGE) if path else ():
            form, file, _ = write_kind(folder, kind, changed(good, path, value))
            notes = Notes(strict=False)
            try:
                samples = read(form, file, notes)
            except UserError as error:
                notes.problems.append(str(error))
                samples = []
            for problem in notes.problems:
                assert "\n" not in problem, (path, value)
                assert problem.encode(), (path, value)
            for sample in samples:
                assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in sample.boxes), (path, value)
                assert len(sample.tags) == len(sample.boxes)
                assert all(sample.captions[phrase.caption] == phrase.text for phrase in sample.phrases)
