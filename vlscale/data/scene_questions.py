"""Questions about one scene with the one right answer, in about VQA v2's proportions of yes/no, number and other.

Kept from being answered by their words: yes/no as `scene_claims` says; counts and patterns that are frequent in the
scenes are asked for less often. What could be seen one way or the other is not asked.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from vlscale.data.scene_captions import RELATION_WORDS, ZONE_WORDS
from vlscale.data.scene_claims import SIDES, claims, depth_unknown, missing
from vlscale.data.scene_words import alike, many, refer
from vlscale.data.scene_world import Scene, Thing, zone

YES_NO, NUMBER, OTHER = "yes/no", "number", "other"
"""VQA v2's answer types."""
PER_SCENE = {YES_NO: 2, NUMBER: 1, OTHER: 3}
"""Questions about a scene, where so many apply."""

_KEPT: dict[str, dict[int, float]] = {
    "all": {2: 0.3, 3: 0.33, 4: 0.9, 5: 1.0},
    "small": {0: 0.15, 1: 0.15, 2: 0.7, 3: 1.0, 4: 1.0},
    "large": {1: 0.5, 2: 0.16, 3: 0.85},
}
"""How often a count is asked for: about the inverse of how often scenes have it."""
_PLAIN_KEPT = 0.44
"""How often the pattern of a plain thing is asked for; of others always."""
_LEVEL = 0.05
"""A thing whose centre is at most so far to a side of another one's is not on that side."""
_BORDER = 0.12, 0.04
"""Distance of `zone`'s borders from the middle of the picture, and how near to them a thing is in neither zone."""
_NEARER = 0.25
"""By so much a thing has to be nearer to a place than all others to be the one that is there."""


class Answered(NamedTuple):
    """A question and its answer: a word of the scenes, a number in digits (as VQA v2 normalises them), yes or no."""

    text: str
    answer: str
    kind: str


Asked = tuple[str, str] | None
Form = Callable[[Scene, random.Random], Asked]


def questions(scene: Scene, rng: random.Random) -> list[Answered]:
    """At most PER_SCENE questions of each kind, of different forms."""
    found = [
        Answered(claim.question, "yes" if claim.true else "no", YES_NO)
        for claim in claims(scene, rng, PER_SCENE[YES_NO])
    ]
    for kind, forms in ((NUMBER, _NUMBERS), (OTHER, _OTHERS)):
        asked = (form(scene, rng) for form in rng.sample(forms, len(forms)))
        found += islice((Answered(*pair, kind) for pair in asked if pair is not None), PER_SCENE[kind])
    return found


def _how_many_things(scene: Scene, rng: random.Random) -> Asked:
    count = len(scene.things)
    return ("how many things are there", str(count)) if rng.random() < _KEPT["all"][count] else None


def _how_many_of_a_size(scene: Scene, rng: random.Random) -> Asked:
    size = rng.choice(("small", "large"))
    count = len(alike(scene, {"size": size}))
    return (f"how many {size} things are there", str(count)) if rng.random() < _KEPT[size][count] else None


def _how_many_of_a_kind(scene: Scene, rng: random.Random) -> Asked:
    """Of a shape, colour or pattern: of one that several things have, where there is one; else one or none."""
    name = rng.choice(("shape", "shape", "colour", "colour", "texture"))
    counts = Counter(getattr(thing, name) for thing in scene.things)
    counts.pop("plain", None)  # by far the most frequent: the word would tell that there are many
    several = sorted(value for value in counts if counts[value] > 1)
    if several:
        value = rng.choice(several)
    else:
        here, absent = sorted(counts), missing(scene, name)
        value = rng.choice(here if here and (not absent or rng.random() < 0.5) else absent)
    return f"how many {many({name: value})} are there", str(counts[value])


def _colour(scene: Scene, rng: random.Random) -> Asked:
    return _property(scene, rng, "colour", "what color is {}")


def _shape(scene: Scene, rng: random.Random) -> Asked:
    return _property(scene, rng, "shape", "what is {}")


def _pattern(scene: Scene, rng: random.Random) -> Asked:
    found = _property(scene, rng, "texture", "what pattern does {} have")
    return None if found is not None and found[1] == "plain" and rng.random() > _PLAIN_KEPT else found


def _property(scene: Scene, rng: random.Random, name: str, words: str) -> Asked:
    index = rng.randrange(len(scene.things))
    subject = refer(scene, index, rng, (name,))
    return None if subject is None else (words.format(subject), getattr(scene.things[index], name))


