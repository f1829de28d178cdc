"""What is in an embedded scene: the things, where they stand, and the facts that follow. No pixels, no words.

A scene is a pure function of (seed, split, index, attempt): everything is drawn from one `random.Random` seeded with
those four, so that it depends neither on the number of workers nor on the scenes before it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.scene_shapes import COVER_SIDE, REACH, RING_HOLE, cover

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
    "white": (240, 240, 238),
    "black": (46, 46, 53),
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

_FILL = {"bottle": 0.86, "fish": 0.92, "moon": 0.92, "star": 0.95}
"""Radius that a shape really takes, as a share of half its extent; 1 where not listed."""

_MIXES = {
    2: (("large", "large"), ("large", "large"), ("large", "small")),
    3: (("large", "large", "large"), ("large", "large", "small"), ("large", "large", "small")),
    4: (("large", "large", "small", "small"), ("large", "large", "small", "small"), ("large",) + ("small",) * 3),
    5: (("large",) + ("small",) * 4, ("large", "large", "small", "small", "small")),
}
_COUNTS = (0.42, 0.38, 0.14, 0.06)
"""Shares of scenes with 2, 3, 4 and 5 things: few and large, so that a masked picture still tells of its things."""
_EXTENTS = {2: (0.62, 0.72), 3: (0.52, 0.60), 4: (0.48, 0.54), 5: (0.46, 0.52)}
"""Side of a large thing as a share of the picture, by the number of things."""
_SMALL = (0.305, 0.345)
_LEAST = {"small": 0.28, "large": 0.43}
"""What crowded scenes may shrink to: large must stay clearly larger than small, in any scene."""


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

    def looks(self) -> tuple[str, str, str, str]:
        """What describes the thing wherever it is."""
        return self.shape, self.colour, self.texture, self.size

    @property
    def radius(self) -> float:
        """Half of the side that the shape really takes."""
        return 0.5 * self.extent * _FILL.get(self.shape, 1.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and its things in drawing order: later ones hide earlier ones."""

    background: str
    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]
    """Every relation that holds, in both directions: (index of the subject, relation, index of the object)."""

    def description(self) -> tuple[Any, ...]:
        """What no other scene may share: the background and the set of things, wherever they stand."""
        return (self.background, *sorted(thing.looks() for thing in self.things))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene; at least 60 % of every thing stays in sight."""
    background = rng.choice(tuple(BACKGROUNDS))
    count = rng.choices((2, 3, 4, 5), _COUNTS)[0]
    looks = _looks(rng, background, rng.choice(_MIXES[count]))
    while (things := _place(rng, looks)) is None or _least_in_sight(things) < 0.6:
        for look in looks:  # as large as fits: shrink a little until it does
            look["extent"] = max(0.98 * look["extent"], _LEAST[look["size"]])
    return Scene(background, tuple(things), tuple(_relations(things)))


def hidden_share(back: Thing, front: Thing) -> float:
    """Share of `back` that `front` hides, to a few percent."""
    if math.hypot(back.x - front.x, back.y - front.y) > 0.75 * (back.extent + front.extent):
        return 0.0
    points = _to_picture(back, cover(back.shape)[1])
    mask = cover(front.shape)[0]
    cells = np.floor((_to_own(front, points) + REACH) * (COVER_SIDE / (2 * REACH))).astype(int)
    inside = ((cells >= 0) & (cells < COVER_SIDE)).all(axis=1)
    cells = cells[inside]
    return float(mask[cells[:, 1], cells[:, 0]].sum() / len(points))


def zone(thing: Thing) -> str | None:
    """Where in the picture the thing is, or None where no word would be safe: `top left`, `left`, `middle` …"""
    column = "left" if thing.x < 0.38 else "right" if thing.x > 0.62 else ""
    row = "top" if thing.y < 0.38 else "bottom" if thing.y > 0.62 else ""
    if row or column:
        return f"{row} {column}".strip()
    return "middle" if math.hypot(thing.x - 0.5, thing.y - 0.5) < 0.12 else None


def _relations(things: list[Thing]) -> list[tuple[int, str, int]]:
    found = []
    for i, a in enumerate(things):
        for j in range(i + 1, len(things)):
            for name in _between(a, things[j]):
                found += [(i, name, j), (j, OPPOSITE[name], i)]
    return found


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

    Of 12 random places each takes the one with the most room, which spreads the things and fills the picture. One
    pair may overlap more (`in front of`), and a small thing may sit inside a large ring.
    """
    pair = rng.randrange(1, len(looks)) if rng.random() < 0.4 else None
    ring = next((i for i, look in enumerate(looks) if look["shape"] == "ring" and look["size"] == "large"), None)
    guest = ring is not None and looks[-1]["size"] == "small" and rng.random() < 0.85
    placed: list[Thing] = []
    for index, look in enumerate(looks):
        if guest and ring is not None and index == len(looks) - 1:
            placed.append(_inside(rng, look, placed[ring]))
            continue
        target = rng.randrange(index) if index == pair and not guest else None
        half = 0.48 * look["extent"]
        others = [(o.x, o.y, 0.86 * (o.radius + _radius(look))) for k, o in enumerate(placed) if k != target]
        most, best = -1.0, (0.0, 0.0)
        for _ in range(12):
            spot = _spot(rng, half, None if target is None else placed[target])
            room = min((math.hypot(spot[0] - x, spot[1] - y) - reach for x, y, reach in others), default=1.0)
            if room > most and half <= min(spot) and max(spot) <= 1 - half:
                most, best = room, spot
        if most < 0:
            return None
        placed.append(Thing(**look, x=best[0], y=best[1]))
    return placed


