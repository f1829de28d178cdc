"""The part of a codebook's page about codes that images and texts share: numbers and pictures of one codebook."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from vlscale.errors import UserError
from vlscale.inspect import heatmaps, pictures
from vlscale.inspect.shared import (
    MIN_RATIO,
    MIN_WORD,
    NEAREST_CODES,
    Choices,
    Encoded,
    SharedCodebook,
    WordTable,
    agreement_of,
    choose_codes,
    side_by_side,
    spread_pairs,
)
from vlscale.inspect.usage import Usage, pick_codes

IMAGES = 12
"""Nearest images drawn per code."""
CAPTIONS = 8
"""Nearest captions listed per code."""
PLAN_PAIRS = 64
"""Pairs whose transport is drawn."""
MATRIX_CODES = 20
"""Most used codes in the matrix of agreement."""
SIDE = 88
"""Pixels of a thumbnail."""


def shared_section(
    folder: Path,
    name: str,
    book: SharedCodebook,
    encoded: Encoded,
    words: WordTable,
    count: int,
    only: int | None,
    show: bool,
) -> dict[str, Any]:
    """Statistics and, if `show`, pictures of one codebook. File names in the result are relative to `folder`.

    Raises:
        UserError: no code `only`.
    """
    choices = choose_codes(book, encoded)
    if only is not None and not 0 <= only < choices.size:
        raise UserError(f"--code {only}: codebook {name} has codes 0 to {choices.size - 1}")
    usage = choices.usage()
    (folder / name).mkdir()
    section: dict[str, Any] = {
        "size": choices.size,
        "images": len(choices.images),
        "texts": len(choices.texts),
        "usage": {kind: _numbers(found) for kind, found in usage.items()},
        "dead": usage["both"].dead,
        "word_rule": {"captions": MIN_WORD, "ratio": MIN_RATIO},
        "agreement": _agreement(choices, encoded.image_of),
        "histogram": _draw_usage(folder, name, usage),
        "codes": [_describe(code, choices, usage, words) for code in _picked(usage["both"], count, only)],
    }
    if show:
        for entry in section["codes"]:
            entry |= _nearest(entry["code"], choices, encoded)
            entry["picture"] = _draw_images(folder, name, entry, choices, encoded.pixels)
        section["plan"] = _draw_plan(folder, name, book, choices, encoded)
        section["matrix"] = _draw_matrix(folder, name, book, choices, usage["both"])
    return section


def shared_table(name: str, section: dict[str, Any]) -> Table:
    """The most used codes, for the terminal."""
    usage, agreement = section["usage"], section["agreement"]
    perplexity = ", ".join(f"{usage[kind]['perplexity']:.1f} of {kind}" for kind in ("images", "texts", "both"))
    table = Table(
        title=f"Codebook “{name}”: perplexity {perplexity}, {len(section['dead'])} of {section['size']} codes "
        "never chosen",
        caption=f"{section['texts']:,} pairs of {section['images']:,} images: image and text agree in "
        f"{100 * agreement['share']:.1f} % (by chance {100 * agreement['chance']:.1f} %), the text's code is among the "
        f"image's nearest {NEAREST_CODES} in {100 * agreement['near']:.1f} % "
        f"(by chance {100 * agreement['near_chance']:.1f} %)",
    )
    for column in ("code", "images", "texts", "image's pairs agree", "text's pairs agree"):
        table.add_column(column, justify="right")
    table.add_column("characteristic words")
    for entry in section["codes"]:
        row = [str(entry["code"]), f"{entry['images']:,}", f"{entry['texts']:,}"]
        row += [percent(entry["image_agreement"]), percent(entry["text_agreement"])]
        table.add_row(*row, ", ".join(word["tag"] for word in entry["words"][:4]))
    return table


def percent(share: float | None) -> str:
    """Of a share in [0, 1]; a dash where there was nothing to count."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _numbers(usage: Usage) -> dict[str, Any]:
    shares = usage.counts / usage.counts.sum()
    return {"entropy": usage.entropy, "perplexity": usage.perplexity, "dead": usage.dead, "shares": shares.tolist()}


def _agreement(choices: Choices, image_of: np.ndarray) -> dict[str, Any]:
    return {"pairs": len(choices.pairs), "nearest": NEAREST_CODES} | asdict(agreement_of(choices, image_of))


def _picked(usage: Usage, count: int, only: int | None) -> list[int]:
    return [only] if only is not None else pick_codes(usage, count)


