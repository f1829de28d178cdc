"""Tables for people. rich is imported when something is printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.config import Recipe


def print_table(title: str, rows: Iterable[tuple[str, Any]], columns: tuple[str, str] = ("", "")) -> None:
    """Print a table of two columns, the second one formatted by `format_value`."""
    from rich.console import Console

    Console().print(_table(title, rows, columns))


def print_description(description: Mapping[str, Any]) -> None:
    """Print what `--dry-run` found: one table per section, plain values first."""
    from rich.console import Console

    console = Console()
    plain = [(key, value) for key, value in description.items() if not isinstance(value, Mapping)]
    if plain:
        console.print(_table("run", plain))
    for key, section in description.items():
        if isinstance(section, Mapping):
            console.print(_table(key.replace("_", " "), section.items()))


def print_result(path: Path) -> None:
    """Print a result file: its metrics, the protocol they were measured by, and where it lies."""
    result = json.loads(path.read_text(encoding="utf-8"))
    print_table(result["task"], result["metrics"].items())
    if "protocol" in result:
        print_table("protocol", result["protocol"].items())
    print(path)


def print_recipe(recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, unwrapped, so that it can be saved and used as a recipe."""
    import yaml

    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")


def format_value(value: Any) -> str:
    """Integers with thousands' commas, floats with four digits, lists joined, the rest as it is."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(format_value(item) for item in value)
        case Mapping():
            return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
        case None:
            return "–"
    return str(value)


def _table(title: str, rows: Iterable[tuple[str, Any]], columns: tuple[str, str] = ("", "")) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    numeric = []
    cells = []
    for key, value in rows:
        numeric.append(isinstance(value, int | float))
        cells.append((escape(str(key).replace("_", " ")), escape(format_value(value))))
    table.add_column(columns[0], no_wrap=True)
    table.add_column(columns[1], justify="right" if all(numeric) else "left", overflow="fold")
    for cell in cells:
        table.add_row(*cell)
    return table


def print_page(page: Path) -> None:
    """Say where a page lies that a browser opens from disk."""
    print(page)
