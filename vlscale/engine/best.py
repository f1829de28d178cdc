"""Which epoch of a fine-tuning was the best on the validation split: `best.json` in the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlscale.errors import UserError
from vlscale.interop import layout


def forget_after(run: Path, step: int) -> None:
    """Drop what was measured after `step`: a run that goes on from there measures it again."""
    path = run / layout.BEST
    if path.is_file():
        content = _read(path)
        _write(path, content["metric"], [row for row in content["epochs"] if row["step"] <= step])


def knows(run: Path, step: int) -> bool:
    """Whether the epoch that ended with this step was judged."""
    path = run / layout.BEST
    return path.is_file() and any(row["step"] == step for row in _read(path)["epochs"])


def record(run: Path, metric: str, step: int, epoch: float, metrics: Mapping[str, float]) -> bool:
    """Note an epoch's validation metrics; returns whether it is the best one so far. Of equal ones the first counts.

    Raises:
        UserError: the metric is not among them.
    """
    if metric not in metrics:
        raise UserError(f"task.best: no {metric!r} among the metrics; there are {', '.join(sorted(metrics))}")
    path = run / layout.BEST
    rows = _read(path)["epochs"] if path.is_file() else []
    rows = [*(row for row in rows if row["step"] != step), {"step": step, "epoch": epoch, **metrics}]
    return _write(path, metric, rows)["step"] == step


def _write(path: Path, metric: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if not math.isnan(row[metric])] or rows
    best = max(known, key=lambda row: row[metric]) if known else {"step": -1}
    layout.write_json(path, {"metric": metric, "best": best, "epochs": rows})
    return best


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
