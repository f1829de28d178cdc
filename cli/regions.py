"""`vlscale data regions`: shards with the regions of every image, whatever finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch


def extract(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="One or more sources or data recipes, in this order.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; a second run goes on where it was interrupted.")],
    extractor: Annotated[
        str | None,
        typer.Option(
            help="torchvision:MODEL, detr:FOLDER, grid:TIMM_MODEL@7x7, boxes:TIMM_MODEL (features of the data's own "
            "boxes) or boxes+grid:TIMM_MODEL@3x3."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="File of the extractor's weights; `random` for trials. Nothing is fetched unasked."),
    ] = None,
    from_source: Annotated[
        bool, typer.Option("--from-source", help="No extractor: the features that a VinVL or Oscar TSV has.")
    ] = False,
    max_regions: Annotated[int, typer.Option(min=1, help="Kept of an image, the most confident.")] = 50,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Of a region whose label becomes a tag of the image.")
    ] = 0.2,
    ground_truth_tags: Annotated[
        bool, typer.Option("--ground-truth-tags", help="Keep the data's own tags where it has some.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images that the extractor is given at once.")] = 8,
    max_size: Annotated[str, typer.Option(help="Largest tar, such as 256MB or 1GiB.")] = "256MB",
    resize: Annotated[
        int | None,
        typer.Option(min=16, help="Shorter side of the images in the shards; default: bytes as they are."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; default: one per core.")] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of the images; of a recipe: of all its paths."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the extractor; default: all cores.")] = None,
) -> None:
    """Find regions (feature, box, tag, confidence) and write them into shards, beside images and captions."""
    launch.set_threads(threads, 1)
    from vlscale.data.shard_plan import parse_size
    from vlscale.errors import UserError
    from vlscale.tasks.regions import SHEET, Request, extract_regions

    from . import terminal

    if (extractor is None) != from_source:
        raise UserError("expected either --extractor KIND:MODEL, or --from-source for the features that the data has")
    request = Request(extractor, weights, max_regions, min_confidence, ground_truth_tags)
    with terminal.progress() as report:
        manifest = extract_regions(
            sources,
            out,
            request,
            parse_size(max_size),
            resize=resize,
            image_root=None if image_root is None else str(image_root),
            batch=batch,
            workers=workers or len(os.sched_getaffinity(0)),
            report=report,
        )
    left_out = ", ".join(f"{number:,} {why}" for why, number in manifest.left_out.items() if number)
    found: Any = manifest.options["regions"]
    rows: list[tuple[str, object]] = [
        ("samples", manifest.samples),
        *((f"split {split}", count) for split, count in manifest.splits.items()),
        ("captions", manifest.captions),
        ("shards", len(manifest.shards)),
        ("bytes", manifest.bytes),
        ("left out", f"{left_out}: see left_out.txt" if left_out else "nothing"),
    ]
    terminal.print_table(str(out), rows, [(f"regions: {name}", value) for name, value in found.items()])
    print(out / SHEET)
