"""The page of a VQA, NLVR2 or SNLI-VE result: numbers, and examples with their images, best, worst and drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlscale.data.images import ImageError, load_image
from vlscale.data.sample import Sample
from vlscale.inspect import pictures
from vlscale.inspect.folders import page_folder, replaced
from vlscale.inspect.html import document, figure, table
from vlscale.interop.layout import write_text

PAGE = "index.html"
SIDE, GAP = 400, 8
"""Pixels of a picture's longer side, and between the two of a pair."""
SEED = 0
RIGHT, WRONG = (20, 130, 60), (214, 39, 40)
GROUPS = {
    "best": "Answered rightly and most surely, of one image each",
    "worst": "Answered wrongly and most surely, of one image each",
    "drawn": "Drawn at random (seed 0)",
}
LEGEND = (
    '<p class="faint">Beside an answer its share of a softmax over all answers or classes; at the end the next '
    "best ones.</p>"
)

Prediction = dict[str, Any]


def draw_classified(result: Path, predictions: Path, examples: Sequence[Sample], count: int) -> Path:
    """Draw a result into a folder beside it that is named as it is; what an earlier page wrote there goes.

    Args:
        predictions: the result's, a line of JSON per example.
        examples: what their `example` counts.
        count: examples to draw: best, worst and random ones, a third each.

    Returns:
        The page.

    Raises:
        UserError: the folder holds something else.
    """
    content = json.loads(result.read_text(encoding="utf-8"))
    with predictions.open(encoding="utf-8") as lines:
        read = [one for one in map(json.loads, lines) if one["predicted"] is not None]
    folder = page_folder(result, PAGE)
    with replaced(folder, PAGE) as new:
        parts = [*_numbers(content), LEGEND]
        unread: list[str] = []
        for name, group in chosen(read, examples, count).items():
            drawn = [_drawn(one, examples, new / f"{name}-{at}.png", unread) for at, one in enumerate(group, 1)]
            parts += [f"<h2>{escape(GROUPS[name])}</h2>", f'<div class="maps">{"".join(drawn)}</div>']
        parts += [f'<p class="faint">Not drawn: {escape(reason)}</p>' for reason in unread]
        card = [(escape(key), f"<code>{escape(_told(value))}</code>") for key, value in content["protocol"].items()]
        parts += ["<h2>How this was measured</h2>", table(["", ""], card, [False, False])]
        write_text(new / PAGE, document(_title(content), parts))
    return folder / PAGE


def chosen(read: Sequence[Prediction], examples: Sequence[Sample], count: int) -> dict[str, list[Prediction]]:
    """Predictions by group; none stands in two. Where nothing is known to be right or wrong all are drawn.

    Args:
        read: those of images that could be read.
    """
    ends, left = count // 3, list(read)
    groups: dict[str, list[Prediction]] = {}
    for name, sign in (("best", -1), ("worst", 1)):
        judged = [one for one in left if one["points"] is not None and (one["points"] > 0.5) == (name == "best")]
        order = sorted(judged, key=lambda one: (sign * one["points"], -one["score"], one["example"]))
        first_of_image = {examples[one["example"]].image: one for one in reversed(order)}
        groups[name] = [one for one in order if first_of_image[examples[one["example"]].image] is one][:ends]
        taken = {one["example"] for one in groups[name]}
        left = [one for one in left if one["example"] not in taken]
    rest = count - len(groups["best"]) - len(groups["worst"])
    groups["drawn"] = random.Random(SEED).sample(left, min(rest, len(left)))
    return {name: group for name, group in groups.items() if group}


def _title(content: dict[str, Any]) -> str:
    return f"{content['protocol']['recipe']}: {content['task']}"


def _numbers(content: dict[str, Any]) -> list[str]:
    metrics, card, confusion = content["metrics"], content["protocol"], content["confusion"]
    names = list(metrics)
    rows = [["this run", *(f"{metrics[name]:.1f}" for name in names)]] if names else []
    for baseline, values in card["chance"].items():
        rows.append([escape(baseline), *(f"{values[name]:.1f}" if name in values else "" for name in names)])
    taken = list(next(iter(confusion.values()), {}))
    kinds = [
        [escape(kind), f"{own['examples']:,}", f"{own['accuracy']:.1f}", *_counts(confusion.get(kind), taken)]
        for kind, own in content["kinds"].items()
    ]
    header = ["", "examples", "accuracy in %", *(f"taken for {name}" for name in taken)]
    unread = card["unreadable_examples"]
    return [
        f"<h1>{escape(_title(content))}</h1>",
        f'<p class="faint">Step {card["step"]}; {card["examples"]:,} examples, split {escape(card["split"])}'
        f"{f', {unread:,} of images that can’t be read' if unread else ''}.</p>",
        table(["in %", *names], rows, [False, *[True] * len(names)]),
        *([table(header, kinds, [False, *[True] * (len(header) - 1)])] if kinds else []),
    ]


def _counts(counts: dict[str, int] | None, names: Sequence[str]) -> list[str]:
    return [f"{counts[name]:,}" if counts else "" for name in names]


def _drawn(one: Prediction, examples: Sequence[Sample], path: Path, unread: list[str]) -> str:
    """The figure of an example: its image or both of a pair, what was asked, answered and right."""
    example, images = examples[one["example"]], []
    for file in (example.image, example.second):
        if file is not None:
            try:
                images.append(Image.fromarray(pictures.fitted(np.asarray(load_image(file).convert("RGB")), SIDE)))
            except ImageError as error:
                unread.append(f"{file}: {error}")
                return ""
    shown = pictures.grid_of(images, 2, GAP)
    picture = pictures.stack([shown, pictures.text_block(_lines(one), max(SIDE, shown.width), 13)], 6)
    pictures.save_png(pictures.framed(picture, 8), path)
    points = one["points"]
    verdict = "not known" if points is None else "right" if points == 1 else "wrong" if points == 0 else f"{points:.1f}"
    return figure(path.name, f"{one['id']}: {verdict}", one["text"])


def _lines(one: Prediction) -> list[tuple[str, tuple[int, int, int]]]:
    points = one["points"]
    colour = pictures.INK if points is None else RIGHT if points > 0.5 else WRONG
    lines = [(one["text"], pictures.INK), (f"answered: {one['predicted']} {one['score']:.2f}", colour)]
    if one.get("answers"):
        people = ", ".join(f"{answer} {count}×" for answer, count in one["answers"].items())
        lines.append((f"people: {people}", pictures.INK))
    if one["true"]:
        share = "(not among the run's answers)" if one["true_score"] is None else f"{one['true_score']:.2f}"
        lines.append((f"right: {one['true']} {share}", pictures.INK))
    others = ", ".join(f"{answer} {share:.2f}" for answer, share in one["top"][1:4])
    return [*lines, (f"then: {others}", pictures.FAINT)] if others else lines


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_told(one)}" for key, one in value.items())
    return "–" if value is None else str(value)
