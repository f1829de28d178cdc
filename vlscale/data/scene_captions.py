"""Captions, tags and scene-graph tuples of an embedded scene, all true by construction.

A caption is one of ten sentence forms filled with mentions ("the small striped red ball"), places and relations. Each
of a scene's captions takes another form; forms that do not apply (no relation holds) pass the turn to the next. Every
caption comes with its mentions, which are the phrases whose boxes are known.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlscale.data.scene_world import Scene, Thing, zone

MAX_WORDS = 22
PER_SCENE = 5

NOUNS = {
    "ball": ("ball", "ball", "ball", "sphere"),
    "box": ("box", "box", "box", "cube"),
    "cone": ("cone",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "ring", "ring", "hoop"),
    "cross": ("cross",),
    "moon": ("moon", "moon", "moon", "crescent"),
    "bottle": ("bottle", "bottle", "bottle", "flask"),
    "fish": ("fish",),
}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}
SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "big", "large")}
TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped",),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered",),
    "shiny": ("shiny", "shiny", "glossy"),
}
WITH_TEXTURE = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
PLACES = {
    "grass": ("on the grass", "on the grass", "on a lawn", "in a meadow"),
    "sand": ("on the sand", "on a sandy beach", "on the beach"),
    "water": ("on the water", "in the water", "on the sea"),
    "wood": ("on a wooden table", "on wooden boards", "on a wooden floor"),
    "brick": ("against a brick wall", "by a brick wall", "before a wall of bricks"),
    "snow": ("in the snow", "on fresh snow", "on the snow"),
    "night": ("in the night sky", "at night", "under a starry night sky"),
    "clouds": ("in the cloudy sky", "among the clouds", "before a sky with clouds"),
    "stone": ("on a stone floor", "on the stones", "on a stone path"),
    "sunset": ("at sunset", "in the sunset sky", "in the evening at sunset"),
    "tiles": ("on bathroom tiles", "against a tiled wall", "on the tiles"),
    "curtain": ("before a curtain", "against a velvet curtain", "on a curtain"),
}
BACKGROUND_TAGS = {
    "grass": "grass",
    "sand": "sand",
    "water": "water",
    "wood": "wood",
    "brick": "brick wall",
    "snow": "snow",
    "night": "night sky",
    "clouds": "cloudy sky",
    "stone": "stone floor",
    "sunset": "sunset",
    "tiles": "tiles",
    "curtain": "curtain",
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "in front of": ("in front of", "partly covering"),
    "behind": ("behind", "behind", "half hidden by"),
    "inside": ("inside", "within"),
    "around": ("around", "surrounding"),
    "next to": ("next to", "beside", "close to", "near"),
}
ZONE_WORDS = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "top left": ("at the top left", "in the upper left corner"),
    "top right": ("at the top right", "in the upper right corner"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
    "middle": ("in the middle", "in the centre"),
}
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}

_DETAIL = {2: 1.0, 3: 0.85, 4: 0.5, 5: 0.25}
"""Chance of each optional attribute by the number of things a caption mentions: all have to fit into MAX_WORDS."""

Form = Callable[["_Writer"], str | None]


class Mention(NamedTuple):
    """Words of a caption that mean things of the scene."""

    text: str
    first_word: int
    """Number of its first word, the caption split at spaces."""
    things: tuple[int, ...]
    """Several where one phrase means all of them: `three objects`."""


class Caption(NamedTuple):
    """A caption and, in the order of its words, what it mentions."""

    text: str
    mentions: tuple[Mention, ...]


def captions(scene: Scene, rng: random.Random, taken: set[str]) -> list[str]:
    """The texts of `write`."""
    return [caption.text for caption in write(scene, rng, taken)]


def write(scene: Scene, rng: random.Random, taken: set[str]) -> list[Caption]:
    """PER_SCENE captions of the scene, none of them in `taken`, to which they are added."""
    forms = list(_FORMS)
    rng.shuffle(forms)
    written: list[Caption] = []
    turn = 0
    while len(written) < PER_SCENE:
        writer = _Writer(scene, rng)
        text = forms[turn % len(forms)](writer)
        turn += 1
        if text is not None and text not in taken and len(text.split()) <= MAX_WORDS:
            written.append(Caption(text, writer.mentions(text)))
            taken.add(text)
    return written


def tag(thing: Thing) -> str:
    """The detector-like name of a thing: colour and shape."""
    return f"{thing.colour} {thing.shape}"


def tuples(scene: Scene) -> list[tuple[str, ...]]:
    """Scene-graph tuples, without repetitions: objects, attributes of objects, relations between objects."""
    found: list[tuple[str, ...]] = [(BACKGROUND_TAGS[scene.background],)]
    for thing in scene.things:
        found.append((thing.shape,))
        found += [(attribute, thing.shape) for attribute in (thing.colour, thing.texture, thing.size)]
    found += [(scene.things[i].shape, name, scene.things[j].shape) for i, name, j in scene.relations]
    return list(dict.fromkeys(found))


class _Writer:
    """Words for one caption: remembers which things it has mentioned and how many words are left."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        order = list(range(len(scene.things)))
        rng.shuffle(order)
        order.sort(key=lambda i: scene.things[i].size == "small" and rng.random() < 0.5)  # large things come first
        self.order = order
        self.said: list[tuple[str, tuple[int, ...]]] = []
        """Words and things of every mention, in the order of the text."""

    def mentions(self, text: str) -> tuple[Mention, ...]:
        """Where in the finished caption the mentions are."""
        found, end = [], 0
        for words, things in self.said:
            start = text.index(words, end)
            found.append(Mention(words, text.count(" ", 0, start), things))
            end = start + len(words)
        return tuple(found)

    def pick(self, words: Sequence[str]) -> str:
        return self.rng.choice(words)

    def thing(self, index: int, article: str = "a", detail: float = 0.75) -> str:
        """A mention: article, size, texture, colour, noun. `detail` is the chance of each optional attribute."""
        thing, rng = self.scene.things[index], self.rng
        words, tail = [], ""
        if rng.random() < 0.6 * detail:
            words.append(self.pick(SIZE_WORDS[thing.size]))
        if rng.random() < (0.15 if thing.texture == "plain" else 1.0) * detail:
            if thing.texture in WITH_TEXTURE and rng.random() < 0.15:
                tail = f" {WITH_TEXTURE[thing.texture]}"
            else:
                words.append(self.pick(TEXTURE_WORDS[thing.texture]))
        words += [self.pick(COLOUR_WORDS.get(thing.colour, (thing.colour,))), self.pick(NOUNS[thing.shape])]
        if article == "a" and words[0][0] in "aeiou":
            article = "an"
        text = " ".join([article, *words] if article else words) + tail
        self.said.append((text, (index,)))
        return text

    def place(self) -> str:
        return self.pick(PLACES[self.scene.background])

    def some(self, most: int) -> list[int]:
        """Two to `most` things of the scene, larger ones more often."""
        return self.order[: min(most, len(self.order))]

    def related(self) -> tuple[int, str, int] | None:
        """A relation that holds, the telling ones more often than `next to`."""
        found = self.scene.relations
        telling = tuple(fact for fact in found if fact[1] != "next to")
        if telling and self.rng.random() < 0.85:
            found = telling
        return self.rng.choice(found) if found else None

    def zoned(self, most: int) -> list[tuple[int, str]]:
        """Up to `most` things with the words for where they are; no two in the same zone."""
        spots: dict[str, int] = {}
        for index in self.order:
            where = zone(self.scene.things[index])
            if where is not None:
                spots.setdefault(where, index)
        return [(index, self.pick(ZONE_WORDS[where])) for where, index in spots.items()][:most]


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _list(w: _Writer) -> str:
    """a red ball, a blue star and a box on the grass"""
    things = w.some(5)
    names = [w.thing(i, detail=_DETAIL[len(things)]) for i in things]
    return f"{w.pick(('', '', 'a photo of ', 'a picture of '))}{_joined(names)} {w.place()}"


