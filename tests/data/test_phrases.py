"""Extractors of phrases: words and tags, the built-in rules, SPICE's output, the data's own tuples, the parser."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import pytest

from vlscale.data import scene_captions
from vlscale.data.phrases import (
    DataExtractor,
    LightExtractor,
    ParserExtractor,
    SpiceExtractor,
    make_extractor,
    write_spice_input,
)
from vlscale.data.phrases.base import MAX_TUPLES, PhraseTuple
from vlscale.data.phrases.lexicon import TAGS, lexicon
from vlscale.data.sample import Sample
from vlscale.data.scene_world import sample_scene
from vlscale.errors import UserError

LIGHT = {
    "Two young men ride a big wave on top of surfboards": [
        ("two", "man"),
        ("young", "man"),
        ("big", "wave"),
        ("man", "ride", "wave"),
        ("man", "on top of", "surfboard"),
    ],
    "A man sits at a table .": [("man", "sit at", "table")],
    "A man in a blue shirt": [("blue", "shirt"), ("man", "in", "shirt")],
    "A black and white dog is running through the deep snow": [
        ("black", "dog"),
        ("white", "dog"),
        ("deep", "snow"),
        ("dog", "run through", "snow"),
    ],
    "The boat is pulled by an older woman": [("old", "woman"), ("woman", "pull", "boat")],
    "A man and a woman wear hats and gloves": [
        ("man", "wear", "hat"),
        ("woman", "wear", "hat"),
        ("man", "wear", "glove"),
        ("woman", "wear", "glove"),
    ],
    "a dog with a stick in its mouth": [("dog", "with", "stick"), ("stick", "in", "mouth")],
    "A man watching a dog chasing a smaller dog": [
        ("man", "watch", "dog"),
        ("small", "dog"),
        ("dog", "chase", "dog"),
    ],
    "A man smokes while a girl who holds a red-haired doll eats bread": [
        ("girl", "hold", "doll"),
        ("red-haired", "doll"),
        ("girl", "eat", "bread"),
    ],
    "The man 's dog is big": [("big", "dog")],
    "the girl's red hats": [("red", "hat")],
    "a red haired woman climbs a snow covered mountain": [
        ("red-haired", "woman"),
        ("snow-covered", "mountain"),
        ("woman", "climb", "mountain"),
    ],
    "He rides a bike": [],
    "a boy tries to catch a ball": [],
    "How many people are on the bench? What color is it?": [
        ("many", "people"),
        ("people", "on", "bench"),
        ("what", "color"),
    ],
    "A group of people standing by a parked car": [
        ("group", "of", "people"),
        ("park", "car"),
        ("group", "stand by", "car"),
    ],
    "a football player in red does a trick": [("football player", "in", "red"), ("football player", "do", "trick")],
    "dogs run": [],
    "": [],
    "!!! 😀 ...": [],
}


def phrases(tuples: list[PhraseTuple]) -> list[PhraseTuple]:
    return [words for words in tuples if len(words) > 1]


@pytest.mark.parametrize("caption", LIGHT)
def test_light_phrases(caption: str) -> None:
    assert sorted(phrases(LightExtractor().extract(caption))) == sorted(LIGHT[caption])


def test_base_forms() -> None:
    words = lexicon()
    nouns = "dogs/dog men/man children/child leaves/leaf waves/wave dresses/dress buses/bus babies/baby glasses/glass "
    nouns += "people/people frisbees/frisbee scarves/scarf benches/bench shoes/shoe boxes/box fish/fish"
    verbs = "runs/run running/run ran/run sits/sit sitting/sit rode/ride ridden/ride carries/carry carried/carry "
    verbs += "lying/lie jumped/jump splashing/splash chased/chase racing/race tied/tie wearing/wear"
    for pairs, base in ((nouns, words.noun), (verbs, words.verb)):
        for form, expected in (pair.split("/") for pair in pairs.split()):
            assert base(form) == expected
    unlisted = {"blorping": "blorp", "snuggling": "snuggle", "gribbed": "grib", "tazzing": "tazz"}
    assert {word: words.verb(word) for word in unlisted} == unlisted
    assert [words.attribute(word, True) for word in ("smiling", "parked", "striped")] == ["smile", "park", "striped"]
    assert [words.attribute(word, False) for word in ("bigger", "youngest", "wooden")] == ["big", "young", "wooden"]


def test_every_tag_has_transitions() -> None:
    for before in ("^", *TAGS):
        assert set(lexicon().follows[before]) == set(TAGS)


def test_scenes_are_read_without_a_false_attribute() -> None:
    """Scenes know what is true; the rules may say less, and in the scenes' synonyms, but nothing false."""
    synonyms = {"sphere": "ball", "cube": "box", "hoop": "ring", "crescent": "moon", "flask": "bottle"}
    synonyms |= {"violet": "purple", "little": "small", "big": "large", "spotted": "dotted", "glossy": "shiny"}
    relations = {"left of": "left of", "right of": "right of", "above": "above", "below": "below", "behind": "behind"}
    light, rng = LightExtractor(), random.Random(3)
    attributes = related = 0
    for _ in range(60):
        scene = sample_scene(rng)
        true, shapes = set(scene_captions.tuples(scene)), {thing.shape for thing in scene.things}
        for caption in scene_captions.captions(scene, rng, set()):
            for words in phrases(light.extract(caption)):
                plain = tuple(synonyms.get(word, word) for word in words)
                if len(plain) == 2 and plain[1] in shapes:
                    attributes += 1
                    assert plain in true, f"{words} in {caption!r}"
                name = next((relations[end] for end in relations if plain[1].endswith(end)), None)
                if len(plain) == 3 and name and {plain[0], plain[2]} <= shapes:
                    related += 1
                    assert (plain[0], name, plain[2]) in true, f"{words} in {caption!r}"
    assert attributes > 1000
    assert related > 20


