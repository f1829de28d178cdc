"""The part of a codebook's page about codes of image patches: numbers and pictures of one codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from vlscale.errors import UserError
from vlscale.inspect import heatmaps, pictures
from vlscale.inspect.index_maps import draw_index_maps
from vlscale.inspect.tags import TagTable
from vlscale.inspect.usage import PADDING, SEED, Assigned, Usage, pick_codes, pick_patches, usage_of, zero_codes

PATCHES = 28
"""Patches drawn per code."""
EXAMPLES = 8
"""Images drawn as codes."""


def patch_section(
    folder: Path,
    name: str,
    assigned: Assigned,
    vectors: np.ndarray,
    count: int,
    only: int | None,
    show: bool,
) -> dict[str, Any]:
    """Statistics and, if `show`, pictures of one codebook; cells of padding count nowhere.

    Args:
        vectors: [K, d] float32, the codes.
        count: the most used codes to list and draw; a quarter as many rarer ones join them.
        only: this code alone.

    Returns:
        What `codebook.json` says of it; file names are relative to `folder`.

    Raises:
        UserError: no code `only`.
    """
    cells = assigned.codes[name]
    usage = usage_of(cells, len(vectors))
    if only is not None and not 0 <= only < len(vectors):
        raise UserError(f"--code {only}: codebook {name} has codes 0 to {len(vectors) - 1}")
    chosen = [only] if only is not None else pick_codes(usage, count)
    (folder / name).mkdir()
    tags = TagTable(assigned.samples, assigned.images, cells != PADDING)
    heatmaps.usage_histogram(usage.counts, usage.perplexity, folder / name / "usage.png")
    section: dict[str, Any] = {
        "size": len(vectors),
        "patches": int((cells != PADDING).sum()),
        "images": len(cells),
        "entropy": usage.entropy,
        "perplexity": usage.perplexity,
        "dead": usage.dead,
        "codes_per_image": float(np.mean([len(np.unique(row[row != PADDING])) for row in cells])),
        "histogram": f"{name}/usage.png",
        "codes": [_describe(code, cells, usage, tags) for code in chosen],
    }
    if zero := zero_codes(vectors):
        section |= {"zero_norm": zero, "zero_norm_share": len(zero) / len(vectors)}
    if show:
        images = _some_images(assigned)
        _draw_codes(folder, name, assigned, section["codes"])
        colours = pictures.code_colours(vectors, usage.counts)
        section["examples"] = _draw_examples(folder, name, assigned, images, colours)
        if only is None:
            section["index_maps"] = draw_index_maps(folder, name, assigned, images, usage)
        used = [entry for entry in section["codes"] if entry["count"]]
        if len(used) > 1:
            section["overview"] = _draw_overview(folder, name, assigned, used)
    return section


def patch_table(name: str, section: dict[str, Any]) -> Table:
    """The most used codes, for the terminal."""
    unused = f"{len(section['dead'])} of {section['size']} codes never chosen"
    if "zero_norm" in section:
        unused += f", {len(section['zero_norm'])} of zero norm"
    table = Table(
        title=f"Codebook “{name}”: perplexity {section['perplexity']:.1f}, {unused}",
        caption=f"{section['patches']:,} patches of {section['images']:,} images, "
        f"{section['codes_per_image']:.1f} different codes per image",
    )
    for column in ("code", "patches", "share"):
        table.add_column(column, justify="right")
    tagged = any(entry["tags"] for entry in section["codes"])
    if tagged:
        table.add_column("mostly in boxes of")
        table.add_column("purity", justify="right")
        table.add_column("everywhere", justify="right")
    for entry in section["codes"]:
        row = [str(entry["code"]), f"{entry['count']:,}", f"{100 * entry['share']:.2f} %"]
        best = (entry["words"] or entry["tags"])[:1]
        for item in best if tagged else ():
            row += [item["tag"], f"{100 * item['share']:.0f} %", f"{100 * item['everywhere']:.0f} %"]
        table.add_row(*row)
    return table


def _describe(code: int, cells: np.ndarray, usage: Usage, tags: TagTable) -> dict[str, Any]:
    by_tag, by_word = tags.of(cells, code)
    return {
        "code": code,
        "count": int(usage.counts[code]),
        "share": float(usage.counts[code] / usage.counts.sum()),
        "images": int((cells == code).any(axis=1).sum()),
        "tags": [asdict(share) for share in by_tag],
        "words": [asdict(share) for share in by_word],
    }


def _some_images(assigned: Assigned) -> list[int]:
    """`EXAMPLES` of them, drawn with `SEED`."""
    count = len(assigned.images)
    return np.random.default_rng(SEED).choice(count, size=min(EXAMPLES, count), replace=False).tolist()


def _draw_codes(folder: Path, name: str, assigned: Assigned, entries: list[dict[str, Any]]) -> None:
    """One PNG per code that occurs; its name goes into the entry."""
    for entry in entries:
        places = pick_patches(assigned.codes[name], entry["code"], PATCHES)
        if places:
            tiles = [pictures.patch_pair(assigned.images[i], cell, 72) for i, cell in places]
            entry["picture"] = f"{name}/code-{entry['code']:04d}.png"
            pictures.save_png(pictures.framed(pictures.grid_of(tiles, 7, 10), 12), folder / entry["picture"])


def _draw_overview(folder: Path, name: str, assigned: Assigned, entries: list[dict[str, Any]]) -> str:
    labels, rows = [], []
    for entry in entries:
        places = pick_patches(assigned.codes[name], entry["code"], 12)
        tiles = [pictures.context_tile(assigned.images[i], cell, 72) for i, cell in places]
        rows.append(pictures.grid_of(tiles, 12, 5))
        best = (entry["words"] or entry["tags"])[:1]
        label = [f"code {entry['code']}", f"{100 * entry['share']:.1f} % of patches"]
        labels.append(label + [f"{item['tag']} {100 * item['share']:.0f} %" for item in best])
    sheet = pictures.labelled_rows(labels, rows, 150, 8)
    path = f"{name}/overview.png"
    pictures.save_png(pictures.framed(sheet, 14), folder / path)
    return path


def _draw_examples(folder: Path, name: str, assigned: Assigned, chosen: Sequence[int], colours: np.ndarray) -> str:
    """Images beside their cells in colours [K, 3] that are alike where the codes are."""
    tiles = []
    for i in chosen:
        cells = assigned.of(name, i)
        tiles.append(pictures.code_map(assigned.images[i], colours[cells], cells != PADDING, 176))
    path = f"{name}/examples.png"
    pictures.save_png(pictures.framed(pictures.grid_of(tiles, 3, 16), 12), folder / path)
    return path
