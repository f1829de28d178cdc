"""Answers the embedded scenes' questions and judges their statements anew, from the texts and the records alone.

Nothing here knows how the texts were written: they are taken apart by their words, and looked up in `record["scene"]`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from vlscale.data.scene_render import render
from vlscale.data.scene_world import Scene, Thing

Record = dict[str, Any]

SECRETS = {"heavy", "cheap", "old", "magnetic", "scented", "borrowed"}
_SHAPES = {s: s for s in ("ball", "box", "cone", "star", "heart", "ring", "cross", "moon", "bottle", "fish")}
_SHAPES |= {"boxes": "box", "crosses": "cross"} | {
    f"{s}s": s for s in ("ball", "cone", "star", "heart", "ring", "moon", "bottle")
}
_WORDS = {"size": {"small", "large"}, "texture": {"plain", "striped", "dotted", "checkered", "shiny"}}
_WORDS["colour"] = {"red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black"}
_ADJECTIVES = "|".join(sorted(set().union(*_WORDS.values()) | SECRETS))
_NP = rf"(?:(?:a|an|the|no) )?(?:(?:{_ADJECTIVES}) )*(?:{'|'.join(sorted(_SHAPES, key=len, reverse=True))}|things?)"
_SIDES = {
    "left of": r"(?:to the |on the )?left of",
    "right of": r"(?:to the |on the )?right of",
    "above": r"above|over",
    "below": r"below|under|beneath",
}
_COVERS = {"in front of": r"in front of|partly covering|nearer than", "inside": r"inside|within"}
_COVERS["behind"] = r"behind|half hidden by|farther away than"
_RELATIONS = _SIDES | _COVERS
_ANY_RELATION = "|".join(_RELATIONS.values())
_NUMBERS = {word: n for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"), start=1)}
_PLACES = {
    "grass": "on the grass",
    "sand": "on the sand",
    "water": "on the water",
    "wood": "on a wooden table",
    "brick": "against a brick wall",
    "snow": "in the snow",
    "night": "in the night sky",
    "clouds": "in the cloudy sky",
    "stone": "on a stone floor",
    "sunset": "at sunset",
    "tiles": "on bathroom tiles",
    "curtain": "before a curtain",
}


def answer(record: Record, question: str) -> str:
    """The right answer; the question has to have exactly one."""
    if found := re.fullmatch(rf"how many ({_NP}) are there", question):
        return str(len(_all(record, found[1])))
    if question == "what is in the background":
        return str(record["scene"]["background"])
    if found := re.fullmatch(rf"where in the picture is ({_NP})", question):
        return _zone(record, _one(record, found[1]))
    if found := re.fullmatch(rf"is ({_NP}) large or small", question):
        return str(_thing(record, found[1])["size"])
    if found := re.fullmatch(rf"what (color is|pattern does|is) ({_NP})(?: have)?", question):
        name = {"color is": "colour", "pattern does": "texture", "is": "shape"}[found[1]]
        return str(_thing(record, found[2])[name])
    if found := re.fullmatch(rf"what (is|color is the thing) ({_ANY_RELATION}) ({_NP})", question):
        index = _only(record, _name(found[2]), _one(record, found[3]))
        return str(record["scene"]["things"][index]["shape" if found[1] == "is" else "colour"])
    if found := re.fullmatch(r"what is (?:at|on|in) the ([a-z ]+?)(?: side| part| corner)?", question):
        return str(record["scene"]["things"][_nearest(record, found[1])]["shape"])
    return "yes" if _claim(record, _as_statement(question)) else "no"


def hypothesis(record: Record, text: str) -> str:
    """`entailment`, `neutral` or `contradiction`."""
    if found := re.fullmatch(rf"there is ({_NP}) that is ({_ADJECTIVES}) or ({_ADJECTIVES})", text):
        things, seen = _all(record, found[1]), {found[2], found[3]} - SECRETS
        assert len(seen) == 1, text
        if any(_has(record, index, next(iter(seen))) for index in things):
            return "entailment"
        return "neutral" if things else "contradiction"
    if secrets := SECRETS & set(text.split()):
        found = re.fullmatch(rf"there is ({_NP})", text)
        assert found, text
        assert len(secrets) == 1, text
        if _all(record, found[1]):
            return "neutral"
        return "entailment" if " no " in text else "contradiction"
    for name in ("in front of", "behind"):
        if found := re.fullmatch(rf"({_NP}) is (?:{_COVERS[name]}) ({_NP})", text):
            order = _nearer(record, _one(record, found[1]), _one(record, found[2]))
            return "neutral" if order is None else "entailment" if order == (name == "in front of") else "contradiction"
    return "entailment" if _claim(record, text) else "contradiction"


def judged(left: Record, right: Record, text: str) -> bool:
    """Whether a statement on a pair of scenes is true."""
    pair = (left, right)
    if text == "the images have the same background":
        return bool(left["scene"]["background"] == right["scene"]["background"])
    if found := re.fullmatch(rf"there are (\w+) ({_NP}) in all", text):
        return sum(len(_all(record, found[2])) for record in pair) == _NUMBERS[found[1]]
    if found := re.fullmatch(rf"the (left|right) image has (more|fewer) ({_NP}) than the (left|right) one", text):
        assert found[1] != found[4]
        one, other = (len(_all(record, found[3])) for record in (pair if found[1] == "left" else pair[::-1]))
        return one > other if found[2] == "more" else one < other
    if found := re.fullmatch(rf"in the (left|right) image ({_NP}) is ({_ANY_RELATION}) ({_NP})", text):
        record, name = pair[found[1] == "right"], _name(found[3])
        firsts, seconds = _all(record, found[2]), _all(record, found[4])
        sides = {_side(record, i, j, name) for i in firsts for j in seconds if i != j}
        assert True in sides or None not in sides, text
        return True in sides
    if found := re.fullmatch(r"in (both|only one of the|at least one of the)(?: images)? the things are (.*)", text):
        return _enough(found[1], [_PLACES[record["scene"]["background"]] == found[2] for record in pair])
    if found := re.fullmatch(rf"(both|only one of the|at least one of the) images ha(?:ve|s) ({_NP})", text):
        return _enough(found[1], [bool(_all(record, found[2])) for record in pair])
    parts = [re.fullmatch(rf"the (left|right) image has ({_NP})", part) for part in text.split(" and ")]
    assert all(parts), text
    return all(_all(pair[part[1] == "right"], part[2]) for part in parts if part)


def _enough(quantifier: str, true: list[bool]) -> bool:
    return {"both": all(true), "only one of the": sum(true) == 1, "at least one of the": any(true)}[quantifier]


def _claim(record: Record, text: str) -> bool:
    """Of claims that the picture decides one way or the other."""
    if found := re.fullmatch(rf"there is ({_NP})", text):
        return bool(_all(record, found[1]))
    if found := re.fullmatch(rf"({_NP}) and ({_NP}) have the same (color|pattern|shape)", text):
        name = {"color": "colour", "pattern": "texture", "shape": "shape"}[found[3]]
        one, other = _thing(record, found[1]), _thing(record, found[2])
        assert one is not other
        return bool(one[name] == other[name])
    if found := re.fullmatch(rf"({_NP}) is (larger|smaller) than ({_NP})", text):
        one, other = _thing(record, found[1])["extent"], _thing(record, found[3])["extent"]
        assert max(one, other) > 1.2 * min(one, other), text
        return (one > other) == (found[2] == "larger")
    if found := re.fullmatch(rf"({_NP}) is ({'|'.join(_SIDES.values())}) ({_NP})", text):
        side = _side(record, _one(record, found[1]), _one(record, found[3]), _name(found[2]))
        assert side is not None, text
        return side
    found = re.fullmatch(rf"({_NP}) is ({_ADJECTIVES})", text)
    assert found, text
    return _has(record, _one(record, found[1]), found[2])


def _as_statement(question: str) -> str:
    if found := re.fullmatch(r"is there (.*)", question):
        return f"there is {found[1]}"
    if found := re.fullmatch(rf"is ({_NP}) (.*)", question):
        return f"{found[1]} is {found[2]}"
    found = re.fullmatch(r"do (.*)", question)
    assert found, question
    return found[1]


def _name(words: str) -> str:
    return next(name for name, pattern in _RELATIONS.items() if re.fullmatch(pattern, words))


def _all(record: Record, phrase: str) -> list[int]:
    """Numbers of the things that the phrase fits; what is not to be seen is passed over."""
    words = [word for word in phrase.split() if word not in {"a", "an", "the", "no", "thing", "things"} | SECRETS]
    return [i for i in range(len(record["scene"]["things"])) if all(_has(record, i, word) for word in words)]


def _one(record: Record, phrase: str) -> int:
    """`the …`: exactly one thing."""
    things = _all(record, phrase)
    assert len(things) == 1, phrase
    assert phrase.startswith("the "), phrase
    return things[0]


def _thing(record: Record, phrase: str) -> dict[str, Any]:
    found: dict[str, Any] = record["scene"]["things"][_one(record, phrase)]
    return found


def _has(record: Record, index: int, word: str) -> bool:
    thing = record["scene"]["things"][index]
    if word in _SHAPES:
        return bool(thing["shape"] == _SHAPES[word])
    return bool(thing[next(name for name, words in _WORDS.items() if word in words)] == word)


def _side(record: Record, i: int, j: int, name: str) -> bool | None:
    """Whether thing i is on that side of thing j: by the centres; None where it lies askew or hardly aside."""
    a, b = record["scene"]["things"][i], record["scene"]["things"][j]
    along, across = ("x", "y") if name in ("left of", "right of") else ("y", "x")
    step = (b[along] - a[along]) * (1 if name in ("left of", "above") else -1)
    aside = abs(b[across] - a[across])
    return step > 0 if abs(step) > 0.15 and aside < abs(step) else None


def _only(record: Record, name: str, j: int) -> int:
    """The one thing that stands in the relation to thing j; no other could be meant."""
    others = [i for i in range(len(record["scene"]["things"])) if i != j]
    if name == "inside":
        box, found = record["boxes"][j], []
        for i in others:
            x1, y1, x2, y2 = record["boxes"][i]
            found += [i] if box[0] <= x1 < x2 <= box[2] and box[1] <= y1 < y2 <= box[3] else []
        assert record["scene"]["things"][j]["shape"] == "ring"
    elif name in _COVERS:
        covering = [i for i in others if (_change(record, i, j) > 40).sum() >= 12]
        found = [i for i in covering if (i > j) == (name == "in front of")]
    else:
        found = [i for i in others if _steps(record, i, j, name) > 0.08]
        assert all(_side(record, i, j, name) for i in found)
    assert len(found) == 1, (name, found)
    return found[0]


def _steps(record: Record, i: int, j: int, name: str) -> float:
    a, b = record["scene"]["things"][i], record["scene"]["things"][j]
    return float(
        {"left of": b["x"] - a["x"], "right of": a["x"] - b["x"], "above": b["y"] - a["y"]}.get(name, a["y"] - b["y"])
    )


def _middle(record: Record, index: int) -> tuple[float, float]:
    x1, y1, x2, y2 = record["boxes"][index]
    return (x1 + x2) / 2, (y1 + y2) / 2


def _zone(record: Record, index: int) -> str:
    """`top left`, `left`, `middle` …: by thirds of the picture."""
    thing = record["scene"]["things"][index]
    column = "left" if thing["x"] < 0.4 else "right" if thing["x"] > 0.6 else ""
    row = "top" if thing["y"] < 0.4 else "bottom" if thing["y"] > 0.6 else ""
    return f"{row} {column}".strip() or "middle"


def _nearest(record: Record, words: str) -> int:
    """The thing nearest to a place, by the boxes; the second one has to be clearly farther away."""
    x = 0.2 if "left" in words else 0.8 if "right" in words else 0.5
    y = 0.2 if re.search("top|upper", words) else 0.8 if re.search("bottom|lower", words) else 0.5
    found = []
    for index in range(len(record["boxes"])):
        column, row = _middle(record, index)
        found.append((float(np.hypot(column - x, row - y)), index))
    found.sort()
    assert len(found) == 1 or found[1][0] > found[0][0] + 0.1, words
    return found[0][1]


class _Still:
    """Stands for a generator whose draws are all in the middle: pictures differ by their scenes alone."""

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        value = (low + high) / 2
        return value if size is None else np.full(size, value)

    def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
        return 0 if size is None else np.zeros(size, dtype=int)

    def random(self) -> float:
        return 0.9

    def standard_normal(self, size: Any, dtype: Any = float) -> Any:
        return np.zeros(size, dtype=dtype)


def _nearer(record: Record, i: int, j: int) -> bool | None:
    """Whether thing i is nearer than thing j; None where the picture would look the same if it were the other way."""
    changed = _change(record, i, j)
    if changed.max() < 10:
        return None
    assert (changed > 40).sum() >= 6, "hard to tell"
    return i > j


def _change(record: Record, i: int, j: int) -> Any:
    """[H, W] by how many grey levels the picture of the two things changes with the order they are painted in."""
    things = []
    for index, colour in ((min(i, j), "red"), (max(i, j), "green")):
        fields = {name: value for name, value in record["scene"]["things"][index].items() if name != "visible"}
        things.append(Thing(**fields | {"colour": colour, "texture": "plain"}))
    one, other = (render(Scene("stone", order, ()), _Still()) for order in (tuple(things), tuple(things[::-1])))  # type: ignore[arg-type]
    return np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).max(axis=-1)