def test_hostile_captions_end_soon() -> None:
    light, rng = LightExtractor(), random.Random(0)
    words = ["and", "black", "of", ",", "the", "'s", "running", "dog", "(", "in front of", "\0", "\ud800", "à", "n't"]
    started = time.process_time()
    for _ in range(300):
        found = light.extract(" ".join(rng.choices(words, k=200)))
        assert len(found) <= MAX_TUPLES
        assert all(part and part == part.lower() for item in found for part in item)
    light.extract("black " * 1_000_000)
    light.extract("x" * 1_000_000)
    light.extract("-." * 1_000_000)
    assert time.process_time() - started < 10


def test_data_gives_each_caption_the_tuples_it_says() -> None:
    own = (("Red", "Balls"), ("blue", "ball"), ("ball", "left of", "star"), ("man", "riding", "horses"), ("star",))
    captions = ("a star and a red ball", "balls left of a blue star", "men ride a horse", "nothing")
    found = DataExtractor().of_sample(Sample("1", Path("x"), captions=captions, tuples=own))
    assert found == [
        [("star",), ("red", "ball")],
        [("blue", "ball"), ("ball", "left of", "star"), ("star",)],
        [("man", "ride", "horse")],
        [],
    ]
    alone = DataExtractor().of_sample(Sample("1", Path("x"), tuples=own))
    assert alone == [
        [("red", "ball"), ("blue", "ball"), ("ball", "left of", "star"), ("man", "ride", "horse"), ("star",)]
    ]
    assert DataExtractor().of_sample(Sample("1", Path("x"), captions=("a dog",))) == [[]]


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_spice_by_caption_and_by_image(tmp_path: Path) -> None:
    by_caption = [
        {
            "image_id": "a.jpg#0",
            "scores": {"All": {"f": 1.0}},
            "test_tuples": [{"tuple": ["dog"], "truth_value": True}, {"tuple": ["Dog", "black"], "truth_value": False}],
            "ref_tuples": [{"tuple": ["dog", "chase", "cat"]}, {"tuple": ["dog"]}],
        }
    ]
    by_image = {"17": {"ref_tuples": [["wave", "big"], ["man", "ride", "wave"]]}}
    files = [written(tmp_path / "1.json", by_caption), written(tmp_path / "2.json", by_image)]
    spice = SpiceExtractor(files)
    first = Sample("a.jpg", Path("x"), captions=("A black dog chases a cat", "not there"))
    assert spice.of_sample(first) == [[("dog",), ("black", "dog"), ("dog", "chase", "cat")], []]
    assert spice.missing == 1
    second = Sample("b", Path("x"), captions=("men riding a wave", "a big wave"), aliases=("coco:17",))
    assert spice.of_sample(second) == [[("man", "ride", "wave")], [("big", "wave")]]
    assert spice.version != SpiceExtractor(files[:1]).version


