"""The page of a retrieval: its numbers, and queries with what they found, the best and the worst, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlscale.data.images import ImageError, load_image
from vlscale.data.sample import Sample
from vlscale.inspect import pictures
from vlscale.inspect.boxes import COLOURS, Colour
from vlscale.inspect.folders import page_folder, replaced
from vlscale.inspect.html import document, figure, table
from vlscale.interop.layout import write_text

PAGE = "index.html"
TOP = 5
"""Candidates that are drawn of each query."""
TILE, SIDE, GAP, FRAME = 150, 220, 10, 4
"""Pixels of a candidate's and of a query's longer side, between tiles, and of a tile's frame."""
WIDTH = (TOP + 1) * (TILE + 2 * FRAME + GAP)
RIGHT = COLOURS[2]
WAYS = {"t2i": "Captions that look for their image", "i2t": "Images that look for a caption of theirs"}
GROUPS = {
    "best": "Right at rank 1, those first whose right answer is farthest ahead of a wrong one, of one image each",
    "worst": "The lowest ranks of the right answer, of one image each",
}
SCORES = {"itc_": "first stage (uni-modal)", "": "re-ranked by ITM", "sum_": "ITM + first stage"}
LEGEND = (
    "<p>In green what is right. Below a candidate its place and its score: of ITM, or of the first stage where it was "
    "not re-ranked (in brackets).</p>"
)

Query = dict[str, Any]


def draw_retrieval(result: Path, predictions: Path, samples: Sequence[Sample], count: int) -> Path:
    """Draw a result into a folder beside it that is named as it is; what an earlier page wrote there goes.

    Args:
        predictions: the result's, a line of JSON per query.
        samples: what their `image` counts.
        count: queries to draw each way: best and worst ones, a half each.

    Returns:
        The page.

    Raises:
        UserError: the folder holds something else.
    """
    content = json.loads(result.read_text(encoding="utf-8"))
    with predictions.open(encoding="utf-8") as lines:
        queries = [json.loads(line) for line in lines]
    folder = page_folder(result, PAGE)
    with replaced(folder, PAGE) as new:
        parts, unread = [*_numbers(content), LEGEND], list[str]()
        for way, title in WAYS.items():
            parts.append(f"<h2>{escape(title)}</h2>")
            for name, group in chosen([one for one in queries if one["way"] == way], count).items():
                parts.append(f"<h3>{escape(GROUPS[name])}</h3>")
                for place, query in enumerate(group, 1):
                    parts.append(_drawn(query, samples, new / f"{way}-{name}-{place}.png", unread))
        parts += [f'<p class="faint">Not drawn: {escape(reason)}</p>' for reason in unread]
        card = [(escape(key), f"<code>{escape(_told(value))}</code>") for key, value in content["protocol"].items()]
        parts += ["<h2>How this was measured</h2>", table(["", ""], card, [False, False])]
        write_text(new / PAGE, document(f"{content['protocol']['recipe']}: retrieval", parts))
    return folder / PAGE


