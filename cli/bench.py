"""`vlscale bench`: how fast vlscale's parts are here, against what people use instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.data.bench import Comparison, Report, Spread

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Keeps `data` a command of its own while it is the only one."""


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
    from vlscale.errors import UserError

    from . import terminal

    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or choose another file")
    with terminal.progress() as on_progress:
        report = bench_data(data, size=size, images=images, rounds=rounds, on_progress=on_progress)
    terminal.print_rich(_table(report))
    for kind, levels in report.largest_difference.items():
        print(f"{kind}: crop and resize differ from Pillow's by {levels} grey levels at most")
    if out is not None:
        report.write(out)
        print(out)


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
