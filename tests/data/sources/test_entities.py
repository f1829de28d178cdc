"""Flickr30k Entities as published, and the real annotations of Flickr8k's photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import shared
from tests.data.sources.layouts import box_object, entities_folder, flag_object, read, touch, write
from vlscale.data.sample import Phrase
from vlscale.errors import UserError

SENTENCES = (
    "[/EN#1/people A man] and [/EN#2/people/other his two dogs] walk in [/EN#3/scene the park] .\n"
    "Someone sees [/EN#0/notvisual the point] of [/EN#4/other it] and [/EN#9/clothing a hat] .\n"
)
OBJECTS = (
    box_object((20, 10, 120, 90), "1")
    + box_object((1, 1, 100, 50), "2", "5")
    + box_object((100, 50, 200, 100), "2")
    + flag_object("3", 1, 1)
    + flag_object("4", 0, 1)
)


def _plain_reading(line: str) -> tuple[str, list[tuple[int, str, str, list[str]]]]:
    """The official tools' way through a sentence: token by token."""
    words: list[str] = []
    phrases: list[tuple[int, str, str, list[str]]] = []
    inside: list[str] | None = None
    mark: list[str] = []
    first = 0
    for token in line.split():
        if token.startswith("[/EN#"):
            inside, mark, first = [], token.split("/"), len(words)
            continue
        closes = inside is not None and token.endswith("]")
        word = token[:-1] if closes else token
        words.append(word)
        if inside is not None:
            inside.append(word)
            if closes:
                phrases.append((first, " ".join(inside), mark[1][3:], mark[2:]))
                inside = None
    return " ".join(words), phrases


def test_the_real_annotations() -> None:
    folder = shared("data/flickr8k")
    samples, notes = read("entities", folder)
    assert (len(samples), notes.missing, dict(notes.counts)) == (7000, [], {})
    phrases = [phrase for sample in samples for phrase in sample.phrases]
    assert len(phrases) == 109_028
    unseen = Counter(phrase.unseen for phrase in phrases)
    assert unseen == {"": 91_034, "nobox": 10_488, "scene": 1_577, "notvisual": 5_929}
    assert all(bool(phrase.boxes) == (not phrase.unseen) for phrase in phrases)
    assert sum(len(phrase.boxes) > 1 for phrase in phrases) == 16_756
    assert sum(len(phrase.boxes) for phrase in phrases) == 127_145
    boxes = [box for phrase in phrases for box in phrase.boxes]
    assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes)
    for sample in samples:
        lines = (folder / "Sentences" / f"{sample.id}.txt").read_text("utf-8").splitlines()
        for number, (caption, line) in enumerate(zip(sample.captions, lines, strict=True)):
            bare, marked = _plain_reading(line)
            own = [phrase for phrase in sample.phrases if phrase.caption == number]
            assert caption == bare
            assert [(p.first_word, p.text, p.entity, list(p.kinds)) for p in own] == marked
            for phrase in own:
                words = phrase.text.split(" ")
                assert caption.split(" ")[phrase.first_word :][: len(words)] == words
    first = samples[0]
    assert (first.id, first.image.name, first.aliases) == (
        "1000268201",
        "1000268201_693b08cb0e.jpg",
        ("flickr:1000268201",),
    )
    assert first.phrases[1] == Phrase(
        "a pink dress", ((8 / 375, 191 / 500, 86 / 375, 299 / 500),), 0, 3, "19", ("clothing",)
    )


def test_phrases_and_what_they_mean(tmp_path: Path) -> None:
    touch(tmp_path, "images/1000.jpg")
    (sample,), notes = read("entities", entities_folder(tmp_path, SENTENCES, OBJECTS))
    assert sample.captions == (
        "A man and his two dogs walk in the park .",
        "Someone sees the point of it and a hat .",
    )
    assert sample.phrases == (
        Phrase("A man", ((0.1, 0.1, 0.6, 0.9),), 0, 0, "1", ("people",)),
        Phrase("his two dogs", ((0.005, 0.01, 0.5, 0.5), (0.5, 0.5, 1, 1)), 0, 3, "2", ("people", "other")),
        Phrase("the park", (), 0, 8, "3", ("scene",), "scene"),
        Phrase("the point", (), 1, 2, "0", ("notvisual",), "notvisual"),
        Phrase("it", (), 1, 5, "4", ("other",), "nobox"),
        Phrase("a hat", (), 1, 7, "9", ("clothing",), "nobox"),
    )
    assert not notes.counts


def test_an_entity_with_a_box_is_seen_though_it_is_a_scene_too(tmp_path: Path) -> None:
    touch(tmp_path, "1000_ab12.jpg")
    objects = flag_object("3", 1, 0) + box_object((0, 0, 200, 100), "3")
    (sample,), _ = read("entities", entities_folder(tmp_path, "[/EN#3/scene The park] .", objects))
    assert (sample.phrases[0].boxes, sample.phrases[0].unseen) == (((0, 0, 1, 1),), "")
    assert sample.image == tmp_path / "1000_ab12.jpg"


