"""What a run says: metrics.jsonl and metrics.csv with every step, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlscale.interop import layout

_PLAIN_LINES = 50
"""At most one line in so many steps (and at least twenty a run) where there is no terminal."""


class Monitor:
    """Rank 0's outputs; on other ranks nobody makes one."""

    def __init__(self, run: Path, total_steps: int, start_step: int, loss_names: Iterable[str]) -> None:
        self.run, self.total_steps = run, total_steps
        self.loss_names = tuple(loss_names)
        cut_back(run, start_step)
        self._jsonl = (run / layout.METRICS_JSONL).open("a", encoding="utf-8")
        self._csv = CsvLog(run / layout.METRICS_CSV)
        self._board = _tensorboard(run, start_step)
        self._bar = _Bar(total_steps, start_step) if sys.stderr.isatty() else None
        self._every = max(1, min(_PLAIN_LINES, total_steps // 20))

    def log(self, row: dict[str, float | int]) -> None:
        """One step: floats in full precision, non-finite ones as null (jsonl) and nan or inf (csv)."""
        self._jsonl.write(json.dumps({key: _json_value(value) for key, value in row.items()}) + "\n")
        self._jsonl.flush()
        self._csv.write(row)
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, int(row["step"]))
        if self._bar is not None:
            self._bar.update(row, self.loss_names)
        elif row["step"] in (1, self.total_steps) or row["step"] % self._every == 0:
            print(f"step {row['step']}/{self.total_steps}  {_summary(row, self.loss_names)}", flush=True)

    def say(self, message: str) -> None:
        """A line for people, above the bar."""
        if self._bar is not None:
            self._bar.print(message)
        else:
            print(message, flush=True)

    def note_skipped_images(self, step: int, names: Iterable[str]) -> None:
        """Name the unreadable images of a step in the run's list."""
        with (self.run / layout.SKIPPED_IMAGES).open("a", encoding="utf-8") as stream:
            stream.writelines(f"{step}\t{name}\n" for name in names)

    def close(self) -> None:
        """Flush and close everything."""
        self._jsonl.close()
        self._csv.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()


class CsvLog:
    """A csv whose columns may grow: the file is rewritten with blank cells when a new one appears."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                self.columns = next(csv.reader(stream), [])
        self._stream = path.open("a", newline="", encoding="utf-8")

    def write(self, row: dict[str, float | int]) -> None:
        """Append one row and flush it."""
        new = [key for key in row if key not in self.columns]
        if new:
            self._widen(new)
        csv.writer(self._stream, lineterminator="\n").writerow([_csv_value(row.get(key)) for key in self.columns])
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def _widen(self, new: list[str]) -> None:
        self._stream.close()
        with self.path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
        self.columns += new
        _write_csv(self.path, [self.columns, *([*row, *[""] * (len(self.columns) - len(row))] for row in rows)])
        self._stream = self.path.open("a", newline="", encoding="utf-8")


def cut_back(run: Path, step: int) -> None:
    """Drop what was logged after `step`, and a line that a kill cut in two."""
    jsonl = run / layout.METRICS_JSONL
    if jsonl.exists():
        lines = jsonl.read_text(encoding="utf-8").splitlines()
        layout.write_text(jsonl, "".join(f"{line}\n" for line in lines if _step_in_json(line) <= step))
    table = run / layout.METRICS_CSV
    if table.exists():
        with table.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        header = rows[0] if rows else []
        _write_csv(table, [header, *(row for row in rows[1:] if len(row) == len(header) and int(row[0]) <= step)])
    skipped = run / layout.SKIPPED_IMAGES
    if skipped.exists():
        lines = [line for line in skipped.read_text(encoding="utf-8").splitlines() if "\t" in line]
        layout.write_text(skipped, "".join(f"{line}\n" for line in lines if int(line.split("\t")[0]) <= step))


class _Bar:
    """rich progress: losses, images per second, time left."""

    def __init__(self, total: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[summary]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total, completed=start, summary="")
        self._progress.start()

    def update(self, row: dict[str, float | int], names: tuple[str, ...]) -> None:
        self._progress.update(self._task, completed=int(row["step"]), summary=_summary(row, names))

    def print(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _summary(row: dict[str, float | int], names: tuple[str, ...]) -> str:
    parts = [f"{name} {row[name]:.3f}" for name in ("loss", *names) if name in row]
    return "  ".join([*parts, f"{row['images_per_s']:.0f} images/s"])


def _tensorboard(run: Path, start_step: int) -> Any:
    """A writer when tensorboard is installed, else None."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    # Events of steps that are trained again are hidden, as the metrics are cut back.
    return SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(row for row in rows if row)
    os.replace(temporary, path)


def _step_in_json(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _json_value(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _csv_value(value: float | int | None) -> str:
    return "" if value is None else repr(value)
