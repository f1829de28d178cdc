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
from vlscale.data.regions import read_regions, strongest
from vlscale.data.sample import Box, ImageFile, Sample, SampleError
from vlscale.errors import UserError

COLUMNS = 6
_CELL = 240
_TEXT = 118
_LINES = 8
_GAP = 12
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_MOST_BOXES = 12
_MOST_REGIONS = 10
_QUALITY = 90


def contact_sheet(
    spec: str,
    out: Path,
    split: str | None = None,
    count: int = 24,
    seed: int | None = None,
    root: str | None = None,
    *,
    regions: bool = False,
) -> Path:
    """Draw `draw_sheet`'s picture of the data that `spec` means, or of one of its splits; returns `out`.

    Raises:
        UserError: no such data or split, or `out` can't be written.
    """
    corpus = read_data(Data(path=spec, image_root=root))
    if split is not None:
        corpus, there = corpus.select([split], captioned=False), corpus.splits()
        if not len(corpus):
            raise UserError(f"{spec}: no split {split!r}; there are {', '.join(there)}")
    return draw_sheet(corpus, out, count, seed, regions=regions)


def draw_sheet(corpus: Corpus, out: Path, count: int = 24, seed: int | None = None, *, regions: bool = False) -> Path:
    """Write a JPEG or, by its ending, a PNG with `count` samples: spread evenly, or drawn by `seed`; returns `out`.

    Args:
        regions: draw the most confident regions instead of the boxes that the data has; without, they are drawn where
            a sample has no boxes.

    Raises:
        UserError: `out` can't be written.
    """
    chosen = _chosen(corpus, count, seed)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for number, index in enumerate(chosen):
        x = _GAP + (number % columns) * (_CELL + _GAP)
        y = _GAP + (number // columns) * (_CELL + _TEXT + _GAP)
        _draw_cell(sheet, corpus, index, x, y, regions)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        jpeg = out.suffix.lower() in {".jpg", ".jpeg"}
        sheet.save(temporary, format="JPEG" if jpeg else "PNG", quality=_QUALITY)
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


def _draw_cell(sheet: Image.Image, corpus: Corpus, index: int, x: int, y: int, regions: bool) -> None:
    draw, font = ImageDraw.Draw(sheet), _font(10)
    try:
        sample = corpus.sample(index)
        sheet.paste(_picture(sample, regions), (x, y))
        lines = [line for text in _texts(sample, regions) for line in textwrap.wrap(text, 40, subsequent_indent="   ")]
    except (SampleError, ImageError) as error:
        draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), fill="#eeeeee", outline="red")
        lines = textwrap.wrap(f"{corpus.where(index)}: {error}", 40)
    shown = [*lines[: _LINES - 1], f"… {len(lines) - _LINES + 1} more lines"] if len(lines) > _LINES else lines
    draw.multiline_text((x, y + _CELL + 4), "\n".join(shown), fill="black", font=font, spacing=3)


def _picture(sample: Sample, regions: bool) -> Image.Image:
    """The sample's image, or both of a pair side by side, with boxes, in a square cell."""
    cell = Image.new("RGB", (_CELL, _CELL), "#f4f4f4")
    if sample.second is not None:
        half = _CELL // 2 - 1
        for file, left in ((sample.image, 0), (sample.second, half + 2)):
            _fit(cell, file, left, half)
        return cell
    x, y, width, height = _fit(cell, sample.image, 0, _CELL)
    draw, font = ImageDraw.Draw(cell), _font(9)
    names = []
    for number, (box, name) in enumerate(_named_boxes(sample, regions)):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = (x + box[0] * width, y + box[1] * height, x + box[2] * width - 1, y + box[3] * height - 1)
        if corners[2] > corners[0] and corners[3] > corners[1]:
            draw.rectangle(corners, outline=colour, width=2)
            start = max(0.0, min(corners[0] + 2, _CELL - 2 - font.getlength(name)))
            names.append(((start, corners[1] + 1), name, colour))
    for place, name, colour in reversed(names):  # above all lines, the first on top
        if name:
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


def _named_boxes(sample: Sample, regions: bool) -> list[tuple[Box, str]]:
    """Boxes with their tags; of phrases those of the first caption that has any; else, or if asked for, regions."""
    if regions:
        return _named_regions(sample)
    tags = sample.tags or ("",) * len(sample.boxes)
    named = list(zip(sample.boxes, tags, strict=False))
    if not named:
        seen = [phrase for phrase in sample.phrases if phrase.boxes]
        named = [(box, phrase.text) for phrase in seen if phrase.caption == seen[0].caption for box in phrase.boxes]
    return named[:_MOST_BOXES] or _named_regions(sample)


def _named_regions(sample: Sample) -> list[tuple[Box, str]]:
    """The most confident regions with tag and confidence; where nobody judged there is nothing to say."""
    found = read_regions(sample)
    if found is None:
        return []
    best = strongest(found, _MOST_REGIONS)
    boxes, sure = best.boxes.tolist(), best.confidences.tolist()
    names = [f"{tag} {value:.2f}".strip() if value else tag for tag, value in zip(best.tags, sure, strict=True)]
    return [((a, b, c, d), name) for (a, b, c, d), name in zip(boxes, names, strict=True)]


def _texts(sample: Sample, regions: bool) -> Iterator[str]:
    tags = f"tags: {', '.join(dict.fromkeys(sample.tags))}" if sample.tags else ""
    if tags and regions:
        yield tags
    for caption in sample.captions[:3]:
        yield f"· {caption[:400]}"
    for question in sample.questions[:3]:
        answers = ", ".join(answer for answer, _ in Counter(question.answers).most_common()) or "?"
        yield f"? {question.text} → {answers}"
    for statement in sample.statements[:3]:
        yield f"{statement.label or '?'}: {statement.text}"
    if tags and not regions and not sample.captions:
        yield tags