def _describe(code: int, choices: Choices, usage: dict[str, Usage], words: WordTable) -> dict[str, Any]:
    by_image, by_text = (choices.pairs == code).T  # [T] each
    agreed = int((by_image & by_text).sum())
    return {
        "code": code,
        "images": int(usage["images"].counts[code]),
        "texts": int(usage["texts"].counts[code]),
        "share": float(usage["both"].counts[code] / usage["both"].counts.sum()),
        "agreed": agreed,
        "image_pairs": int(by_image.sum()),
        "image_agreement": agreed / int(by_image.sum()) if by_image.any() else None,
        "text_agreement": agreed / int(by_text.sum()) if by_text.any() else None,
        "words": [asdict(share) for share in words.of(np.flatnonzero(by_text))],
        "image_words": [asdict(share) for share in words.of(np.flatnonzero(by_image))],
    }


def _nearest(code: int, choices: Choices, encoded: Encoded) -> dict[str, Any]:
    """Images and captions of the highest cosine to a code, whether or not they choose it; a caption's text once."""
    images = np.argsort(-choices.image_cosines[:, code], kind="stable")[:IMAGES]
    captions: dict[str, int] = {}
    for index in np.argsort(-choices.text_cosines[:, code], kind="stable").tolist():
        captions.setdefault(encoded.captions[index], index)
        if len(captions) == CAPTIONS:
            break
    return {
        "nearest_images": [_near(choices.image_cosines, choices.images, index, code) for index in images.tolist()],
        "nearest_texts": [
            _near(choices.text_cosines, choices.texts, index, code) | {"text": text} for text, index in captions.items()
        ],
    }


def _near(cosines: np.ndarray, chosen: np.ndarray, index: int, code: int) -> dict[str, Any]:
    return {"index": index, "cosine": float(cosines[index, code]), "chooses": bool(chosen[index] == code)}


def _draw_images(folder: Path, name: str, entry: dict[str, Any], choices: Choices, pixels: np.ndarray) -> str:
    tiles = [_thumbnail(pixels[near["index"]], near["chooses"]) for near in entry["nearest_images"]]
    path = f"{name}/code-{entry['code']:04d}.png"
    pictures.save_png(pictures.framed(pictures.grid_of(tiles, IMAGES, 6), 10), folder / path)
    return path


def _thumbnail(image: np.ndarray, chooses: bool) -> Image.Image:
    """With a frame, coloured where the image chooses the code."""
    inside = Image.fromarray(pictures.enlarge(image, SIDE - 6, SIDE - 6))
    tile = Image.new("RGB", (SIDE, SIDE), pictures.OUTLINE if chooses else pictures.PAPER)
    tile.paste(inside, (3, 3))
    return tile


def _draw_usage(folder: Path, name: str, usage: dict[str, Usage]) -> str:
    kinds = ("images", "texts")
    path = f"{name}/usage.png"
    perplexity = {kind: usage[kind].perplexity for kind in kinds}
    heatmaps.usage_chart({kind: usage[kind].counts for kind in kinds}, perplexity, folder / path)
    return path


def _draw_plan(folder: Path, name: str, book: SharedCodebook, choices: Choices, encoded: Encoded) -> dict[str, Any]:
    spread = spread_pairs(book, encoded, choices, PLAN_PAIRS)
    path = f"{name}/plan.png"
    heatmaps.plan_chart(spread.images, spread.texts, spread.codes, folder / path)
    return {
        "picture": path,
        "codes": spread.codes.tolist(),
        "pairs": spread.pairs.tolist(),
        "images": spread.images.tolist(),
        "texts": spread.texts.tolist(),
        # A row of G · T over all codes sums to 1: the rest is with the codes that are not drawn.
        "image_mass": float(spread.images.sum(axis=1).mean()),
        "text_mass": float(spread.texts.sum(axis=1).mean()),
        "overlap": spread.overlap,
        "overlap_chance": spread.overlap_chance,
    }


def _draw_matrix(folder: Path, name: str, book: SharedCodebook, choices: Choices, usage: Usage) -> dict[str, Any]:
    codes = side_by_side(book, np.sort(usage.order[:MATRIX_CODES]))
    counts = (choices.pairs[:, 0, None] == codes).T.astype(np.int64) @ (choices.pairs[:, 1, None] == codes)  # [C, C]
    path = f"{name}/agreement.png"
    heatmaps.agreement_chart(counts, codes, folder / path)
    return {"picture": path, "codes": codes.tolist(), "counts": counts.tolist()}
