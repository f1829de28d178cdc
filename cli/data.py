"""`vlscale data`: render the embedded data set, check a data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.data.validate import Report

app = typer.Typer(help="Make and check data sets.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    train: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 8000,
    test: Annotated[int, typer.Option(min=1, help="Scenes held out.")] = 500,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
) -> None:
    """Render scenes with captions, boxes, tags and scene-graph tuples."""
    from vlscale.data.scenes import render_scenes

    from . import terminal

    with terminal.progress() as report:
        folder = render_scenes(out, train, test, seed, workers=workers, on_progress=partial(report, "rendering"))
    print(f"{train:,} training and {test:,} test scenes: {folder}")


@app.command()
def validate(
    path: Annotated[str, typer.Argument(help="A jsonl file, or a folder made by `vlscale data`.")],
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths are relative to; default: beside the file, else images/."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; 0 prints them all.")] = 20,
) -> None:
    """Decode every image and check every record. Exit code 0: clean, 1: problems found, 2: nothing to check."""
    from vlscale.data.validate import validate as check

    from . import terminal

    with terminal.progress() as on_progress:
        report = check(path, image_root, on_progress=partial(on_progress, "decoding"))
    terminal.print_rich(_table(report))
    shown = report.problems if limit == 0 else report.problems[:limit]
    for problem in shown:
        print(problem)
    if len(shown) < len(report.problems):
        print(f"… and {len(report.problems) - len(shown):,} more; --limit 0 prints them all")
    if report.problems:
        raise typer.Exit(1)
    print("no problems")


def _table(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(report.file)), title_justify="left", show_header=False)
    for name, value in report.counts.items():
        table.add_row(name, value)
    for split, count in report.splits.items():
        table.add_row(escape(f"split {split}"), f"{count:,}")
    return table
