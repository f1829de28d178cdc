"""Statements about pairs of scenes as in NLVR2: a sentence with four pairs of pictures, true of two of them.

So the sentence alone tells nothing, and whether all four are judged right (NLVR2's consistency) says more than how many
are. Half of the pictures are drawn among those that have what the sentence is about, so that the false pairs are near
misses.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlscale.data.scene_captions import PLACES, RELATION_WORDS
from vlscale.data.scene_claims import SIDES as _BESIDE
from vlscale.data.scene_words import Look, alike, look, many, one
from vlscale.data.scene_world import OPPOSITE, Scene

OF_EACH = 2
"""Pairs of a sentence that it is true of, and as many that it is not true of."""

_SENTENCES, _DRAWS = 30, 60
"""Sentences tried for a set, and pairs drawn for each: rare things in few scenes may not give a balanced set."""
_SINGLE = (("shape",), ("colour",))
_KINDS = (*_SINGLE, ("texture", "shape"), ("colour", "shape"), ("texture", "colour"), ("size", "colour"))
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
_SIDES = ("left", "right")
_QUANTIFIERS = {"both images": (2,), "only one of the images": (1,), "at least one of the images": (1, 2)}
"""Of how many images what is said has to be true."""


class Judged(NamedTuple):
    """A pair by the numbers of its scenes, and whether the set's sentence is true of it."""

    left: int
    right: int
    true: bool


class PairSet(NamedTuple):
    """A sentence with its pairs."""

    text: str
    pairs: tuple[Judged, ...]


class _Sentence(NamedTuple):
    text: str
    about: Sequence[int]
    """Scenes that have what it is about, to draw half of the pictures from; empty: all have."""
    true: Callable[[Scene, Scene], bool | None]
    """Of the left and the right scene; None where one could see it either way."""


def pair_sets(scenes: Sequence[Scene], count: int, seed: str) -> list[PairSet]:
    """At most `count` sets; set i is a function of the scenes, `seed` and i. Fewer where scenes are too few."""
    if len(scenes) < 2:
        return []
    stock = _Stock(scenes)
    drawn = (_pair_set(stock, random.Random(f"{seed}/{index}")) for index in range(count))
    return [found for found in drawn if found is not None]


