"""What each codeword stands for: the image patches that quantise to it (CB-ViLA, section IV-G, Fig. 3; SOHO, section
4.4, Fig. 3), or, where images and texts share the codes, the images and captions nearest to it (CODIS)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from vlscale.config import Data
from vlscale.inspect import report
from vlscale.inspect.patch_section import patch_section, patch_table
from vlscale.inspect.shared import Encoded, WordTable, encode_pairs, shared_codebooks
from vlscale.inspect.shared_section import shared_section, shared_table
from vlscale.inspect.usage import MAX_IMAGES, PADDING, Assigned, assign_codes, some_samples
from vlscale.interop.layout import write_json
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.systems.protocol import System


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
                sections[name] = patch_section(new, name, assigned, vectors, codes, code, show_patches)
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
    return patch_table(name, section)


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
        "resolution": _resolution(run.recipe.data),
    }
    if assigned:
        facts["patches per image"] = _patches_per_image(assigned)
    if encoded:
        facts["captions"] = f"{len(encoded.captions)} of {encoded.available}"
    if looked_at.skipped:
        facts["unreadable images"] = _without_folders("; ".join(looked_at.skipped))
    return facts


def _resolution(data: Data) -> int | str:
    if data.aspect is None:
        return data.image_size
    return f"shorter side {data.aspect.short}, longer side at most {data.aspect.long}"


def _patches_per_image(assigned: Assigned) -> str:
    """The grid where all images have the same and fill it, else how many there are without padding."""
    grids = {(image.rows, image.columns) for image in assigned.images}
    counts = next((codes != PADDING).sum(axis=1) for codes in assigned.codes.values())  # the same for every codebook
    if len(grids) == 1 and counts.min() == len(assigned.images[0]):
        return "{} × {}".format(*grids.pop())
    return f"{counts.min()} to {counts.max()}, {counts.mean():.0f} on average"


def _without_folders(text: str) -> str:
    """Absolute paths in a text cut to their last names: a page is made to be passed on."""
    return re.sub(r"""(?<![^\s'"])/[^:;'"]*/""", "", text)
