"""The page of a grounding result: numbers, Fig. 5 of MVPTR's paper for a caption, and captions with their boxes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlscale.data.images import ImageError, load_image
from vlscale.data.sample import Sample
from vlscale.inspect import pictures
from vlscale.inspect.boxes import COLOURS, RED, Mark, with_boxes
from vlscale.inspect.folders import page_folder, replaced
from vlscale.inspect.html import document, figure, table
from vlscale.interop.layout import write_text

PAGE = "index.html"
FIGURE = "concepts.png"
SIDE = 400
"""Pixels of a picture's longer side."""
TILE, COLUMNS, GAP = 210, 4, 12
"""Of the figure."""
SEED = 0
GROUPS = {
    "best": "Captions with the largest share of hits, those with more phrases first, of one image each",
    "worst": "Captions with the smallest share of hits, those with more phrases first, of one image each",
    "drawn": "Captions drawn at random (seed 0)",
}
LEGEND = (
    "<p>Dashed: the true boxes. Solid: the region of the highest score, a hit where its IoU with one of the phrase’s "
    "true boxes is 0.5 or more.</p>"
)


class _Caption(NamedTuple):
    """A caption's predictions."""

    image: int
    text: str
    phrases: list[dict[str, Any]]

    @property
    def hits(self) -> int:
        return sum(one["hit"]["any"] for one in self.phrases)

    @property
    def share(self) -> float:
        return self.hits / len(self.phrases)


def draw_grounding(result: Path, predictions: Path, samples: Sequence[Sample], count: int) -> Path:
    """Draw a result into a folder beside it that is named as it is; what an earlier page wrote there goes.

    Args:
        predictions: the result's, a line of JSON per phrase.
        samples: what their `image` counts.
        count: captions to draw: best, worst and random ones, a third each.

    Returns:
        The page.

    Raises:
        UserError: the folder holds something else.
    """
    content = json.loads(result.read_text(encoding="utf-8"))
    folder = page_folder(result, PAGE)
    with replaced(folder, PAGE) as new:
        parts = _parts(content, _chosen(_captions(predictions), count), samples, new)
        write_text(new / PAGE, document(f"{content['protocol']['recipe']}: phrase grounding", parts))
    return folder / PAGE


def _parts(
    content: dict[str, Any], chosen: dict[str, list[_Caption]], samples: Sequence[Sample], folder: Path
) -> list[str]:
    """The page's parts; their pictures are drawn into `folder`."""
    unread: list[str] = []
    parts = [*_numbers(content), *_concepts(content["figure"], samples, folder, unread), LEGEND]
    for name, captions in chosen.items():
        drawn = [_drawn(one, samples, folder / f"{name}-{at}.png", unread) for at, one in enumerate(captions, 1)]
        parts += [f"<h2>{escape(GROUPS[name])}</h2>", f'<div class="maps">{"".join(drawn)}</div>']
    parts += [f'<p class="faint">Not drawn: {escape(reason)}</p>' for reason in unread]
    card = [(escape(key), f"<code>{escape(_told(value))}</code>") for key, value in content["protocol"].items()]
    return [*parts, "<h2>How this was measured</h2>", table(["", ""], card, [False, False])]


def _numbers(content: dict[str, Any]) -> list[str]:
    metrics, card = content["metrics"], content["protocol"]
    names = list(metrics)
    header = ["in %", "phrases", *map(_titled, names)]
    rows = [["this run", f"{card['phrases']:,}", *_cells(metrics, names)]]
    rows += [[escape(name), "", *_cells(values, names)] for name, values in content["baselines"].items()]
    shown = [name for name in names if not name.endswith("_r10")]  # or the table is wider than the page
    kinds = [
        [escape(kind), f"{values['phrases']:,}", *_cells(values, [*shown, "upper_bound"])]
        for kind, values in content["kinds"].items()
    ]
    by_kind = table(
        ["in %", "phrases", *map(_titled, shown), "upper bound"], kinds, [False, *[True] * (len(shown) + 2)]
    )
    return [
        f"<h1>{escape(card['recipe'])}: phrase grounding</h1>",
        f'<p class="faint">Step {card["step"]}; {card["captions"]:,} captions of {card["images"]:,} images, '
        f"split {escape(card['split'])}. Regions: {escape(card['regions'])}.</p>",
        table(header, rows, [False, *[True] * (len(names) + 1)]),
        *(["<h3>By kind of phrase</h3>", by_kind] if kinds else []),
    ]