def _radius(look: dict[str, Any]) -> float:
    return 0.5 * float(look["extent"]) * _FILL.get(look["shape"], 1.0)


def _spot(rng: random.Random, half: float, target: Thing | None) -> tuple[float, float]:
    """A random place in the picture, or one that overlaps the target."""
    if target is None:
        return rng.uniform(half, 1 - half), rng.uniform(half, 1 - half)
    reach, turn = (half + target.radius) * rng.uniform(0.6, 0.74), rng.uniform(0, 2 * math.pi)
    return target.x + reach * math.cos(turn), target.y + reach * math.sin(turn)


def _inside(rng: random.Random, look: dict[str, Any], ring: Thing) -> Thing:
    """A small thing in the hole of a ring."""
    extent = min(look["extent"], 0.96 * ring.extent * RING_HOLE)
    x, y = ring.x + rng.uniform(-0.01, 0.01), ring.y + rng.uniform(-0.01, 0.01)
    return Thing(**{**look, "extent": extent}, x=x, y=y)


def _least_in_sight(things: list[Thing]) -> float:
    """The smallest share in sight of any thing; where two hide the same part it is counted twice."""
    shares = [1 - sum(hidden_share(a, b) for b in things[i + 1 :]) for i, a in enumerate(things)]
    return min(shares)


def _to_picture(thing: Thing, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [n, 2] in units of the thing's half extent to shares of the picture."""
    turn = math.radians(thing.angle)
    u, v = points[:, 0] * (-1 if thing.mirrored else 1), points[:, 1]
    x = math.cos(turn) * u - math.sin(turn) * v
    y = math.sin(turn) * u + math.cos(turn) * v
    return np.stack([x, y], axis=1) * (0.5 * thing.extent) + (thing.x, thing.y)


def _to_own(thing: Thing, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `_to_picture`."""
    turn = math.radians(thing.angle)
    moved = (points - (thing.x, thing.y)) / (0.5 * thing.extent)
    u = math.cos(turn) * moved[:, 0] + math.sin(turn) * moved[:, 1]
    v = -math.sin(turn) * moved[:, 0] + math.cos(turn) * moved[:, 1]
    return np.stack([u * (-1 if thing.mirrored else 1), v], axis=1)


def _between(a: Thing, b: Thing) -> list[str]:
    """Relations of a to b, where b is drawn after a, that are plain to see; doubtful ones are left out."""
    dx, dy = b.x - a.x, b.y - a.y
    distance, reach = math.hypot(dx, dy), a.radius + b.radius
    if a.shape == "ring" and distance < 0.05:
        return ["around"]
    found = []
    if abs(dx) > 0.18 and abs(dy) < 0.6 * abs(dx):
        found.append("left of" if dx > 0 else "right of")
    if abs(dy) > 0.18 and abs(dx) < 0.6 * abs(dy):
        found.append("above" if dy > 0 else "below")
    hidden = hidden_share(a, b)
    if hidden > 0.08:
        found.append("behind")
    elif hidden < 0.02 and distance < 1.1 * reach:
        found.append("next to")
    return found