def chosen(queries: Sequence[Query], count: int) -> dict[str, list[Query]]:
    """The queries to draw, by group; none stands in two."""
    asked = [one for one in queries if one["rank"] is not None]
    best = sorted((one for one in asked if one["rank"] == 1), key=lambda one: -_margin(one))
    worst = sorted((one for one in asked if one["rank"] > 1), key=lambda one: -one["rank"])
    groups = {"best": _one_each(best)[: count // 2], "worst": _one_each(worst)[: count - count // 2]}
    return {name: group for name, group in groups.items() if group}


def _margin(query: Query) -> float:
    """How far the first candidate, a right one, is ahead of the best wrong one that has a score of the same kind."""
    first, *others = query["top"]
    wrong = [one["score"] for one in others if not one["right"] and one["reranked"] == first["reranked"]]
    return first["score"] - wrong[0] if wrong else 0.0


def _one_each(queries: Iterable[Query]) -> list[Query]:
    """The first query of every image."""
    first: dict[int, Query] = {}
    for one in queries:
        first.setdefault(one["image"], one)
    return list(first.values())


def _numbers(content: dict[str, Any]) -> list[str]:
    metrics, card, folds = content["metrics"], content["protocol"], content.get("folds")
    names = [name.removeprefix("itc_") for name in metrics if not name.startswith(("itc_", "sum_"))]
    rows = _rows(metrics, names)
    rows.append(["chance", *(f"{card['chance'][name]:.1f}" for name in names)])
    if folds is not None:
        of = f"mean of {folds['count']} folds of {folds['images']:,} images, "
        rows += [[of + name, *cells] for name, *cells in _rows(folds["metrics"], names)]
    header = ["in %", *(name.replace("_r", " R@").replace("rsum", "RSUM") for name in names)]
    return [
        f"<h1>{escape(card['recipe'])}: retrieval</h1>",
        f'<p class="faint">Step {card["step"]}; {card["images"]:,} images, {card["captions"]:,} captions, split '
        f"{escape(card['split'])}.</p>",
        table(header, rows, [False, *[True] * len(names)]),
    ]


def _rows(metrics: dict[str, float], names: Sequence[str]) -> list[list[str]]:
    """A row per score that there is."""
    return [
        [title, *(f"{metrics[prefix + name]:.1f}" for name in names)]
        for prefix, title in SCORES.items()
        if f"{prefix}rsum" in metrics
    ]


def _drawn(query: Query, samples: Sequence[Sample], path: Path, unread: list[str]) -> str:
    """The figure of a query; nothing where an image of it can't be read any more."""
    draw = _images_of if query["way"] == "t2i" else _captions_of
    try:
        picture = draw(query, samples)
    except ImageError as error:
        unread.append(f"{query['id']}: {error}")
        return ""
    pictures.save_png(pictures.framed(picture, 8), path)
    alt = query.get("text") or query["id"]
    return figure(path.name, f"{query['id']}: the right one at rank {query['rank']:,}", alt)


def _images_of(query: Query, samples: Sequence[Sample]) -> Image.Image:
    """A caption above the images that it found; its own beside them where it is not among them."""
    top = query["top"][:TOP]
    tiles = [
        _tile(samples[one["image"]], RIGHT if one["right"] else None, _label(place, one))
        for place, one in enumerate(top, 1)
    ]
    if not any(one["right"] for one in top):
        tiles.append(_tile(samples[query["image"]], RIGHT, f"{query['rank']:,}."))
    head = pictures.text_block([(query["text"], pictures.INK)], WIDTH, 15)
    return pictures.stack([head, pictures.grid_of(tiles, TOP + 1, GAP)], 6)


def _captions_of(query: Query, samples: Sequence[Sample]) -> Image.Image:
    """An image beside the captions that it found, and below them its own where none is among them."""
    top = query["top"][:TOP]
    lines = [
        (f"{_label(place, one)}  {one['text']}", RIGHT if one["right"] else pictures.INK)
        for place, one in enumerate(top, 1)
    ]
    if not any(one["right"] for one in top):
        lines += [("", pictures.INK), (f"its own captions, the best at rank {query['rank']:,}:", pictures.FAINT)]
        lines += [(caption, RIGHT) for caption in samples[query["image"]].captions]
    shown, block = _picture(samples[query["image"]], SIDE), pictures.text_block(lines, WIDTH - SIDE - GAP, 14)
    sheet = Image.new("RGB", (WIDTH, max(shown.height, block.height)), pictures.PAPER)
    sheet.paste(shown, (0, 0))
    sheet.paste(block, (SIDE + GAP, 0))
    return sheet


def _label(place: int, one: dict[str, Any]) -> str:
    score = f"{one['score']:.2f}"
    return f"{place}. {score if one['reranked'] else f'({score})'}"


def _tile(sample: Sample, colour: Colour | None, label: str) -> Image.Image:
    """An image in a frame, and a line below it."""
    shown = _picture(sample, TILE)
    framed = Image.new("RGB", (shown.width + 2 * FRAME, shown.height + 2 * FRAME), colour or pictures.PAPER)
    framed.paste(shown, (FRAME, FRAME))
    return pictures.stack([framed, pictures.text_block([(label, colour or pictures.FAINT)], TILE, 13)], 2)


def _picture(sample: Sample, longest: int) -> Image.Image:
    return Image.fromarray(pictures.fitted(np.asarray(load_image(sample.image).convert("RGB")), longest))


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_told(one)}" for key, one in value.items())
    return "–" if value is None else str(value)