def _place_first(w: _Writer) -> str:
    """on the grass there are a red ball and a blue star"""
    things = w.some(4)
    names = [w.thing(i, detail=_DETAIL[len(things)]) for i in things]
    return f"{w.place()} {w.pick(('there are', 'lie', 'we see', 'you can see'))} {_joined(names)}"


def _counted(w: _Writer) -> str:
    """three objects on the sand: a red ball, a blue star and a green box"""
    count = len(w.scene.things)
    names = [w.thing(i, detail=0.7 if count < 4 else 0.3) for i in w.some(4)]
    what = w.pick(("things", "objects", "toys"))
    link = ":" if len(names) == count else ", among them"
    w.said.insert(0, (f"{COUNTS[count]} {what}", tuple(range(count))))
    return f"{COUNTS[count]} {what} {w.place()}{link} {_joined(names)}"


def _relation(w: _Writer) -> str | None:
    """a red ball is to the left of a blue star on the grass"""
    fact = w.related()
    if fact is None:
        return None
    verb = w.pick(("", "is ", "lies ", "stands "))
    relation = w.pick(RELATION_WORDS[fact[1]])
    return f"{w.thing(fact[0], detail=0.9)} {verb}{relation} {w.thing(fact[2], detail=0.9)} {w.place()}"


