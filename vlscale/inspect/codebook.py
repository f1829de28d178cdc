"""What each codeword stands for: the image patches that quantise to it (CB-ViLA, section IV-G, Fig. 3), or, where
images and texts share the codes, the images and captions nearest to it (CODIS)."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.table import Table

from vlscale.errors import UserError
from vlscale.inspect import pictures, report
from vlscale.inspect.shared import Encoded, WordTable, encode_pairs, shared_codebooks
from vlscale.inspect.shared_section import shared_section, shared_table
from vlscale.inspect.usage import (
    MAX_IMAGES,
    Assigned,
    TagTable,
    Usage,
    assign_codes,
    pick_codes,
    pick_patches,
    some_samples,
    usage_of,
)
from vlscale.interop.layout import write_json
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.systems.protocol import System

PATCHES = 28
"""Patches drawn per code."""
EXAMPLES = 8
"""Images drawn as codes."""


def inspect_codebook(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    codes: int = 16,
    code: int | None = None,
    show_patches: bool = True,
    out: Path | None = None,
    image_root: str | None = None,
) -> Path:
    """Usage of a run's codebooks over a split, and the patches, or images and captions, of their codes.

    Args:
        source: run folder or checkpoint folder.
        codes: the most used codes to list and draw; a quarter as many rarer ones join them.
        code: this one only.
        show_patches: draw what codes stand for; without, only statistics.
        out: folder of the page, default `codebook/` in the run folder; replaced as a whole.

    Returns:
        Its `index.html`.

    Raises:
        UserError: no codebook, no such code, no readable image, or `out` holds something else.
    """
    run = load_run(source)
    split_name, samples = run_samples(run, data, split, image_root)
    seen = some_samples(samples, MAX_IMAGES)
    system = cast(System, run.system)
    shared = shared_codebooks(system)
    over_patches = {name: book for name, book in system.codebooks().items() if name not in shared}
    assigned = encoded = None
    if over_patches or not shared:
        assigned = assign_codes(system, seen, run.recipe.data, run.recipe.eval.batch_size, run.device, source)
    if shared:
        encoded = encode_pairs(run, system, seen)
    folder = out or run.folder / "codebook"
    with report.replaced_folder(folder) as new:
        sections: dict[str, Any] = {}
        if assigned:
            for name, book in over_patches.items():
                vectors = book.codes.detach().float().cpu().numpy()
                sections[name] = _section(new, name, assigned, vectors, codes, code, show_patches)
        if encoded:
            words = WordTable(encoded.captions, run.tokenizer.options.max_words)
            for name, common in shared.items():
                sections[name] = shared_section(new, name, common, encoded, words, codes, code, show_patches)
        facts = _facts(run, data, split_name, len(samples), assigned, encoded)
        files = sorted(entry.name for entry in new.iterdir())
        write_json(new / report.CODEBOOK, {"facts": facts, "codebooks": sections, "files": files})
    return folder / report.PAGE


def usage_table(page: Path) -> Table:
    """The most used codes of a page's first codebook, for the terminal."""
    content = report.read_json(page.parent / report.CODEBOOK)
    assert content is not None
    name, section = next(iter(content["codebooks"].items()))
    if "agreement" in section:  # only where images and texts share the codes
        return shared_table(name, section)
    unused = f"{len(section['dead'])} of {section['size']} codes never chosen"
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