def _size(scene: Scene, rng: random.Random) -> Asked:
    """Where there are both sizes, so that neither is the better guess."""
    wanted = rng.choice(("small", "large"))
    having = alike(scene, {"size": wanted})
    if len(having) in (0, len(scene.things)):
        return None
    subject = refer(scene, rng.choice(having), rng, ("size",))
    return None if subject is None else (f"is {subject} large or small", wanted)


def _background(scene: Scene, rng: random.Random) -> Asked:
    return "what is in the background", scene.background


def _where(scene: Scene, rng: random.Random) -> Asked:
    index = rng.randrange(len(scene.things))
    place, subject = _clear_zone(scene.things[index]), refer(scene, index, rng)
    return None if place is None or subject is None else (f"where in the picture is {subject}", place)


def _clear_zone(thing: Thing) -> str | None:
    border, margin = _BORDER
    clear = all(abs(abs(place - 0.5) - border) > margin for place in (thing.x, thing.y))
    return zone(thing) if clear else None


def _what_is_there(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(scene.things)
    place = zone(thing)
    if place is None or any(
        _farther(other, place) < _farther(thing, place) + _NEARER for other in scene.things if other is not thing
    ):
        return None
    return f"what is {rng.choice(ZONE_WORDS[place])}", thing.shape


def _farther(thing: Thing, place: str) -> float:
    """Distance of the thing's centre from a place in the picture."""
    x = 0.2 if "left" in place else 0.8 if "right" in place else 0.5
    y = 0.2 if "top" in place else 0.8 if "bottom" in place else 0.5
    return math.hypot(thing.x - x, thing.y - y)


def _what_is_beside(scene: Scene, rng: random.Random) -> Asked:
    found = _only_one_beside(scene, rng)
    return None if found is None else (f"what is {found[1]}", found[0].shape)


def _colour_of_what_is_beside(scene: Scene, rng: random.Random) -> Asked:
    found = _only_one_beside(scene, rng)
    return None if found is None else (f"what color is the thing {found[1]}", found[0].colour)


def _only_one_beside(scene: Scene, rng: random.Random) -> tuple[Thing, str] | None:
    """A thing and words for where it is as seen from another one, `above the red ball`, and no third thing is there."""
    facts = [(i, name, j) for i, name, j in scene.relations if name in SIDES and _alone_beside(scene, i, name, j)]
    return _thing_and_words(scene, rng, facts)


def _alone_beside(scene: Scene, subject: int, relation: str, thing: int) -> bool:
    seen_from = scene.things[thing]
    steps = (_step(other, seen_from, relation) for k, other in enumerate(scene.things) if k not in (subject, thing))
    return all(step <= _LEVEL for step in steps)


def _step(other: Thing, thing: Thing, relation: str) -> float:
    """How far the other one's centre is towards that side of the thing."""
    dx, dy = other.x - thing.x, other.y - thing.y
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]


def _what_overlaps(scene: Scene, rng: random.Random) -> Asked:
    """what is behind the red ball"""
    facts = [fact for fact in scene.relations if fact[1] in ("in front of", "behind", "inside")]
    found = _thing_and_words(scene, rng, [fact for fact in facts if _alone_overlapping(scene, fact[0], fact[2])])
    return None if found is None else (f"what is {found[1]}", found[0].shape)


def _alone_overlapping(scene: Scene, subject: int, thing: int) -> bool:
    return all(depth_unknown(scene, k, thing) for k in range(len(scene.things)) if k not in (subject, thing))


def _thing_and_words(scene: Scene, rng: random.Random, facts: list[tuple[int, str, int]]) -> tuple[Thing, str] | None:
    if not facts:
        return None
    index, relation, thing = rng.choice(facts)
    seen_from = refer(scene, thing, rng)
    return None if seen_from is None else (scene.things[index], f"{rng.choice(RELATION_WORDS[relation])} {seen_from}")


_NUMBERS: tuple[Form, ...] = (_how_many_things, _how_many_of_a_size, _how_many_of_a_kind)
_OTHERS: tuple[Form, ...] = (
    _colour,
    _shape,
    _pattern,
    _size,
    _background,
    _where,
    _what_is_there,
    _what_is_beside,
    _colour_of_what_is_beside,
    _what_overlaps,
)
