"""Several runs beside one another: curves of their training, validation by epoch, and what was evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from vlscale.errors import UserError
from vlscale.inspect import html
from vlscale.inspect.boxes import COLOURS
from vlscale.inspect.charts import rgb
from vlscale.inspect.curves import curve_chart, epoch_chart, last_value
from vlscale.inspect.folders import replaced
from vlscale.inspect.run_log import RunLog, read_run, with_own_names
from vlscale.interop.layout import write_text

PAGE = "index.html"
TOGETHER = (
    "rerank",
    "resolution",
    "split",
    "split_hash",
    "images",
    "captions",
    "examples",
    "tuned_on",
    "max_tokens",
    "score",
)
"""Keys of the protocol cards in which two results have to agree before their numbers can be compared."""
MIXED = frozenset({"objectives"})
"""Evaluations some of whose metrics are better the lower they are."""

Row = tuple[str, list[str]]
"""A name and a cell per run."""


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of the table."""

    title: str
    rows: list[Row]
    highest: bool = False
    """Whether the highest number of a row is the best one."""
    warning: str = ""


def compare_runs(runs: Sequence[Path], out: Path, window: int | None = None) -> tuple[Path, Table]:
    """Write a page of curves and tables into the folder `out`; returns it, and the tables for the terminal.

    Args:
        runs: two or more run folders, finished or not.
        window: steps that curves are smoothed over; default a fortieth of each.

    Raises:
        UserError: fewer than two runs, a folder without a run or without a logged step, or an `out` that holds
            something else.
    """
    if len(runs) < 2:
        raise UserError("compare: give two or more run folders")
    logs = [read_run(run) for run in runs]
    with_own_names(logs, runs)
    sections = sections_of(logs, window)
    with replaced(out, PAGE) as new:
        write_text(new / PAGE, _page(logs, sections, window, new))
    return out / PAGE, as_table(logs, sections)


def sections_of(logs: Sequence[RunLog], window: int | None) -> list[Section]:
    """What the tables say: facts, the losses at the end, the best epoch, and every evaluation that a run has."""
    sections = [Section("run", _facts(logs)), Section("at the end, smoothed", _ends(logs, window))]
    if any(log.best for log in logs):
        names = _in_order(name for log in logs for name in log.best if name != "step")
        rows = [(name, [_number(log.best.get(name)) for log in logs]) for name in names]
        sections.append(Section("best epoch on the validation split", rows))
    for task in _in_order(task for log in logs for task in log.evaluations):
        results = [log.evaluations.get(task) for log in logs]
        flat = [{} if result is None else _metrics(result) for result in results]
        rows = [(name, [_number(own.get(name)) for own in flat]) for name in _in_order(n for own in flat for n in own)]
        cards = [result["protocol"] for result in results if result is not None]
        sections.append(Section(f"eval {task}", rows, task not in MIXED, _disagreement(cards)))
    return [section for section in sections if section.rows]


def as_table(logs: Sequence[RunLog], sections: Sequence[Section]) -> Table:
    """For the terminal; the best numbers are bold."""
    table = Table(title="Runs", title_justify="left")
    table.add_column()
    for log in logs:
        table.add_column(escape_markup(log.name), justify="right", overflow="fold")
    for section in sections:
        table.add_section()
        table.add_row(f"[bold]{escape_markup(section.title)}[/]")
        for name, cells in section.rows:
            shown = _marked(section, cells, lambda cell: f"[bold]{cell}[/]", escape_markup)
            table.add_row(f"  {escape_markup(name)}", *shown)
        if section.warning:
            table.add_row(f"  [yellow]{escape_markup(section.warning)}[/]")
    return table


