"""Reads the embedded scenes' captions without knowing how they were written: mentions, places, relations, zones."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

NOUNS = {n: n for n in ("ball", "box", "cone", "star", "heart", "ring", "cross", "moon", "bottle", "fish")}
NOUNS |= {"sphere": "ball", "cube": "box", "hoop": "ring", "crescent": "moon", "flask": "bottle"}
COLOURS = {
    c: c for c in ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black")
} | {"violet": "purple"}
SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
TEXTURES = {t: t for t in ("plain", "striped", "dotted", "checkered", "shiny")} | {"spotted": "dotted"}
TEXTURES |= {"glossy": "shiny", "stripes": "striped", "dots": "dotted", "checks": "checkered"}
BACKGROUNDS = {
    r"grass|lawn|meadow": "grass",
    r"sand|sandy|beach": "sand",
    r"water|sea": "water",
    r"wooden": "wood",
    r"brick|bricks": "brick",
    r"snow": "snow",
    r"night": "night",
    r"clouds|cloudy": "clouds",
    r"stone|stones": "stone",
    r"sunset": "sunset",
    r"tiles|tiled": "tiles",
    r"curtain": "curtain",
}
RELATIONS = {
    r"(?:to the |on the )?left of": "left of",
    r"(?:to the |on the )?right of": "right of",
    r"above|over": "above",
    r"below|under|beneath": "below",
    r"in front of|partly covering": "in front of",
    r"behind|half hidden by": "behind",
    r"inside|within": "inside",
    r"around|surrounding": "around",
    r"next to|beside|close to|near": "next to",
}
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


def _any(words: dict[str, str]) -> str:
    return "|".join(words)


_MENTION = re.compile(
    rf"(?:\b({_any(SIZES)}) )?(?:\b({_any(TEXTURES)}) )?\b({_any(COLOURS)}) ({_any(NOUNS)})\b"
    r"(?: with (stripes|dots|checks))?"
)
_ZONE = re.compile(
    r"(?:on|at|in) the (upper left|upper right|lower left|lower right|top left|top right|bottom left|bottom right"
    r"|upper|lower|top|bottom|left|right|middle|centre)\b(?! of)(?: corner| side| part)?"
)


@dataclass
class Reading:
    """What a caption claims; things are numbered in the order they are mentioned."""

    mentions: list[dict[str, str]] = field(default_factory=list)
    background: str | None = None
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    zones: list[tuple[int, str]] = field(default_factory=list)
    count: int | None = None


def read(caption: str) -> Reading:
    """Parse a caption."""
    found = list(_MENTION.finditer(caption))
    reading = Reading([_mention(match) for match in found])
    places = [name for words, name in BACKGROUNDS.items() if re.search(rf"\b(?:{words})\b", caption)]
    assert len(places) <= 1, caption
    reading.background = places[0] if places else None
    count = re.match(rf"({'|'.join(COUNTS)}) (?:things|objects|toys)", caption)
    reading.count = COUNTS[count[1]] if count else None
    for k in range(len(found) - 1):
        between = caption[found[k].end() : found[k + 1].start()]
        for words, name in RELATIONS.items():
            if re.fullmatch(rf" (?:(?:is|lies|stands|can be seen) )?(?:{words}) (?:a|an|the) ", between):
                reading.relations.append((k, name, k + 1))
    zones = list(_ZONE.finditer(caption))
    leading = bool(zones) and zones[0].start() == 0
    for zone in zones:
        before = [k for k, match in enumerate(found) if match.end() <= zone.start()]
        reading.zones.append((len(before) if leading else before[-1], zone[1]))
    return reading


def fits(reading: Reading, scene: dict[str, Any]) -> bool:
    """Whether a scene (the record's `scene`) could be meant, going by background, count and the things named."""
    if reading.background not in (None, scene["background"]) or reading.count not in (None, len(scene["things"])):
        return False
    return all(any(named.items() <= thing.items() for thing in scene["things"]) for named in reading.mentions)


def _mention(match: re.Match[str]) -> dict[str, str]:
    size, texture, colour, noun, tail = match.groups()
    named = {"colour": COLOURS[colour], "shape": NOUNS[noun]}
    if size:
        named["size"] = SIZES[size]
    if texture or tail:
        named["texture"] = TEXTURES[texture or tail]
    return named