def _section(
    folder: Path,
    name: str,
    assigned: Assigned,
    vectors: np.ndarray,
    count: int,
    only: int | None,
    show_patches: bool,
) -> dict[str, Any]:
    """Statistics and pictures of one codebook; vectors [K, d]. File names in the result are relative to `folder`."""
    cells = assigned.codes[name]
    usage = usage_of(cells, len(vectors))
    if only is not None and not 0 <= only < len(vectors):
        raise UserError(f"--code {only}: codebook {name} has codes 0 to {len(vectors) - 1}")
    chosen = [only] if only is not None else pick_codes(usage, count)
    (folder / name).mkdir()
    tags = TagTable(assigned.samples, assigned.grid)
    pictures.usage_histogram(usage.counts, usage.perplexity, folder / name / "usage.png")
    section: dict[str, Any] = {
        "size": len(vectors),
        "patches": cells.size,
        "images": len(cells),
        "entropy": usage.entropy,
        "perplexity": usage.perplexity,
        "dead": usage.dead,
        "codes_per_image": float(np.mean([len(np.unique(row)) for row in cells])),
        "histogram": f"{name}/usage.png",
        "codes": [_describe(code, cells, usage, tags) for code in chosen],
    }
    if show_patches:
        _draw_codes(folder, name, assigned, section["codes"])
        colours = pictures.code_colours(vectors, usage.counts)[cells]  # [I, N, 3]
        section["examples"] = _draw_examples(folder, name, assigned, colours)
        used = [entry for entry in section["codes"] if entry["count"]]
        if len(used) > 1:
            section["overview"] = _draw_overview(folder, name, assigned, used)
    return section


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


def _draw_codes(folder: Path, name: str, assigned: Assigned, entries: list[dict[str, Any]]) -> None:
    """One PNG per code that occurs; its name goes into the entry."""
    for entry in entries:
        places = pick_patches(assigned.codes[name], entry["code"], PATCHES)
        if places:
            tiles = [pictures.patch_pair(assigned.images[i], assigned.grid, cell, 72) for i, cell in places]
            entry["picture"] = f"{name}/code-{entry['code']:04d}.png"
            pictures.save_png(pictures.framed(pictures.grid_of(tiles, 7, 10), 12), folder / entry["picture"])


def _draw_overview(folder: Path, name: str, assigned: Assigned, entries: list[dict[str, Any]]) -> str:
    labels, rows = [], []
    for entry in entries:
        places = pick_patches(assigned.codes[name], entry["code"], 12)
        tiles = [pictures.context_tile(assigned.images[i], assigned.grid, cell, 72) for i, cell in places]
        rows.append(pictures.grid_of(tiles, 12, 5))
        best = (entry["words"] or entry["tags"])[:1]
        label = [f"code {entry['code']}", f"{100 * entry['share']:.1f} % of patches"]
        labels.append(label + [f"{item['tag']} {100 * item['share']:.0f} %" for item in best])
    sheet = pictures.labelled_rows(labels, rows, 150, 8)
    path = f"{name}/overview.png"
    pictures.save_png(pictures.framed(sheet, 14), folder / path)
    return path


def _draw_examples(folder: Path, name: str, assigned: Assigned, colours: np.ndarray) -> str:
    """Images beside their codes' colours [I, N, 3]."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(assigned.images), size=min(EXAMPLES, len(assigned.images)), replace=False)
    tiles = [pictures.code_map(assigned.images[i], assigned.grid, colours[i], 176) for i in chosen]
    path = f"{name}/examples.png"
    pictures.save_png(pictures.framed(pictures.grid_of(tiles, 3, 16), 12), folder / path)
    return path


def _facts(
    run: Run, data: str | None, split: str, available: int, assigned: Assigned | None, encoded: Encoded | None
) -> dict[str, Any]:
    """What a reader needs to know about the page, as shown at its foot."""
    looked_at = assigned or encoded
    assert looked_at is not None
    facts: dict[str, Any] = {
        "run": run.folder.name,
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "recipe": run.recipe.name,
        "data": _without_folders(data or run.recipe.data.path or "embedded scenes"),
        "split": split,
        "images": f"{len(looked_at.images)} of {available}",
        "resolution": run.recipe.data.image_size,
    }
    if assigned:
        facts["patches per image"] = f"{assigned.grid[0]} × {assigned.grid[1]}"
    if encoded:
        facts["captions"] = f"{len(encoded.captions)} of {encoded.available}"
    if looked_at.skipped:
        facts["unreadable images"] = _without_folders("; ".join(looked_at.skipped))
    return facts


def _without_folders(text: str) -> str:
    """Absolute paths in a text cut to their last names: a page is made to be passed on."""
    return re.sub(r"""(?<![^\s'"])/[^:;'"]*/""", "", text)