def _page(logs: Sequence[RunLog], sections: Sequence[Section], window: int | None, folder: Path) -> str:
    """The page; its pictures are drawn into `folder`."""
    parts = [f"<h1>{escape(', '.join(log.name for log in logs))}</h1>"]
    parts.append(
        '<p class="faint">Curves are centred means over the steps, what they were made of behind them; '
        "first steps that lie far off are cut away.</p>"
    )
    losses, others, alone = curves_of(logs)
    colours = [rgb(COLOURS[place % len(COLOURS)]) for place in range(len(logs))]
    staged = "Dotted: where a run’s next stage begins." if any(log.begins for log in logs) else ""
    for file, title, names in (("losses.png", "Losses", losses), ("metrics.png", "Rates and metrics", others)):
        if names:
            curve_chart(names, logs, colours, window, folder / file)
            parts += [f"<h2>{title}</h2>", html.figure(file, staged, title)]
    if alone:
        parts.append(f'<p class="faint">Of one run alone, not drawn: {escape(", ".join(alone))}.</p>')
    judged = _in_order(name for log in logs for row in log.epochs for name in row if name not in ("step", "epoch"))
    if judged:
        epoch_chart(judged, logs, colours, folder / "validation.png")
        title = "Validation by epoch"
        parts += [f"<h2>{title}</h2>", html.figure("validation.png", "Ringed: the epoch that is kept.", title)]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        rows = [
            [escape(name), *_marked(section, cells, lambda cell: f"<b>{cell}</b>", escape)]
            for name, cells in section.rows
        ]
        parts.append(html.table(["", *(log.name for log in logs)], rows, [False, *[True] * len(logs)]))
        if section.warning:
            parts.append(f"<p><b>{escape(section.warning)}</b></p>")
    return html.document("Runs compared", parts)


def curves_of(logs: Sequence[RunLog]) -> tuple[list[str], list[str], list[str]]:
    """Names of the losses, of other curves that two runs or more share, and of those that only one has."""
    known = ["loss", *_in_order(name for log in logs for name in log.losses)]
    losses = [name for name in known if any(name in log.curves for log in logs)]
    counts = {
        name: sum(name in log.curves for log in logs) for name in _in_order(n for log in logs for n in log.curves)
    }
    rest = {name: count for name, count in counts.items() if name not in losses}
    shared = sorted(
        (name for name, count in rest.items() if count > 1), key=lambda name: (not name.startswith("lr"), name)
    )
    return losses, shared, sorted(name for name, count in rest.items() if count == 1)


def _facts(logs: Sequence[RunLog]) -> list[Row]:
    def row(name: str, value: Callable[[RunLog], str]) -> Row:
        return name, [value(log) for log in logs]

    return [
        row("recipe", lambda log: log.recipe.name),
        row("system", lambda log: log.recipe.system.name),
        row("task", lambda log: "pre-training" if log.recipe.task is None else log.recipe.task.name),
        row("steps", lambda log: f"{log.steps:,}"),
        row("batch", lambda log: f"{log.recipe.train.global_batch:,}"),
        row("seed", lambda log: str(log.recipe.train.seed)),
        row("seconds of the steps", lambda log: "" if log.seconds is None else f"{log.seconds:,.0f}"),
        row("weights", lambda log: "" if log.weights is None else f"{log.weights / 1e6:,.1f} M"),
    ]


def _ends(logs: Sequence[RunLog], window: int | None) -> list[Row]:
    losses, _, _ = curves_of(logs)
    return [
        (
            name,
            [_number(last_value(log.curves[name], log.begins, window)) if name in log.curves else "" for log in logs],
        )
        for name in losses
    ]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Of a result file, with the mean of its folds."""
    folds = result.get("folds")
    more = {} if folds is None else {f"{name}, folds of {folds['images']}": v for name, v in folds["metrics"].items()}
    return {**result["metrics"], **more}


def _disagreement(cards: Sequence[dict[str, Any]]) -> str:
    """In what the results were not measured alike; empty where in nothing."""
    different = [key for key in TOGETHER if len({str(card.get(key)) for card in cards}) > 1]
    return f"not measured alike: {', '.join(different)} differ" if different else ""


def _marked(
    section: Section, cells: Sequence[str], mark: Callable[[str], str], escaped: Callable[[str], str]
) -> list[str]:
    """Cells, the highest of several numbers marked where that is the best."""
    if not section.highest:
        return [escaped(cell) for cell in cells]
    values = [float(cell.replace(",", "")) if cell else math.nan for cell in cells]
    known = {value for value in values if math.isfinite(value)}
    best = max(known) if len(known) > 1 else None
    return [mark(escaped(cell)) if value == best else escaped(cell) for cell, value in zip(cells, values, strict=True)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _in_order(names: Any) -> list[str]:
    """Each once, as they come."""
    return list(dict.fromkeys(names))