def test_spice_input_has_the_ids_that_are_looked_up(tmp_path: Path) -> None:
    sample = Sample("a.jpg", Path("x"), captions=("A dog", 'two "cats"'))
    out = tmp_path / "in.json"
    assert write_spice_input([sample], out) == 2
    entries = json.loads(out.read_text())
    assert entries[1] == {"image_id": "a.jpg#1", "test": 'two "cats"', "refs": ['two "cats"']}
    answers = [{"image_id": entry["image_id"], "test_tuples": [{"tuple": ["cat"]}]} for entry in entries]
    assert SpiceExtractor([written(tmp_path / "out.json", answers)]).of_sample(sample) == [[("cat",)], [("cat",)]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not JSON"),
        ("3", "not a JSON list"),
        ([3], "record 1: expected an object, got a number"),
        ([{"image_id": 1}], "record 1: expected test_tuples or ref_tuples; run SPICE with -detailed"),
        ([{"test_tuples": []}], 'record 1: field "image_id"'),
        ([{"image_id": 1, "test_tuples": {}}], 'field "test_tuples": expected a list of tuples'),
        ([{"image_id": 1, "test_tuples": [{"tuple": []}]}], "one to three words, got 0 words"),
        ([{"image_id": 1, "test_tuples": [{"tuple": ["a"] * 4}]}], "one to three words, got 4 words"),
        (
            [{"image_id": 1, "ref_tuples": ["dog"]}],
            'field "ref_tuples": expected tuples of one to three words, got a str',
        ),
        ([{"image_id": 1, "test_tuples": [["dog", 2]]}], "expected words of at most 100 characters, got a number"),
        ([{"image_id": 1, "test_tuples": [["x" * 101]]}], "got a string of 101 characters"),
        ([{"image_id": 1, "test_tuples": [["x"]] * 201}], "expected at most 200 tuples, got 201"),
        ({"7": []}, "image 7: expected an object, got a list"),
    ],
)
def test_what_spice_never_wrote(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path / "spice.json", content)
    with pytest.raises(UserError) as raised:
        SpiceExtractor([path])
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_which_extractors_there_are() -> None:
    with pytest.raises(UserError, match="expected one of light, parser, spice, data, got 'stanford'"):
        make_extractor("stanford")
    with pytest.raises(UserError, match="give it as --spice FILE"):
        make_extractor("spice")
    with pytest.raises(UserError, match="expected --extractor spice with it, got --extractor light"):
        make_extractor("light", [Path("x.json")])


def test_parser_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"--extractor parser: spacy is missing; pip install '\.\[phrases\]'"):
        ParserExtractor()


def test_parser() -> None:
    pytest.importorskip("sng_parser", reason="the extra `phrases` is not installed")
    with pytest.raises(UserError, match="no spaCy model xx_none"):
        ParserExtractor("xx_none")
    parser = ParserExtractor()
    found = parser.extract("Two young men are chasing a big wave and she watches a tall ice cream truck")
    assert {("two", "man"), ("young", "man"), ("man", "chase", "wave"), ("tall", "ice cream truck")} <= set(found)
    assert not any("she" in words for words in found)
    assert ("man", "sit at", "table") in parser.extract("A man sits at a table")
    assert ("man", "on top of", "surfboard") in parser.extract("A man on top of a surfboard")
    assert parser.extract("  ") == []
