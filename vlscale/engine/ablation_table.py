"""What an ablation found: rows × metrics, mean ± sample standard deviation over the seeds that are there."""

from __future__ import annotations

import json
import os
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from vlscale.engine.ablation import FINISHED, RETRIEVAL, Plan, Row, Run, require_same
from vlscale.interop import layout

JSON_NAME = "ablation.json"
MARKDOWN_NAME = "ablation.md"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run."""

    seed: int
    train_seed: int
    steps: int
    seconds: float
    """Of the training steps."""
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The finished runs of a row."""

    row: Row
    runs: tuple[Outcome, ...]

    def values(self, metric: str) -> list[float]:
        """One value per seed; none where the metric does not exist, as the first stage where ITC has weight 0."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def mean(self, metric: str) -> float | None:
        """None without a value."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Sample standard deviation (n − 1); None below two values."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


def collect(plan: Plan) -> list[RowOutcome]:
    """All finished runs in the folder, of every row and seed.

    Raises:
        UserError: one was made by another recipe than its row now means.
    """
    return [RowOutcome(row, tuple(_outcomes(plan, row))) for row in plan.file.rows]


def write(plan: Plan, rows: list[RowOutcome]) -> None:
    """Write OUT/ablation.json and OUT/ablation.md."""
    plan.out.mkdir(parents=True, exist_ok=True)
    summary = json.dumps(as_json(plan, rows), indent=2, ensure_ascii=False) + "\n"
    for name, text in ((JSON_NAME, summary), (MARKDOWN_NAME, as_markdown(plan, rows))):
        # Under a name of its own first: the tasks of a job array write the same table.
        own = plan.out / f".{name}.{socket.gethostname()}-{os.getpid()}"
        layout.write_text(own, text)
        os.replace(own, plan.out / name)


def as_json(plan: Plan, rows: list[RowOutcome]) -> dict[str, Any]:
    """Everything that the table was made from, and more metrics than it shows."""
    return {
        "title": plan.file.title,
        "rows_file": plan.file.source,
        "recipe": plan.base.name,
        "overrides": list(plan.common),
        "seeds": plan.seeds,
        "evaluations": list(plan.file.tasks),
        "columns": list(plan.file.metrics),
        "rows": [_row_json(row) for row in rows],
    }


def as_markdown(plan: Plan, rows: list[RowOutcome]) -> str:
    """The table as Markdown."""
    lines = [f"# {plan.file.title}", "", f"{caption(plan, rows)}.", ""]
    lines.append(_markdown_row(["", *plan.file.metrics]))
    lines.append("| --- |" + " ---: |" * len(plan.file.metrics))
    lines += [_markdown_row(cells) for cells in _cells(plan, rows)]
    return "\n".join(lines) + "\n"


def as_table(plan: Plan, rows: list[RowOutcome]) -> Table:
    """The table for the terminal."""
    table = Table(title=escape(plan.file.title), title_justify="left", caption=escape(caption(plan, rows)))
    table.add_column()
    for metric in plan.file.metrics:
        table.add_column(metric, justify="right")
    for cells in _cells(plan, rows):
        table.add_row(*map(escape, cells))
    return table


def caption(plan: Plan, rows: list[RowOutcome]) -> str:
    """Recipe, steps (all that occur, where rows differ) and seeds."""
    steps = {run.steps for row in rows for run in row.runs}
    length = " or ".join(f"{count:,}" for count in sorted(steps)) if steps else "no"
    seeds = f"{plan.seeds} seeds: mean ± sample standard deviation" if plan.seeds > 1 else "one seed"
    return f"{plan.base.name}, {length} steps, {seeds}, recalls in %"


def _outcomes(plan: Plan, row: Row) -> Iterator[Outcome]:
    for run in plan.known_runs(row):
        require_same(run)
        if run.finished:
            yield _read(run)


def _read(run: Run) -> Outcome:
    steps = 0
    metrics: dict[str, float] = {}
    for task in run.tasks:
        result = json.loads(run.result(task).read_text(encoding="utf-8"))
        prefix = "" if task == RETRIEVAL else f"{task}."
        metrics |= {f"{prefix}{name}": value for name, value in result["metrics"].items()}
        steps = result["protocol"]["step"]
    seconds = json.loads((run.folder / FINISHED).read_text(encoding="utf-8"))["train_seconds"]
    return Outcome(run.seed, run.recipe.train.seed, steps, seconds, metrics)


def _row_json(row: RowOutcome) -> dict[str, Any]:
    names = list(dict.fromkeys(name for run in row.runs for name in run.metrics))

    def by_name(function: Callable[[str], float | None]) -> dict[str, float | None]:
        return {name: function(name) for name in names}

    return {
        "name": row.row.name,
        "folder": row.row.folder,
        "overrides": list(row.row.overrides),
        "n": len(row.runs),
        "mean": by_name(row.mean),
        "std": by_name(row.deviation),
        "runs": [asdict(run) for run in row.runs],
    }


def _cells(plan: Plan, rows: list[RowOutcome]) -> Iterator[list[str]]:
    """Name, with the number of seeds unless all are there, and a cell per metric."""
    for row in rows:
        found = len(row.runs)
        note = "" if found == plan.seeds else f" ({found} of {plan.seeds} seeds)"
        if found > plan.seeds:
            note = f" ({found} seeds)"
        yield [row.row.name + note, *(_cell(row, metric) for metric in plan.file.metrics)]


def _cell(row: RowOutcome, metric: str) -> str:
    mean, deviation = row.mean(metric), row.deviation(metric)
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
