"""A contact sheet of a rendered folder: pictures, enlarged, with their captions underneath."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlscale.errors import UserError

_CELL = 240
_TEXT = 96
_GAP = 12


def contact_sheet(folder: Path, out: Path, rows: int = 4, columns: int = 6) -> None:
    """Write a PNG with the first rows × columns pictures of the folder's captions.jsonl, two captions each."""
    source = folder / "captions.jsonl"
    if not source.is_file():
        raise UserError(f"{folder}: no captions.jsonl; expected a folder made by `vlscale data scenes`")
    with source.open(encoding="utf-8") as stream:
        records = [json.loads(line) for line, _ in zip(stream, range(rows * columns), strict=False)]
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, record in enumerate(records):
        x = _GAP + (number % columns) * (_CELL + _GAP)
        y = _GAP + (number // columns) * (_CELL + _TEXT + _GAP)
        with Image.open(folder / record["image"]) as picture:
            sheet.paste(picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (x, y))
        lines = [line for text in record["captions"][:2] for line in textwrap.wrap(f"· {text}", 42)]
        draw.multiline_text((x, y + _CELL + 4), "\n".join(lines[:6]), fill="black", font=font, spacing=3)
    temporary = out.with_name(out.name + ".tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, out)