def test_splits_are_lists_of_photographs(tmp_path: Path) -> None:
    for photograph in ("1000", "1001", "1002", "1003"):
        touch(tmp_path, f"{photograph}.jpg")
        entities_folder(tmp_path, "[/EN#1/people A man] .", "", photograph)
    write(tmp_path / "train.txt", "1000\n")
    write(tmp_path / "val.txt", "1001\n")
    write(tmp_path / "test.txt", "1002.jpg\n\n")
    samples, _ = read("entities", tmp_path)
    assert [sample.split for sample in samples] == ["train", "val", "test", "train"]
    write(tmp_path / "val.txt", "1001 1002\n")
    with pytest.raises(UserError, match=r"test\.txt: photograph 1002 is in val\.txt too"):
        read("entities", tmp_path)


def test_folders_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path / "a", "1000.jpg")
    entities_folder(tmp_path / "a", SENTENCES, OBJECTS)
    beside, _ = read("entities", tmp_path / "a" / "Annotations")
    assert [sample.id for sample in beside] == ["1000"]
    (tmp_path / "a" / "Sentences").rename(tmp_path / "s")
    named, _ = read("entities", tmp_path / "a" / "Annotations", sentences=tmp_path / "s")
    assert named == beside
    with pytest.raises(UserError, match=r"Sentences: no such folder; give sentences=FOLDER"):
        read("entities", tmp_path / "a" / "Annotations")
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder with Annotations"):
        read("entities", tmp_path / "nowhere")


def test_halves_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "1000.jpg", "1001.jpg", "1002.jpg")
    for photograph in ("1000", "1001", "1002"):
        entities_folder(tmp_path, SENTENCES, OBJECTS, photograph)
    (tmp_path / "Sentences" / "1001.txt").unlink()
    (tmp_path / "Annotations" / "1002.xml").unlink()
    samples, notes = read("entities", tmp_path)
    assert [sample.id for sample in samples] == ["1000"]
    assert notes.counts == {"photographs without sentences": 1, "photographs without annotations": 1}


LAUGHS = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;">]><annotation>&y;</annotation>'
SIZE = "<size><width>200</width><height>100</height></size>"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ("<annotation><size>", "not XML"),
        ("", "not XML"),
        (LAUGHS, "expected plain XML, got a document type"),
        (LAUGHS.replace("DOCTYPE", "doctype"), "expected plain XML, got a document type"),
        (LAUGHS.encode("utf-16"), "not UTF-8"),
        (b"<annotation>\xe9</annotation>", "not UTF-8 at byte 12"),
        ("<annotation>" + " " * (1 << 20) + "</annotation>", "expected at most 1 MiB"),
        ("<annotation/>", 'field "size/width": expected a number, got nothing'),
        (
            f"<annotation>{SIZE.replace('200', 'wide')}</annotation>",
            "field \"size/width\": expected a number, got 'wide'",
        ),
        (f"<annotation>{SIZE.replace('100', 'nan')}</annotation>", 'field "size/height": expected a number'),
        (
            f"<annotation>{SIZE.replace('100', '0')}{box_object((1, 1, 2, 2), '1')}</annotation>",
            "object 1: expected an image size above 0",
        ),
        (
            f"<annotation>{SIZE}{box_object((1, 1, 2, 2), '1')}{box_object((9, 1, 2, 2), '1')}</annotation>",
            'object 2: field "bndbox": expected xmin <= xmax and ymin <= ymax, got 9, 1, 2, 2',
        ),
        (f"<annotation>{SIZE}{box_object((1, 1, 2, 2))}</annotation>", 'object 1: field "name": expected the number'),
        (f"<annotation>{SIZE}<object><name>1</name><bndbox/></object></annotation>", 'field "bndbox/xmin"'),
        (f"<annotation>{SIZE}<object><name>1</name><scene>x</scene></object></annotation>", 'field "scene"'),
    ],
)
def test_a_wrong_annotation_is_named_and_left_out(tmp_path: Path, tree: str | bytes, expected: str) -> None:
    touch(tmp_path, "1000.jpg", "1001.jpg")
    for photograph in ("1000", "1001"):
        entities_folder(tmp_path, SENTENCES, OBJECTS, photograph)
    file = write(tmp_path / "Annotations" / "1000.xml", tree)
    with pytest.raises(UserError) as caught:
        read("entities", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}, annotation: ")
    assert expected in message
    assert "\n" not in message
    samples, notes = read("entities", tmp_path, strict=False)
    assert ([sample.id for sample in samples], notes.problems) == (["1001"], [message])


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (
            "A dog .\n[/EN#1/people A man [/EN#2/other a dog] .",
            "sentence 2: expected marks such as [/EN#7/people A man]",
        ),
        ("[/EN#1/people A man .", "sentence 1: expected marks such as"),
        ("[/EN#one/people A man] .", "sentence 1: expected marks such as"),
        ("\n \n", "expected a caption a line, got none"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
    ],
)
def test_wrong_sentences_are_named_and_left_out(tmp_path: Path, sentences: str | bytes, expected: str) -> None:
    touch(tmp_path, "1000.jpg")
    entities_folder(tmp_path, SENTENCES, OBJECTS)
    file = write(tmp_path / "Sentences" / "1000.txt", sentences)
    samples, notes = read("entities", tmp_path, strict=False)
    assert samples == []
    (problem,) = notes.problems
    assert problem.startswith(f"{file}, sentences: ")
    assert expected in problem
