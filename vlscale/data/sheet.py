"""A contact sheet: pictures of a data set with everything it says of them, to be looked at before training on it."""

from __future__ import annotations

import os
import random
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from vlscale.config import Data
from vlscale.data.corpus import Corpus
from vlscale.data.images import ImageError, load_image
from vlscale.data.open import read_data
from vlscale.data.sample import Box, ImageFile, Sample, SampleError
from vlscale.errors import UserError

COLUMNS = 6
_CELL = 240
_TEXT = 118
_LINES = 8
_GAP = 12
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_MOST_BOXES = 12


def contact_sheet(
    spec: str, out: Path, split: str | None = None, count: int = 24, seed: int | None = None, root: str | None = None
) -> Path:
    """Write a PNG with `count` samples: spread evenly over the data, or drawn by `seed`; returns `out`.

    Raises:
        UserError: no such data or split, or `out` can't be written.
    """
    corpus = read_data(Data(path=spec, image_root=root))
    if split is not None:
        corpus, there = corpus.select([split], captioned=False), corpus.splits()
        if not len(corpus):
            raise UserError(f"{spec}: no split {split!r}; there are {', '.join(there)}")
    chosen = _chosen(corpus, count, seed)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for number, index in enumerate(chosen):
        x = _GAP + (number % columns) * (_CELL + _GAP)
        y = _GAP + (number // columns) * (_CELL + _TEXT + _GAP)
        _draw_cell(sheet, corpus, index, x, y)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, format="PNG")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); choose another --out") from None
    return out


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: Pillow's has no more than Latin letters."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _chosen(corpus: Corpus, count: int, seed: int | None) -> list[int]:
    size, count = len(corpus), min(count, len(corpus))
    if seed is not None:
        return sorted(random.Random(seed).sample(range(size), count))
    return [number * size // count for number in range(count)]


def _draw_cell(sheet: Image.Image, corpus: Corpus, index: int, x: int, y: int) -> None:
    draw, font = ImageDraw.Draw(sheet), _font(10)
    try:
        sample = corpus.sample(index)
        sheet.paste(_picture(sample), (x, y))
        lines = [line for text in _texts(sample) for line in textwrap.wrap(text, 40, subsequent_indent="   ")]
    except (SampleError, ImageError) as error:
        draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), fill="#eeeeee", outline="red")
        lines = textwrap.wrap(f"{corpus.where(index)}: {error}", 40)
    shown = [*lines[: _LINES - 1], f"… {len(lines) - _LINES + 1} more lines"] if len(lines) > _LINES else lines
    draw.multiline_text((x, y + _CELL + 4), "\n".join(shown), fill="black", font=font, spacing=3)


def _picture(sample: Sample) -> Image.Image:
    """The sample's image, or both of a pair side by side, with boxes, in a square cell."""
    cell = Image.new("RGB", (_CELL, _CELL), "#f4f4f4")
    if sample.second is not None:
        half = _CELL // 2 - 1
        for file, left in ((sample.image, 0), (sample.second, half + 2)):
            _fit(cell, file, left, half)
        return cell
    x, y, width, height = _fit(cell, sample.image, 0, _CELL)
    draw, font = ImageDraw.Draw(cell), _font(9)
    for number, (box, name) in enumerate(_named_boxes(sample)):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = (x + box[0] * width, y + box[1] * height, x + box[2] * width - 1, y + box[3] * height - 1)
        if corners[2] > corners[0] and corners[3] > corners[1]:
            draw.rectangle(corners, outline=colour, width=2)
            place = (corners[0] + 2, corners[1] + 1)
            draw.rectangle(draw.textbbox(place, name, font=font), fill="white")
            draw.text(place, name, fill=colour, font=font)
    return cell


def _fit(cell: Image.Image, file: ImageFile, left: int, width: int) -> tuple[int, int, int, int]:
    """Paste the whole image into a column of the cell; returns where it lies: left, top, width, height."""
    image = load_image(file)
    scale = min(width / image.width, _CELL / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    place = (left + (width - size[0]) // 2, (_CELL - size[1]) // 2)
    cell.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    return (*place, *size)


def _named_boxes(sample: Sample) -> list[tuple[Box, str]]:
    """Boxes with their tags; of phrases those of the first caption that has any."""
    tags = sample.tags or ("",) * len(sample.boxes)
    named = list(zip(sample.boxes, tags, strict=False))
    if not named:
        seen = [phrase for phrase in sample.phrases if phrase.boxes]
        named = [(box, phrase.text) for phrase in seen if phrase.caption == seen[0].caption for box in phrase.boxes]
    return named[:_MOST_BOXES]


def _texts(sample: Sample) -> Iterator[str]:
    for caption in sample.captions[:3]:
        yield f"· {caption[:400]}"
    for question in sample.questions[:3]:
        answers = ", ".join(answer for answer, _ in Counter(question.answers).most_common()) or "?"
        yield f"? {question.text} → {answers}"
    for statement in sample.statements[:3]:
        yield f"{statement.label or '?'}: {statement.text}"
    if not sample.captions and sample.tags:
        yield f"tags: {', '.join(dict.fromkeys(sample.tags))}"
