"""`vlscale compare`: runs beside one another, in curves and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN …", help="Run folders, finished or not.")],
    smooth: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Steps that curves are smoothed over; default: a fortieth of each."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("compare"),
) -> None:
    """Curves of RUNs in one page of pictures, and their results side by side."""
    from vlscale.inspect.compare import compare_runs

    page, table = compare_runs(runs, out, smooth)
    terminal.print_rich(table)
    print(page)