def _place_relation(w: _Writer) -> str | None:
    """on the grass a red ball is above a blue star"""
    fact = w.related()
    if fact is None:
        return None
    first, second = w.thing(fact[0], detail=0.9), w.thing(fact[2], detail=0.9)
    return f"{w.place()} {first} {w.pick(('is', 'lies', 'can be seen'))} {w.pick(RELATION_WORDS[fact[1]])} {second}"


def _relation_and_more(w: _Writer) -> str | None:
    """the red ball is beside the blue star, and a green box is at the top"""
    fact = w.related()
    rest = [] if fact is None else [i for i in w.order if i not in (fact[0], fact[2])]
    if fact is None or not rest:
        return None
    third, where = rest[0], zone(w.scene.things[rest[0]])
    spot = w.place() if where is None else w.pick(ZONE_WORDS[where])
    head = f"{w.thing(fact[0], 'the', 0.6)} is {w.pick(RELATION_WORDS[fact[1]])} {w.thing(fact[2], 'the', 0.6)}"
    return f"{head}, and {w.thing(third, detail=0.7)} is {spot}"


def _zones(w: _Writer) -> str | None:
    """a red ball on the left, a blue star on the right"""
    spots = w.zoned(4)
    if len(spots) < 2:
        return None
    text = _joined([f"{w.thing(i, detail=_DETAIL[len(spots) + 1])} {where}" for i, where in spots])
    return f"{text}, {w.place()}" if w.rng.random() < 0.6 else text


def _zone_first(w: _Writer) -> str | None:
    """at the top left there is a red ball, on the right a blue star, all on the grass"""
    spots = w.zoned(2)
    if len(spots) < 2:
        return None
    (first, one), (second, two) = spots
    head = f"{one} there is {w.thing(first, detail=0.8)}, {two} {w.thing(second, detail=0.8)}"
    return f"{head}, all {w.place()}" if w.rng.random() < 0.7 else head


def _together(w: _Writer) -> str:
    """a red ball together with a blue star and a box, in the snow"""
    things = w.some(4)
    names = [w.thing(i, detail=_DETAIL[len(things)]) for i in things]
    return f"{names[0]} {w.pick(('with', 'together with', 'and also'))} {_joined(names[1:])}, {w.place()}"


def _short(w: _Writer) -> str:
    """striped red ball and shiny blue star, brick wall"""
    names = [w.thing(i, article="", detail=1.0) for i in w.some(4)]
    return f"{_joined(names)}, {w.place()}"


_FORMS: tuple[Form, ...] = (
    _list,
    _place_first,
    _counted,
    _relation,
    _place_relation,
    _relation_and_more,
    _zones,
    _zone_first,
    _together,
    _short,
)
