"""What a run folder tells without loading the system: curves of training, validation by epoch, evaluations, size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vlscale.config import LOSSES, Recipe, load_recipe
from vlscale.config.tasks import loss_names
from vlscale.errors import UserError
from vlscale.interop import layout

BOOKKEEPING = frozenset({"step", "epoch", "skipped_images", "skipped_steps", "loss_scale"})
"""Columns of the metrics that are no curves."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over the steps of a run; both [n] float64."""

    steps: np.ndarray
    values: np.ndarray
    """NaN where a step's value was not finite."""


@dataclass(slots=True)
class RunLog:
    """One run."""

    name: str
    recipe: Recipe
    curves: dict[str, Curve]
    """By column of metrics.jsonl; a run in stages has those of all of them behind one another."""
    begins: list[int]
    """Steps at which a later stage begins."""
    steps: int
    seconds: float | None
    """Of the steps; None where no row tells the images per second."""
    weights: int | None
    """Numbers in the newest checkpoint's model.safetensors; None where there is none."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics of a fine-tuning, with `step` and `epoch`."""
    best: dict[str, float] = field(default_factory=dict)
    """The best of these; with its `step` and `epoch`."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Result files by name of the task; those of another form are left out."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that the recipe's system, or task, can have."""
        own = LOSSES[self.recipe.system.name]
        return own if self.recipe.task is None else loss_names(self.recipe.task, own)


def read_run(folder: Path) -> RunLog:
    """Read a run folder, finished or not.

    Raises:
        UserError: it holds no run, or no step of it was logged.
    """
    if not (folder / layout.RECIPE).is_file():
        raise UserError(f"{folder}: no {layout.RECIPE} in it; expected a run folder (runs/NAME)")
    recipe = load_recipe(str(folder / layout.RECIPE))
    parts = [_rows(stage / layout.METRICS_JSONL) for stage in (*_earlier_stages(folder), folder)]
    if not any(parts):
        raise UserError(f"{folder}: no step was logged yet, {layout.METRICS_JSONL} is missing or empty")
    offsets = np.cumsum([0, *(int(rows[-1]["step"]) if rows else 0 for rows in parts)]).tolist()
    rows = [{**row, "step": row["step"] + offset} for part, offset in zip(parts, offsets, strict=False) for row in part]
    log = RunLog(
        name=folder.resolve().name,
        recipe=recipe,
        curves=_curves(rows),
        begins=[offset for offset in offsets[1:-1] if offset],
        steps=offsets[-1],
        seconds=_seconds(rows, recipe.train.global_batch),
        weights=_weights(folder),
        evaluations=_evaluations(folder / "eval"),
    )
    if (folder / layout.BEST).is_file():
        best = json.loads((folder / layout.BEST).read_text(encoding="utf-8"))
        log.epochs, log.best = best["epochs"], best["best"]
    return log


def with_own_names(logs: Sequence[RunLog], folders: Sequence[Path]) -> None:
    """Give runs whose folders have the same name as much of their paths as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    for log, name in zip(logs, names, strict=True):
        log.name = name


def _earlier_stages(folder: Path) -> list[Path]:
    found = [
        (int(entry.name.removeprefix("stage-")), entry) for entry in folder.glob("stage-*") if entry.name[6:].isdigit()
    ]
    return [entry for _, entry in sorted(found)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a run that is being trained may just be writing the last one."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for row in rows for name in row if name not in BOOKKEEPING)
    curves = {}
    for name in names:
        there = [(row["step"], math.nan if row[name] is None else row[name]) for row in rows if name in row]
        steps, values = np.array(there, dtype=np.float64).T
        curves[name] = Curve(steps, values)
    return curves


def _seconds(rows: Sequence[dict[str, Any]], global_batch: int) -> float | None:
    rates = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    return sum(global_batch / rate for rate in rates) if rates else None


def _weights(folder: Path) -> int | None:
    """From the file's header alone."""
    checkpoints = layout.complete_checkpoints(folder)
    if not checkpoints:
        return None
    try:
        with safe_open(checkpoints[-1] / layout.MODEL, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and {"metrics", "protocol"} <= content.keys():
            found[path.stem] = content
    return found
