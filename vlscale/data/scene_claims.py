"""Claims about one scene, true or false by the toss of a coin: yes/no questions, and hypotheses that it decides.

A claim is made only where the scene offers a true and a false one of the same words and kind, and a coin says which;
so the words alone don't tell. Only what is plain to see is claimed: see `scene_world.Scene.relations`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from vlscale.data.scene_captions import RELATION_WORDS
from vlscale.data.scene_words import alike, look, one, refer
from vlscale.data.scene_world import BACKGROUNDS, COLOURS, OPPOSITE, SHAPES, TEXTURES, Scene, Thing, hidden_share

SIDES = ("left of", "right of", "above", "below")
"""Relations that hold between the centres of things."""

_MIXED = (("colour", "shape"), ("texture", "shape"), ("size", "shape"), ("texture", "colour"), ("size", "colour"))


class Claim(NamedTuple):
    """One claim in both moods."""

    question: str
    """`is there a red ball`"""
    statement: str
    """`there is a red ball`"""
    true: bool


_SHADOW = (0.16, 0.2)
"""Where a thing's shadow falls, in units of half its extent: on whatever was painted before."""
_SHADOW_GROWS = 1.7

ClaimForm = Callable[[Scene, random.Random], Claim | None]


def mixed(scene: Scene, rng: random.Random, names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]] | None:
    """How some thing looks, and the same with another thing's values after the first: how nothing there looks."""
    pairs = []
    for first in scene.things:
        there = look(first, names)
        for second in scene.things:
            absent = there | look(second, names[1:])
            if not alike(scene, absent):
                pairs.append((there, absent))
    return rng.choice(pairs) if pairs else None


def missing(scene: Scene, name: str) -> list[str]:
    """The shapes, colours or patterns that no thing of the scene has, though it could: nothing wears its backdrop's."""
    could = {
        "shape": SHAPES,
        "colour": [colour for colour in COLOURS if colour not in BACKGROUNDS[scene.background]],
        "texture": [texture for texture in TEXTURES if texture != "plain"],
    }[name]
    return [value for value in could if not alike(scene, {name: value})]


def depth_unknown(scene: Scene, i: int, j: int) -> bool:
    """Whether neither thing covers or surrounds the other, or throws a shadow there."""
    if (i, "inside", j) in scene.relations or (j, "inside", i) in scene.relations:
        return False
    a, b = scene.things[i], scene.things[j]
    return all(hidden_share(under, over) == 0 for under, over in ((a, b), (b, a), (a, _shadow(b)), (b, _shadow(a))))


def _shadow(thing: Thing) -> Thing:
    """The thing where its shadow falls, as large as the shadow's soft rim."""
    half = 0.5 * thing.extent
    dx, dy = _SHADOW
    return replace(thing, x=thing.x + dx * half, y=thing.y + dy * half, extent=_SHADOW_GROWS * thing.extent)


def mixture(scene: Scene, rng: random.Random) -> Claim | None:
    """is there a striped ball (there is: a striped box and a ball)"""
    found = mixed(scene, rng, rng.choice(_MIXED))
    return None if found is None else _there(found[0], found[1], rng)


def presence(scene: Scene, rng: random.Random) -> Claim:
    """is there a ball"""
    name = rng.choice(("shape", "colour"))
    there = rng.choice(sorted({getattr(thing, name) for thing in scene.things}))
    return _there({name: there}, {name: rng.choice(missing(scene, name))}, rng)


def side(scene: Scene, rng: random.Random) -> Claim | None:
    """is the red ball left of the box"""
    facts = [fact for fact in scene.relations if fact[1] in SIDES]
    if not facts:
        return None
    subject, relation, thing = rng.choice(facts)
    true = rng.random() < 0.5
    words = rng.choice(RELATION_WORDS[relation if true else OPPOSITE[relation]])
    return _about(refer(scene, subject, rng), words, refer(scene, thing, rng), true)


def trait(scene: Scene, rng: random.Random) -> Claim | None:
    """is the ball striped"""
    name = rng.choice(("colour", "texture", "size"))
    values = sorted({getattr(thing, name) for thing in scene.things})
    if len(values) < 2:
        return None
    value, true = rng.choice(values), rng.random() < 0.5
    having = alike(scene, {name: value})
    others = [index for index in range(len(scene.things)) if index not in having]
    subjects = [refer(scene, rng.choice(some), rng, (name,)) for some in (having, others)]
    if None in subjects:
        return None
    subject = subjects[0 if true else 1]
    return Claim(f"is {subject} {value}", f"{subject} is {value}", true)


def comparison(scene: Scene, rng: random.Random) -> Claim | None:
    """is the red ball larger than the box"""
    pairs = [(a, b) for a in alike(scene, {"size": "large"}) for b in alike(scene, {"size": "small"})]
    if not pairs:
        return None
    larger, smaller = (refer(scene, index, rng, ("size",)) for index in rng.choice(pairs))
    word, true = rng.choice(("larger", "smaller")), rng.random() < 0.5
    pair = (larger, smaller) if (word == "larger") == true else (smaller, larger)
    return _about(pair[0], f"{word} than", pair[1], true)


def sameness(scene: Scene, rng: random.Random) -> Claim | None:
    """do the ball and the box have the same color"""
    name, word = rng.choice((("colour", "color"), ("texture", "pattern"), ("shape", "shape")))
    numbers = range(len(scene.things))
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for a in numbers:
        for b in numbers:
            if a != b:
                pairs[getattr(scene.things[a], name) == getattr(scene.things[b], name)].append((a, b))
    if not (pairs[True] and pairs[False]):
        return None
    true = rng.random() < 0.5
    first, second = (refer(scene, index, rng, (name,)) for index in rng.choice(pairs[true]))
    if first is None or second is None:
        return None
    both = f"{first} and {second}"
    return Claim(f"do {both} have the same {word}", f"{both} have the same {word}", true)


CLAIMS: tuple[ClaimForm, ...] = (mixture, mixture, presence, side, side, trait, comparison, sameness)
"""Some twice: they come twice as often."""


def claims(scene: Scene, rng: random.Random, count: int) -> list[Claim]:
    """At most `count` different claims of the forms that apply."""
    found: dict[str, Claim] = {}
    for form in rng.sample(CLAIMS, len(CLAIMS)):
        if len(found) == count:
            break
        claim = form(scene, rng)
        if claim is not None:
            found.setdefault(claim.question, claim)
    return list(found.values())


def _there(present: dict[str, str], absent: dict[str, str], rng: random.Random) -> Claim:
    true = rng.random() < 0.5
    what = one(present if true else absent)
    return Claim(f"is there {what}", f"there is {what}", true)


def _about(subject: str | None, words: str, thing: str | None, true: bool) -> Claim | None:
    """Between two things; none if one of them can't be named."""
    if subject is None or thing is None:
        return None
    return Claim(f"is {subject} {words} {thing}", f"{subject} is {words} {thing}", true)
