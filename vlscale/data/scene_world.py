"""What is in an embedded scene: the things, where they stand, and the facts that follow. No pixels, no words.

A scene is a pure function of (seed, split, index, attempt): everything is drawn from one `random.Random` seeded with
those four, so that it depends neither on the number of workers nor on the scenes before it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

SHAPES = ("ball", "box", "cone", "star", "heart", "ring", "cross", "moon", "bottle", "fish")
TEXTURES = ("plain", "striped", "dotted", "checkered", "shiny")
SIZES = ("small", "large")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 34, 38),
    "orange": (247, 132, 22),
    "yellow": (252, 218, 40),
    "green": (38, 158, 66),
    "turquoise": (50, 205, 200),
    "blue": (36, 78, 214),
    "purple": (132, 52, 184),
    "pink": (252, 138, 188),
    "white": (246, 246, 244),
    "black": (38, 38, 44),
}
"""sRGB of the unshaded colour."""

BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "grass": ("green",),
    "sand": ("yellow", "white"),
    "water": ("blue", "turquoise"),
    "wood": ("orange",),
    "brick": ("red", "orange"),
    "snow": ("white",),
    "night": ("black", "blue"),
    "clouds": ("white", "turquoise"),
    "stone": (),
    "sunset": ("orange", "pink"),
    "tiles": ("white", "turquoise"),
    "curtain": ("purple", "black"),
}
"""Backgrounds, each with the colours that would drown in it: no thing in front of it wears them."""

RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind", "inside", "around", "next to")
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
    "inside": "around",
    "around": "inside",
    "next to": "next to",
}

RING_HOLE = 0.6
"""Radius of a ring's hole as a share of its outer radius; what is inside a ring has to fit."""

_FILL = {"bottle": 0.86, "fish": 0.92, "moon": 0.92, "star": 0.95}
"""Radius that a shape really takes, as a share of half its extent; 1 where not listed."""

