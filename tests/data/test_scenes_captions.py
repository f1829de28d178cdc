"""What the embedded scenes' captions, tags and tuples claim is true, and tells the scenes apart."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from tests.data.caption_reader import Reading, fits, read
from vlscale.data import scenes

TEST, TRAIN = 300, 100


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = scenes.render_scenes(tmp_path_factory.mktemp("scenes") / "set", TRAIN, TEST, seed=11, workers=1)
    return [json.loads(line) for line in Path(folder, "captions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def readings(records: list[dict]) -> list[tuple[dict, str, Reading]]:
    return [(record, text, read(text)) for record in records for text in record["captions"]]


def test_every_caption_is_true(readings: list[tuple[dict, str, Reading]]) -> None:
    """Backgrounds, counts and attributes against the scene; relations and zones against the boxes."""
    for record, text, reading in readings:
        scene = record["scene"]
        assert len(reading.mentions) >= 2, text
        assert fits(reading, scene), text
        things = scene["things"]
        chosen = [[i for i, t in enumerate(things) if named.items() <= t.items()] for named in reading.mentions]
        for a, name, b in reading.relations:
            assert any(_holds(name, record, i, j) for i, j in product(chosen[a], chosen[b])), text
        for index, zone in reading.zones:
            assert any(_is_in(zone, record["boxes"][i]) for i in chosen[index]), text


def test_the_reader_reads_every_relation_and_zone(readings: list[tuple[dict, str, Reading]]) -> None:
    """Guards the test above: captions with relation words or zone words must have yielded facts."""
    relations = Counter(name for _, _, reading in readings for _, name, _ in reading.relations)
    assert set(relations) == {
        *("left of", "right of", "above", "below", "in front of", "behind", "inside", "around", "next to")
    }
    for _, text, reading in readings:
        if any(word in text.split() for word in ("above", "beneath", "beside", "behind", "inside", "around")):
            assert reading.relations, text
        if " at the top" in text or "corner" in text:
            assert reading.zones, text


def test_tuples_are_true(records: list[dict]) -> None:
    for record in records:
        things, boxes = record["scene"]["things"], range(len(record["boxes"]))
        facts = [tuple(fact) for fact in record["tuples"]]
        assert len(set(facts)) == len(facts)
        for fact in facts[1:]:
            if len(fact) == 1:
                assert any(t["shape"] == fact[0] for t in things)
            elif len(fact) == 2:
                assert any(t["shape"] == fact[1] and fact[0] in t.values() for t in things)
            else:
                pairs = [(i, j) for i, j in product(boxes, boxes) if i != j]
                named = [(i, j) for i, j in pairs if (things[i]["shape"], things[j]["shape"]) == (fact[0], fact[2])]
                assert any(_holds(fact[1], record, i, j) for i, j in named), fact
        assert record["tags"] == [f"{t['colour']} {t['shape']}" for t in things]
        assert len(set(record["tags"])) == len(things)


def test_no_caption_and_no_description_occurs_twice() -> None:
    plans = scenes.plan_scenes({"train": 700, "test": 300}, seed=2)
    texts = [text for plan in plans for text in plan.captions]
    assert len(set(texts)) == len(texts) == 5000
    assert len({plan.scene.description() for plan in plans}) == len(plans)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 6
    assert max(lengths) <= 22
    vocabulary = {word.strip(",:") for text in texts for word in text.split()}
    assert 120 <= len(vocabulary) <= 250
    assert all(word.isalpha() and word.islower() for word in vocabulary)


def test_captions_tell_scenes_apart(records: list[dict], readings: list[tuple[dict, str, Reading]]) -> None:
    """Nearly every held-out caption fits one held-out scene only, relations and zones not even counted."""
    held_out = [record["scene"] for record in records if record["split"] == "test"]
    alone = [sum(fits(reading, s) for s in held_out) == 1 for r, _, reading in readings if r["split"] == "test"]
    assert len(alone) == 5 * TEST
    assert sum(alone) / len(alone) > 0.95


def _holds(name: str, record: dict, i: int, j: int) -> bool:
    """Whether thing i stands in the relation to thing j, by their boxes and the drawing order (last = in front)."""
    a, b = record["boxes"][i], record["boxes"][j]
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    apart_x, apart_y = max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])
    overlap = apart_x < 0 and apart_y < 0
    within = all(inner >= outer for inner, outer in zip(a[:2], b[:2], strict=True)) and a[2] <= b[2] and a[3] <= b[3]
    around = all(outer <= inner for outer, inner in zip(a[:2], b[:2], strict=True)) and a[2] >= b[2] and a[3] >= b[3]
    hidden = [thing["visible"] < 0.97 for thing in record["scene"]["things"]]
    return {
        "left of": dx > 0.1,
        "right of": dx < -0.1,
        "above": dy > 0.1,
        "below": dy < -0.1,
        "in front of": overlap and i > j and hidden[j],
        "behind": overlap and i < j and hidden[i],
        "inside": within and record["scene"]["things"][j]["shape"] == "ring",
        "around": around and record["scene"]["things"][i]["shape"] == "ring",
        "next to": max(apart_x, apart_y) < 0.15,
    }[name]


def _is_in(zone: str, box: list[float]) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    truth = {"left": x < 0.48, "right": x > 0.52, "top": y < 0.48, "bottom": y > 0.52}
    truth |= {"upper": truth["top"], "lower": truth["bottom"]}
    truth |= dict.fromkeys(("middle", "centre"), abs(x - 0.5) < 0.2 and abs(y - 0.5) < 0.2)
    return all(truth[word] for word in zone.split())