class _Stock:
    """The scenes to draw from, and which of them have what."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes
        self._having: dict[frozenset[tuple[str, str]], list[int]] = defaultdict(list)
        for number, scene in enumerate(scenes):
            keys = {frozenset(look(thing, kind).items()) for thing in scene.things for kind in _KINDS}
            for key in (*keys, frozenset({("background", scene.background)})):
                self._having[key].append(number)

    def having(self, wanted: Look) -> list[int]:
        """Scenes with a thing of that look (one of _KINDS), or with that `background`."""
        return self._having.get(frozenset(wanted.items()), [])

    def kind(self, rng: random.Random, kinds: Sequence[tuple[str, ...]]) -> dict[str, str]:
        """What some thing of some scene looks like."""
        return look(rng.choice(rng.choice(self.scenes).things), rng.choice(kinds))

    def draw(self, rng: random.Random, about: Sequence[int]) -> int:
        return rng.choice(about) if about and rng.random() < 0.5 else rng.randrange(len(self.scenes))


def _pair_set(stock: _Stock, rng: random.Random) -> PairSet | None:
    for _ in range(_SENTENCES):
        sentence = rng.choices(_FORMS, _SHARES)[0](stock, rng)
        found = None if sentence is None else _judged(stock, sentence, rng)
        if sentence is not None and found is not None:
            return PairSet(sentence.text, tuple(rng.sample(found, len(found))))
    return None


def _judged(stock: _Stock, sentence: _Sentence, rng: random.Random) -> list[Judged] | None:
    """Different pairs of different scenes: OF_EACH that the sentence is true of and as many that it is not."""
    found: dict[bool, dict[tuple[int, int], Judged]] = {True: {}, False: {}}
    for _ in range(_DRAWS):
        left, right = stock.draw(rng, sentence.about), stock.draw(rng, sentence.about)
        true = None if left == right else sentence.true(stock.scenes[left], stock.scenes[right])
        if true is not None and len(found[true]) < OF_EACH:
            found[true][left, right] = Judged(left, right, true)
            if len(found[True]) == len(found[False]) == OF_EACH:
                return [*found[True].values(), *found[False].values()]
    return None


def _has(stock: _Stock, rng: random.Random) -> _Sentence:
    """the left image has a red ball"""
    wanted, side = stock.kind(rng, _KINDS), rng.randrange(2)
    text = f"the {_SIDES[side]} image has {one(wanted)}"
    return _Sentence(text, stock.having(wanted), lambda *scenes: bool(alike(scenes[side], wanted)))


def _quantified(stock: _Stock, rng: random.Random) -> _Sentence:
    """only one of the images has a ball"""
    wanted, (quantifier, right_numbers) = stock.kind(rng, _KINDS), rng.choice(list(_QUANTIFIERS.items()))
    verb = "have" if quantifier.startswith("both") else "has"
    return _Sentence(
        f"{quantifier} {verb} {one(wanted)}",
        stock.having(wanted),
        lambda *scenes: sum(bool(alike(scene, wanted)) for scene in scenes) in right_numbers,
    )


def _each(stock: _Stock, rng: random.Random) -> _Sentence:
    """the left image has a ball and the right image has a red thing"""
    first, second = stock.kind(rng, _SINGLE), stock.kind(rng, _SINGLE)
    return _Sentence(
        f"the left image has {one(first)} and the right image has {one(second)}",
        stock.having(first) + stock.having(second),
        lambda left, right: bool(alike(left, first) and alike(right, second)),
    )


def _in_all(stock: _Stock, rng: random.Random) -> _Sentence:
    """there are two red things in all"""
    wanted = stock.kind(rng, (*_SINGLE, ()))
    number = rng.choice((2, 3) if wanted else (4, 5, 6, 7))
    return _Sentence(
        f"there are {_NUMBERS[number]} {many(wanted)} in all",
        stock.having(wanted),
        lambda *scenes: sum(len(alike(scene, wanted)) for scene in scenes) == number,
    )


def _more(stock: _Stock, rng: random.Random) -> _Sentence:
    """the left image has more balls than the right one"""
    wanted, side, word = stock.kind(rng, (*_SINGLE, ())), rng.randrange(2), rng.choice(("more", "fewer"))
    sign = 1 if word == "more" else -1

    def true(*scenes: Scene) -> bool:
        return sign * (len(alike(scenes[side], wanted)) - len(alike(scenes[1 - side], wanted))) > 0

    text = f"the {_SIDES[side]} image has {word} {many(wanted)} than the {_SIDES[1 - side]} one"
    return _Sentence(text, stock.having(wanted), true)


def _place(stock: _Stock, rng: random.Random) -> _Sentence:
    """in both images the things are on the grass"""
    background = rng.choice(stock.scenes).background
    quantifier, right_numbers = rng.choice(list(_QUANTIFIERS.items()))
    return _Sentence(
        f"in {quantifier} the things are {PLACES[background][0]}",
        stock.having({"background": background}),
        lambda *scenes: sum(scene.background == background for scene in scenes) in right_numbers,
    )


def _same_place(stock: _Stock, rng: random.Random) -> _Sentence:
    text = "the images have the same background"
    return _Sentence(text, (), lambda left, right: left.background == right.background)


def _arranged(stock: _Stock, rng: random.Random) -> _Sentence | None:
    """in the right image a ball is above a red thing"""
    scene = rng.choice(stock.scenes)
    facts = [fact for fact in scene.relations if fact[1] in _BESIDE]
    if not facts:
        return None
    i, relation, j = rng.choice(facts)
    first, second = (look(scene.things[k], rng.choice(_SINGLE)) for k in (i, j))
    side, words = rng.randrange(2), rng.choice(RELATION_WORDS[relation])
    return _Sentence(
        f"in the {_SIDES[side]} image {one(first)} is {words} {one(second)}",
        sorted(set(stock.having(first)) & set(stock.having(second))),
        lambda *scenes: _stands(scenes[side], first, relation, second),
    )


def _stands(scene: Scene, first: Look, relation: str, second: Look) -> bool | None:
    """Whether a thing of the first look has the relation to one of the second; None where it is not plain to see."""
    pairs = [(i, j) for i in alike(scene, first) for j in alike(scene, second) if i != j]
    if any((i, relation, j) in scene.relations for i, j in pairs):
        return True
    return False if all((i, OPPOSITE[relation], j) in scene.relations for i, j in pairs) else None


_Form = Callable[[_Stock, random.Random], _Sentence | None]
_FORMS: tuple[_Form, ...] = (_has, _quantified, _each, _in_all, _more, _place, _same_place, _arranged)
_SHARES = (0.13, 0.15, 0.13, 0.15, 0.14, 0.12, 0.02, 0.16)