def _titled(name: str) -> str:
    """`any_r1` → `any R@1`."""
    return name.replace("_r", " R@").replace("_", " ")


def _cells(values: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:.1f}" for name in names]


def _concepts(
    drawn: dict[str, Any] | None, samples: Sequence[Sample], folder: Path, unread: list[str]
) -> Iterator[str]:
    """A tile per phrase and phrase concept of the drawn caption, its region in red."""
    image = _image(samples[drawn["image"]], unread) if drawn else None
    if drawn is None or image is None:
        return
    tiles = []
    for one in drawn["regions"]:
        label = [(one["text"], pictures.INK), (f"{one['kind']}, {one['score']:.3f}", pictures.FAINT)]
        tile = with_boxes(image, [Mark(one["box"], RED)], TILE)
        tiles.append(pictures.stack([tile, pictures.text_block(label, TILE, 13)], 4))
    head = pictures.text_block([(drawn["caption"], pictures.INK)], COLUMNS * (TILE + GAP) - GAP, 15)
    sheet = pictures.stack([head, pictures.grid_of(tiles, COLUMNS, GAP)], 10)
    pictures.save_png(pictures.framed(sheet, 14), folder / FIGURE)
    yield "<h2>Phrases and phrase concepts of one caption</h2>"
    yield figure(FIGURE, "In red the region of the highest score; the caption was drawn at random.", drawn["caption"])


def _captions(predictions: Path) -> list[_Caption]:
    """Predictions by caption, in their order."""
    found: dict[tuple[int, int], _Caption] = {}
    with predictions.open(encoding="utf-8") as lines:
        for one in map(json.loads, lines):
            key = one["image"], one["caption_number"]
            found.setdefault(key, _Caption(one["image"], one["caption"], [])).phrases.append(one)
    return list(found.values())


def _chosen(captions: list[_Caption], count: int) -> dict[str, list[_Caption]]:
    """Captions by group; none stands in two."""
    ends, left = count // 3, list(captions)
    chosen: dict[str, list[_Caption]] = {}
    for name, sign in (("best", -1), ("worst", 1)):
        ranked = sorted((sign * one.share, -len(one.phrases), place) for place, one in enumerate(left))
        order = [left[place] for *_, place in ranked]
        first_of_image = {one.image: one for one in reversed(order)}
        chosen[name] = [one for one in order if first_of_image[one.image] is one][:ends]
        left = [one for one in left if one not in chosen[name]]
    chosen["drawn"] = random.Random(SEED).sample(left, min(count - 2 * ends, len(left)))
    return {name: group for name, group in chosen.items() if group}


def _drawn(caption: _Caption, samples: Sequence[Sample], path: Path, unread: list[str]) -> str:
    """The figure of a caption: true boxes dashed, the phrase's region solid, a colour per phrase."""
    image = _image(samples[caption.image], unread)
    if image is None:
        return ""
    coloured = [(one, COLOURS[place % len(COLOURS)]) for place, one in enumerate(caption.phrases)]
    marks = [Mark(box, colour, dashed=True) for one, colour in coloured for box in one["boxes"]]
    marks += [Mark(one["best_box"], colour) for one, colour in coloured if one["best_box"] is not None]
    lines = [(caption.text, pictures.INK), *((_verdict(one), colour) for one, colour in coloured)]
    picture = pictures.stack([with_boxes(image, marks, SIDE), pictures.text_block(lines, SIDE, 13)], 6)
    pictures.save_png(pictures.framed(picture, 8), path)
    return figure(path.name, f"{caption.hits} of {len(caption.phrases)} phrases hit", caption.text)


def _verdict(one: dict[str, Any]) -> str:
    if one["score"] is None:
        return f"{one['phrase']}: missed, no word or no region to compare"
    return f"{one['phrase']}: {'hit' if one['hit']['any'] else 'miss'}, {one['score']:.3f}"


def _image(sample: Sample, unread: list[str]) -> Image.Image | None:
    try:
        return load_image(sample.image)
    except ImageError as error:
        unread.append(f"{sample.image}: {error}")
        return None


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {one}" for key, one in value.items())
    return "–" if value is None else str(value)
