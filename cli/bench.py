"""`vlscale bench`: how fast vlscale's parts are here: the loader against what people use instead, a system's stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.data.bench import Comparison, Report, Spread
    from vlscale.tasks.inference import InferenceReport

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def data(
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, or what --data takes elsewhere; default: photograph-like ones made here."
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Side of the square input in pixels.")] = 256,
    images: Annotated[int, typer.Option(min=1, help="Images of each kind at most, evenly over the data.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over them; medians are over the passes.")] = 7,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
) -> None:
    """What an image and a caption cost a loader process, against ALBEF's pipeline: CPU time, one thread."""
    from vlscale.data.bench import bench_data

    from . import terminal

    _check_folder(out)
    with terminal.progress() as on_progress:
        report = bench_data(data, size=size, images=images, rounds=rounds, on_progress=on_progress)
    terminal.print_rich(_table(report))
    for kind, levels in report.largest_difference.items():
        print(f"{kind}: crop and resize differ from Pillow's by {levels} grey levels at most")
    if out is not None:
        report.write(out)
        print(out)


@app.command()
def inference(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, a checkpoint, or a recipe by name or path.")
    ],
    height: Annotated[
        int, typer.Option(help="Of the images, in pixels; systems that take squares only get their own size.")
    ] = 600,
    width: Annotated[int, typer.Option(help="Of the images, in pixels.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 16,
    batch: Annotated[int, typer.Option(help="Pairs in a pass.")] = 1,
    repeats: Annotated[int, typer.Option(help="Passes that count; medians are over them.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
) -> None:
    """How long a pass of a system takes, in its vision, text and fusion stages (SOHO, section 4.5)."""
    from . import launch, terminal

    launch.set_threads(threads, 1)
    _check_folder(out)
    from vlscale.tasks.inference import run_inference

    with terminal.progress() as on_progress:
        report = run_inference(
            source, height=height, width=width, tokens=tokens, batch=batch, repeats=repeats, on_progress=on_progress
        )
    terminal.print_rich(_stage_table(report))
    terminal.print_table("measured", _conditions(report))
    if out is not None:
        report.write(out)
        print(out)


def _stage_table(report: InferenceReport) -> Table:
    from rich.table import Table

    table = Table("stage", title=f"{report.recipe}, milliseconds a pass", title_justify="left")
    for name in ("median", "lowest – highest", "share"):
        table.add_column(name, justify="right")
    for stage in report.stages:
        table.add_row(stage.name, *_milliseconds(stage.ms), f"{100 * stage.share:.1f} %")
    table.add_section()
    table.add_row("total", *_milliseconds(report.total), "")
    return table


def _conditions(report: InferenceReport) -> list[tuple[str, str | int]]:
    """What was measured, for a table of names and values."""
    seen, asked = (f"{height} × {width}" for height, width in (report.seen_size, report.asked_size))
    return [
        ("weights", report.weights),
        ("image", seen if seen == asked else f"{seen}, asked for {asked}"),
        ("visual tokens", report.visual_tokens),
        ("text tokens", report.text_tokens),
        ("pairs in a pass", report.batch),
        ("passes", report.repeats),
        ("device", report.device),
        ("CPU threads", report.threads),
        ("precision", report.precision),
    ]


def _milliseconds(ms: Spread) -> tuple[str, str]:
    return f"{ms.median:.2f}", f"{ms.lowest:.2f} – {ms.highest:.2f}"


def _check_folder(out: Path | None) -> None:
    """Before anything is measured.

    Raises:
        UserError: the folder of `--out` does not exist.
    """
    from vlscale.errors import UserError

    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or choose another file")


def _table(report: Report) -> Table:
    from rich.table import Table

    title = f"CPU time on one thread, {report.images} images → {report.size} × {report.size}, {report.rounds} rounds"
    table = Table("", "", "ALBEF's way", "vlscale", "ratio", title=title, title_justify="left")
    for row in report.pictures:
        table.add_row(row.what, row.how, *_sides(row, "images/s"))
    table.add_row(report.captions.what, report.captions.how, *_sides(report.captions, "captions/s"))
    normalise = f"{report.normalize_ms.median:.3f} ms"
    table.add_row("normalise", f"a batch, on {report.normalize_device}", "in the above", normalise, "")
    return table


def _sides(row: Comparison, unit: str) -> tuple[str, str, str]:
    ratio = row.ratio
    return (
        _cost(row.theirs, unit),
        _cost(row.ours, unit),
        f"{ratio.median:.2f} × ({ratio.lowest:.2f}–{ratio.highest:.2f})",
    )


def _cost(cost: Spread, unit: str) -> str:
    return f"{cost.median:.3f} ms ({cost.lowest:.3f}–{cost.highest:.3f}), {1000 / cost.median:,.0f} {unit}"
