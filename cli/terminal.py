"""Tables and progress for people. rich is imported when something is printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.config import Recipe

PLAIN_SECONDS = 15.0
"""Between two lines of progress in a log."""


def print_table(title: str, *sections: Iterable[tuple[str, Any]]) -> None:
    """Print a table of names and values, with a line between sections."""
    print_rich(_table(title, *sections))


def print_rich(table: Table) -> None:
    """Print a table that someone else made."""
    from rich.console import Console

    # A log has no width: rich would take 80 columns and break paths.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_description(description: Mapping[str, Any]) -> None:
    """Print what `--dry-run` found: single values first, then one table per section."""
    single = [(key, value) for key, value in description.items() if not isinstance(value, Mapping)]
    if single:
        print_table("run", single)
    for key, section in description.items():
        if isinstance(section, Mapping):
            print_table(key, section.items())


def print_result(path: Path, asked_split: str | None, table: Table | None = None) -> None:
    """Print a result file: its metrics (or a better table of them), how they were measured, and where it lies."""
    result = json.loads(path.read_text(encoding="utf-8"))
    print_rich(table or _table(result["task"], result["metrics"].items()))
    print_table("protocol", result["protocol"].items())
    taken = result["protocol"]["split"]
    if asked_split is None and taken != "test":
        print(f"the data has no split test: took {taken}")
    print(path)


def print_recipe(recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, unwrapped, so that it can be saved and used as a recipe."""
    import yaml

    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on stderr while the block runs; gives `report(stage, done, total)`.

    Where stderr is no terminal, a plain line every PLAIN_SECONDS.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines()
        return
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def note(line: str) -> None:
    """Print a line on stderr at once; above the bars while `progress` shows some."""
    print(line, file=sys.stderr, flush=True)


def _plain_lines() -> Callable[[str, int, int], None]:
    """Reports that print now and then; the first line comes late, so that what is short stays silent."""
    last = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            print(f"{stage}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return report


def format_value(value: Any) -> str:
    """Integers with thousands' commas, floats with four digits, lists joined, the rest as it is."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(format_value(item) for item in value)
        case Mapping():
            return "\n".join(f"{key}: {format_value(item)}" for key, item in value.items())
        case None:
            return "–"
    return str(value)


def _table(title: str, *sections: Iterable[tuple[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title.replace("_", " "), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for rows in sections:
        for key, value in rows:
            table.add_row(escape(str(key)), escape(format_value(value)))
        table.add_section()
    return table
