"""Index maps: images with the index of every cell as a colour over it, and the legend of the most frequent ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from vlscale.data.sample import Sample
from vlscale.inspect import pictures
from vlscale.inspect.palette import distinct_colours
from vlscale.inspect.usage import PADDING, Assigned, Usage, usage_of

LEGEND = 18
"""Indices in the legend."""
LONGEST = 320
"""Pixels of an image's longer side."""
STRENGTH = 0.7
"""Of the colours over the images."""
SWATCH = 18
"""Pixels of a colour in the legend's picture."""


def draw_index_maps(folder: Path, name: str, assigned: Assigned, chosen: Sequence[int], usage: Usage) -> dict[str, Any]:
    """One PNG per image of `chosen` and one of the legend; an index has the same colour in all of them.

    Colours go by how often an index occurs in these images: the more frequent, the easier its colour is told from the
    others.

    Returns:
        `legend` (index, colour, its share of these images' cells and of all cells), its `picture`, and `maps` (picture,
        caption, numbers of cells and of different indices). File names are relative to `folder`.
    """
    here = usage_of(assigned.codes[name][list(chosen)], len(usage.counts))
    colours = np.zeros((len(here.counts), 3), dtype=np.uint8)
    colours[here.order] = distinct_colours(len(here.order))
    legend = [
        {
            "code": code,
            "colour": "#{:02x}{:02x}{:02x}".format(*colours[code].tolist()),
            "share": float(here.counts[code] / here.counts.sum()),
            "everywhere": float(usage.counts[code] / usage.counts.sum()),
        }
        for code in here.order[:LEGEND].tolist()
    ]
    picture = f"{name}/map-legend.png"
    pictures.save_png(pictures.framed(_legend(legend), 12), folder / picture)
    maps = [_draw_map(folder, f"{name}/map-{n:02d}.png", name, assigned, i, colours) for n, i in enumerate(chosen)]
    return {"legend": legend, "picture": picture, "different": len(here.order), "maps": maps}


def _draw_map(
    folder: Path, path: str, name: str, assigned: Assigned, image: int, colours: np.ndarray
) -> dict[str, Any]:
    """An image beside its map; colours [K, 3] uint8."""
    cells = assigned.of(name, image)
    shown = cells != PADDING
    pair = pictures.code_map(assigned.images[image], colours[cells], shown, LONGEST, STRENGTH)
    pictures.save_png(pair, folder / path)
    different = len(np.unique(cells[shown]))
    return {
        "picture": path,
        "caption": _title(assigned.samples[image]),
        "cells": int(shown.sum()),
        "different": different,
    }


def _title(sample: Sample) -> str:
    """A caption, else the name without folders: a page is made to be passed on."""
    return sample.captions[0] if sample.captions else PurePath(sample.id).name


def _legend(entries: Sequence[dict[str, Any]]) -> Image.Image:
    """Colour, index and share of each entry, in columns of six."""
    items = []
    for entry in entries:
        text = f"{entry['code']}: {100 * entry['share']:.1f} %"
        item = Image.new("RGB", (130, SWATCH), pictures.PAPER)
        item.paste(Image.new("RGB", (SWATCH, SWATCH), entry["colour"]), (0, 0))
        item.paste(pictures.text_block([(text, pictures.INK)], 130 - SWATCH - 8, 13), (SWATCH + 8, 0))
        items.append(item)
    return pictures.grid_of(items, 6, 8)
