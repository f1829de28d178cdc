"""`vlscale data`: read public formats, write shards, check and show data sets, render the embedded one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .phrases import phrases
from .regions import extract

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.data.validate import Report

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="FORMAT:PATH,key=value,… or a path; shards; tars; a data recipe. See `vlscale data formats`.",
    ),
]
SourcesArgument = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="One or more sources or data recipes, in this order.")
]
ImageRootOption = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the images; of a recipe: of all its paths.")
]

app = typer.Typer(help="Make and check data sets.", no_args_is_help=True, rich_markup_mode=None)
app.command()(phrases)
app.command("regions")(extract)


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    train: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 8000,
    test: Annotated[int, typer.Option(min=1, help="Scenes held out.")] = 500,
    val: Annotated[int | None, typer.Option(min=0, help="Scenes to validate by; default: as many as held out.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
) -> None:
    """Render scenes with captions, boxes, tags, tuples, phrases, questions and statements."""
    from vlscale.data.scenes import render_scenes

    from . import terminal

    val = test if val is None else val
    with terminal.progress() as report:
        folder = render_scenes(
            out, train, test, seed, workers=workers, on_progress=partial(report, "rendering"), val=val
        )
    print(f"{train:,} training, {val:,} validation and {test:,} test scenes: {folder}")


@app.command()
def formats() -> None:
    """List the formats that are read, and the keys each has."""
    from rich.table import Table

    from vlscale.data.sources.base import COMMON_KEYS
    from vlscale.data.sources.registry import FORMATS

    from . import terminal

    table = Table("format", "what it is", "keys of its own")
    for name, entry in sorted(FORMATS.items()):
        table.add_row(name, entry.help, ", ".join(sorted(entry.keys)))
    terminal.print_rich(table)
    print(f"written FORMAT:PATH,key=value,…; every format also has {', '.join(sorted(COMMON_KEYS))}")


@app.command()
def shards(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option(help="Folder to write; a second run goes on where it was interrupted.")],
    max_size: Annotated[str, typer.Option(help="Largest tar, such as 256MB or 1GiB.")] = "256MB",
    resize: Annotated[
        int | None, typer.Option(min=16, help="Shrink images to this shorter side; default: bytes as they are.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    image_root: ImageRootOption = None,
) -> None:
    """Write WebDataset shards with an index and a manifest; the same input gives the same bytes."""
    from vlscale.data.shard_plan import parse_size, plan_shards
    from vlscale.data.shard_writer import write_shards

    from . import terminal

    root = None if image_root is None else str(image_root)
    plan, splits, missing = plan_shards(sources, parse_size(max_size), resize, root)
    with terminal.progress() as report:
        manifest = write_shards(
            plan,
            out,
            missing,
            workers or len(os.sched_getaffinity(0)),
            lambda split, done: report(f"writing {split}", done, splits[split]),
        )
    left_out = ", ".join(f"{number:,} {why}" for why, number in manifest.left_out.items() if number)
    rows: list[tuple[str, object]] = [
        ("samples", manifest.samples),
        *((f"split {split}", count) for split, count in manifest.splits.items()),
        ("captions", manifest.captions),
        ("shards", len(manifest.shards)),
        ("bytes", manifest.bytes),
        ("left out", f"{left_out}: see left_out.txt" if left_out else "nothing"),
    ]
    terminal.print_table(str(out), rows)


@app.command()
def answers(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option(help="JSON file to write: a list of answers.")],
    min_count: Annotated[int, typer.Option(min=1, help="Questions that an answer needs (VQA v2: 3,129 have 9).")] = 9,
    size: Annotated[int | None, typer.Option(min=1, help="Take the most frequent so many instead.")] = None,
    image_root: ImageRootOption = None,
) -> None:
    """Build the vocabulary of answers of question data sets, officially normalised."""
    from vlscale.data.answers import save_answers
    from vlscale.data.collect_answers import collect_answers

    from . import terminal

    found = collect_answers(sources, min_count, size, None if image_root is None else str(image_root))
    save_answers(out, found.answers)
    rows: list[tuple[str, object]] = [
        ("questions", found.questions),
        ("answers", len(found.answers)),
        ("questions whose answer is among them", f"{found.covered:.1%}"),
    ]
    terminal.print_table(str(out), rows, [("most frequent", ", ".join(found.answers[:10]))])


@app.command()
def show(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("contact-sheet.png"),
    split: Annotated[str | None, typer.Option(help="Split to show; default: all.")] = None,
    count: Annotated[int, typer.Option(min=1, max=200, help="Samples on the sheet.")] = 24,
    seed: Annotated[int | None, typer.Option(help="Choose them at random; default: spread evenly.")] = None,
    regions: Annotated[bool, typer.Option("--regions", help="Draw the regions instead of the data's boxes.")] = False,
    image_root: ImageRootOption = None,
) -> None:
    """Draw a contact sheet: images with their captions, boxes or regions, questions and statements."""
    from vlscale.data.sheet import contact_sheet

    root = None if image_root is None else str(image_root)
    print(contact_sheet(source, out, split, count, seed, root, regions=regions))


@app.command()
def validate(
    path: SourceArgument,
    image_root: ImageRootOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; 0 prints them all.")] = 20,
) -> None:
    """Decode every image and check every record. Exit code 0: clean, 1: problems found, 2: nothing to check."""
    from vlscale.data.validate import validate as check

    from . import terminal

    with terminal.progress() as on_progress:
        report = check(path, image_root, on_progress=on_progress)
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

    table = Table(title=escape(report.file), title_justify="left", show_header=False)
    for name, value in report.counts.items():
        table.add_row(name, value)
    for split, count in report.splits.items():
        table.add_row(escape(f"split {split}"), f"{count:,}")
    return table
