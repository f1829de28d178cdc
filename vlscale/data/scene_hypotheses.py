"""Hypotheses about one scene as in SNLI-VE: entailed by the picture, contradicted by it, or neither.

Neutral is what a picture can't tell: which of two things is nearer where neither covers the other or throws its shadow
on it (scenes have no other depth, nothing stands on a ground), and what is not to be seen at all (weight, age, price).
It is understood that everything that is there is in sight.

So that the words don't give the label away, most hypotheses are of forms that can have all three: `the ball is behind
the box`, and `there is a ball that is striped or heavy` (true if striped, open if there is a ball of another pattern,
false if there is no ball). A die says which, and a form is used only where the scene offers all three. The others can
have two labels, by the toss of a coin: claims that the picture decides (`scene_claims`), and `there is a heavy ball` or
`there is no heavy ball`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from typing import NamedTuple

from vlscale.data.scene_claims import claims, depth_unknown, missing, mixed
from vlscale.data.scene_words import alike, look, one, refer
from vlscale.data.scene_world import Scene

ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS = ("entailment", "neutral", "contradiction")
OPEN = 4
"""Hypotheses of a scene whose form can have every label."""
CLAIMED = 1
"""Claims of a scene that the picture decides."""
SECRET = 2
"""Hypotheses of a scene about what is not to be seen. Twice the claims: so each label comes equally often."""

SECRETS = ("heavy", "cheap", "old", "magnetic", "scented", "borrowed")
"""What no picture tells."""
_EITHER = (
    *((("colour", "shape"), trait) for trait in ("texture", "size")),
    *((("shape",), trait) for trait in ("texture", "size", "colour")),
    *((("colour",), trait) for trait in ("texture", "size")),
)
"""What is said of a thing and which trait is left open."""
_IN_FRONT = ("in front of", "nearer than")
_BEHIND = ("behind", "farther away than")


class Hypothesis(NamedTuple):
    """A sentence and its label."""

    text: str
    label: str


Form = Callable[[Scene, random.Random, str], str | None]


def hypotheses(scene: Scene, rng: random.Random) -> list[Hypothesis]:
    """At most OPEN + CLAIMED + SECRET different hypotheses, in random order."""
    found: dict[str, str] = {}
    for number, label in enumerate([*rng.sample(LABELS, 3), rng.choice(LABELS)]):
        forms: tuple[Form, ...] = (_nearer, _either) if number % 2 else (_either, _nearer)
        texts = (form(scene, rng, label) for form in forms)
        text = next((text for text in texts if text is not None), None)
        if text is not None:
            found.setdefault(text, label)
    for claim in claims(scene, rng, CLAIMED):
        found.setdefault(claim.statement, ENTAILMENT if claim.true else CONTRADICTION)
    for _ in range(SECRET):
        found.setdefault(*_secret(scene, rng))
    return [Hypothesis(*pair) for pair in rng.sample(sorted(found.items()), len(found))]


def _nearer(scene: Scene, rng: random.Random, label: str) -> str | None:
    """the red ball is nearer than the box"""
    covering = [(i, j) for i, name, j in scene.relations if name == "in front of"]
    if not covering:
        return None
    apart = [pair for pair in combinations(range(len(scene.things)), 2) if depth_unknown(scene, *pair)]
    if not apart:
        return None
    says_front = rng.random() < 0.5
    first, second = rng.choice(apart if label == NEUTRAL else covering)
    if rng.random() < 0.5 if label == NEUTRAL else (label == ENTAILMENT) != says_front:
        first, second = second, first
    subject, thing = refer(scene, first, rng), refer(scene, second, rng)
    if subject is None or thing is None:
        return None
    return f"{subject} is {rng.choice(_IN_FRONT if says_front else _BEHIND)} {thing}"


def _either(scene: Scene, rng: random.Random, label: str) -> str | None:
    """there is a red ball that is striped or heavy"""
    for names, trait in rng.sample(_EITHER, len(_EITHER)):
        choices = list(_swappable(scene, names, trait))
        nouns = _nouns(scene, rng, names)
        if choices and nouns is not None:
            here, own, foreign = rng.choice(choices)
            noun = nouns[1] if label == CONTRADICTION else here
            words = rng.sample((foreign if label == NEUTRAL else own, rng.choice(SECRETS)), 2)
            return f"there is {one(noun)} that is {words[0]} or {words[1]}"
    return None


def _swappable(scene: Scene, names: tuple[str, ...], trait: str) -> Iterator[tuple[dict[str, str], str, str]]:
    """Look of a thing, its trait and another thing's, where neither look is found with the other thing's trait."""
    for thing, other in permutations(scene.things, 2):
        here, there = look(thing, names), look(other, names)
        own, foreign = getattr(thing, trait), getattr(other, trait)
        if not alike(scene, here | {trait: foreign}) and not alike(scene, there | {trait: own}):
            yield here, own, foreign


def _nouns(scene: Scene, rng: random.Random, names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]] | None:
    """What some thing looks like, and what no thing does."""
    if len(names) > 1:
        return mixed(scene, rng, names)
    return look(rng.choice(scene.things), names), {names[0]: rng.choice(missing(scene, names[0]))}


def _secret(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """there is a heavy red ball; there is no heavy red ball"""
    nouns = _nouns(scene, rng, ("colour", "shape")) or _nouns(scene, rng, rng.choice((("colour",), ("shape",))))
    assert nouns is not None  # some shape and some colour are always missing
    here, denied = rng.random() < 0.5, rng.random() < 0.5
    what = one(nouns[0 if here else 1], "no" if denied else "a", (rng.choice(SECRETS),))
    return f"there is {what}", NEUTRAL if here else ENTAILMENT if denied else CONTRADICTION
