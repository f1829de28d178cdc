"""How questions and statements name the things of a scene: a red ball, small boxes, the striped thing."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from vlscale.data.scene_world import Scene, Thing

ATTRIBUTES = ("size", "texture", "colour", "shape")
"""In the order of English."""
UNNAMED = "thing"
"""A thing whose shape is not said."""

_PLURALS = {"box": "boxes", "cross": "crosses", "fish": "fish"}

Look = Mapping[str, str]
"""Some attributes and their values: `{"colour": "red", "shape": "ball"}`; an empty one is true of every thing."""


def look(thing: Thing, attributes: Sequence[str]) -> dict[str, str]:
    """What these attributes are of the thing."""
    return {name: getattr(thing, name) for name in attributes}


def alike(scene: Scene, wanted: Look) -> list[int]:
    """The things that look like that."""
    items = list(wanted.items())
    found = []
    for index, thing in enumerate(scene.things):
        for name, value in items:
            if getattr(thing, name) != value:
                break
        else:
            found.append(index)
    return found


def one(wanted: Look, article: str = "a", first: Sequence[str] = ()) -> str:
    """`a striped red ball`; without a shape `a red thing`; with an adjective `first`, `a heavy red ball`."""
    words = [*first, *_adjectives(wanted), wanted.get("shape", UNNAMED)]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def many(wanted: Look) -> str:
    """`red balls`, `striped things`, `fish`."""
    noun = wanted.get("shape", UNNAMED)
    return " ".join([*_adjectives(wanted), _PLURALS.get(noun, f"{noun}s")])


def refer(scene: Scene, index: int, rng: random.Random, hidden: Sequence[str] = ()) -> str | None:
    """`the striped ball`: one to three attributes that only this thing has, drawn from all such choices.

    Args:
        hidden: attributes that must not be said; None if nothing else tells the thing from the others.
    """
    open_ones = [name for name in ATTRIBUTES if name not in hidden]
    choices = [
        found
        for count in (1, 2, 3)
        for names in combinations(open_ones, count)
        if alike(scene, found := look(scene.things[index], names)) == [index]
    ]
    return one(rng.choice(choices), "the") if choices else None


def _adjectives(wanted: Look) -> list[str]:
    return [wanted[name] for name in ATTRIBUTES if name != "shape" and name in wanted]