_MIXES = {
    2: (("large", "large"), ("large", "large"), ("large", "small")),
    3: (("large", "large", "large"), ("large", "large", "small"), ("large", "large", "small")),
    4: (("large", "large", "small", "small"), ("large", "large", "small", "small"), ("large",) + ("small",) * 3),
    5: (("large",) + ("small",) * 4, ("large", "large", "small", "small", "small")),
}
_EXTENTS = {2: (0.58, 0.66), 3: (0.50, 0.58), 4: (0.48, 0.54), 5: (0.46, 0.52)}
"""Side of a large thing as a share of the picture, by the number of things."""
_SMALL = (0.31, 0.36)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. Lengths are shares of the picture's side, `angle` is in degrees, y points down."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    extent: float
    angle: float
    mirrored: bool

    @property
    def radius(self) -> float:
        """Half of the side that the shape really takes."""
        return 0.5 * self.extent * _FILL.get(self.shape, 1.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and its things in drawing order: later ones hide earlier ones."""

    background: str
    things: tuple[Thing, ...]

    def description(self) -> tuple[Any, ...]:
        """What no other scene may share: the background and the set of things, wherever they stand."""
        return (self.background, *sorted((t.shape, t.colour, t.texture, t.size) for t in self.things))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene; every thing stays recognisable (at least about two thirds of it in sight)."""
    background = rng.choice(tuple(BACKGROUNDS))
    count = rng.choices((2, 3, 4, 5), (0.2, 0.4, 0.28, 0.12))[0]
    looks = _looks(rng, background, rng.choice(_MIXES[count]))
    while (things := _place(rng, looks)) is None:
        for look in looks:  # as large as fits: shrink a little until it does
            look["extent"] *= 0.985
    return Scene(background, tuple(things))


def relations(things: tuple[Thing, ...]) -> list[tuple[int, str, int]]:
    """Every relation that holds, in both directions: (index of the subject, relation, index of the object)."""
    found = []
    for i, a in enumerate(things):
        for j in range(i + 1, len(things)):
            for name in _between(a, things[j]):
                found += [(i, name, j), (j, OPPOSITE[name], i)]
    return found


def zone(thing: Thing) -> str | None:
    """Where in the picture the thing is, or None where no word would be safe: `top left`, `left`, `middle` …"""
    column = "left" if thing.x < 0.38 else "right" if thing.x > 0.62 else ""
    row = "top" if thing.y < 0.38 else "bottom" if thing.y > 0.62 else ""
    if row or column:
        return f"{row} {column}".strip()
    return "middle" if math.hypot(thing.x - 0.5, thing.y - 0.5) < 0.12 else None


def _looks(rng: random.Random, background: str, sizes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Shape, colour, texture and size of each thing; no two things share shape and colour, so names are clear."""
    palette = [name for name in COLOURS if name not in BACKGROUNDS[background]]
    colours = rng.sample(palette, len(sizes))
    if rng.random() < 0.2:  # sometimes two things share a colour: colours alone must not tell a scene
        colours[-1] = colours[0]
    looks: list[dict[str, Any]] = []
    for colour, size in zip(colours, sizes, strict=True):
        shape = rng.choice(SHAPES)
        while any(look["shape"] == shape and look["colour"] == colour for look in looks):
            shape = rng.choice(SHAPES)
        texture = rng.choices(TEXTURES, (0.36, 0.17, 0.16, 0.15, 0.16))[0]
        low, high = _EXTENTS[len(sizes)] if size == "large" else _SMALL
        looks.append(
            {
                "shape": shape,
                "colour": colour,
                "texture": texture,
                "size": size,
                "extent": rng.uniform(low, high),
                "angle": rng.uniform(-13, 13),
                "mirrored": shape in ("fish", "moon") and rng.random() < 0.5,
            }
        )
    return looks


def _place(rng: random.Random, looks: list[dict[str, Any]]) -> list[Thing] | None:
    """Stand the things in the picture, large ones first; None where they do not fit and one should try again.

    Of 14 random places each takes the one with the most room, which spreads the things and fills the picture. One
    pair may overlap more (`in front of`), and a small thing may sit inside a large ring.
    """
    overlap = rng.randrange(1, len(looks)) if rng.random() < 0.4 else None
    ring = next((i for i, look in enumerate(looks) if look["shape"] == "ring" and look["size"] == "large"), None)
    guest = len(looks) - 1 if ring is not None and looks[-1]["size"] == "small" and rng.random() < 0.6 else None
    placed: list[Thing] = []
    for index, look in enumerate(looks):
        if index == guest and ring is not None:
            host = placed[ring]
            extent = min(look["extent"], 0.96 * host.extent * RING_HOLE)
            spot = (host.x + rng.uniform(-0.012, 0.012), host.y + rng.uniform(-0.012, 0.012))
            placed.append(Thing(**{**look, "extent": extent}, x=spot[0], y=spot[1]))
            continue
        target = rng.randrange(index) if index == overlap and guest is None else None
        best = max((_candidate(rng, look, placed, target) for _ in range(14)), key=lambda pair: pair[0])
        if best[0] < 0:
            return None
        placed.append(best[1])
    return placed


def _candidate(
    rng: random.Random, look: dict[str, Any], placed: list[Thing], target: int | None
) -> tuple[float, Thing]:
    """One random place and its room: the smallest gap to the others, negative where the place is not allowed."""
    half = 0.48 * look["extent"]
    x, y = rng.uniform(half, 1 - half), rng.uniform(half, 1 - half)
    if target is not None:
        other = placed[target]
        reach, turn = (0.5 * look["extent"] + other.radius) * rng.uniform(0.62, 0.74), rng.uniform(0, 2 * math.pi)
        x, y = other.x + reach * math.cos(turn), other.y + reach * math.sin(turn)
        if not (half <= x <= 1 - half and half <= y <= 1 - half):
            return -1.0, Thing(**look, x=x, y=y)
    thing = Thing(**look, x=x, y=y)
    gaps = [_gap(thing, other) for k, other in enumerate(placed) if k != target]
    return min(gaps, default=1.0), thing


def _gap(a: Thing, b: Thing) -> float:
    """Room between two things beyond the slight touch that is allowed; negative when they are too close."""
    return math.hypot(a.x - b.x, a.y - b.y) - 0.86 * (a.radius + b.radius)


def _between(a: Thing, b: Thing) -> list[str]:
    """Relations of a to b, where b is drawn after a, that are plain to see; doubtful ones are left out."""
    dx, dy = b.x - a.x, b.y - a.y
    distance, reach = math.hypot(dx, dy), a.radius + b.radius
    if distance < 0.05:
        return ["around"] if a.shape == "ring" else []
    found = []
    if abs(dx) > 0.18 and abs(dy) < 0.6 * abs(dx):
        found.append("left of" if dx > 0 else "right of")
    if abs(dy) > 0.18 and abs(dx) < 0.6 * abs(dy):
        found.append("above" if dy > 0 else "below")
    if distance < 0.78 * reach:
        found.append("behind")
    elif distance < 1.25 * reach:
        found.append("next to")
    return found
