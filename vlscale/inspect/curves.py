"""Curves of several runs in one figure: smoothed, what they were made of in the background."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlscale.inspect.charts import new_figure, plain, save_figure
from vlscale.inspect.run_log import Curve, RunLog

COLUMNS = 3
PANEL = (4.2, 2.7)
"""Inches."""
WINDOWS = 40
"""So many windows of smoothing fit beside one another into a curve, where nobody chooses."""
POINTS = 1500
"""Of a raw curve, at most."""
RAW, STAGE = 0.22, "#9aa3ad"
BEGINNING = 0.05
"""Share of the steps whose values may lie outside the panel …"""
FAR = 3.0
"""… where with them it would be so many times as high."""


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of `window` values, fewer at the ends; values that are not finite don't count. [n] → [n]."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    places = np.arange(len(values))
    first = np.maximum(places - (window - 1) // 2, 0)
    last = np.minimum(places + window // 2 + 1, len(values))
    count = counts[last] - counts[first]
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def window_of(curve: Curve, asked: int | None) -> int:
    """Values that are averaged: as asked, else by the curve's length."""
    return asked or max(1, len(curve.values) // WINDOWS)


def stages_of(curve: Curve, begins: Sequence[int]) -> list[Curve]:
    """The curve cut where a run's later stages begin, since what it measures is another there; none is empty."""
    places = np.searchsorted(curve.steps, begins, side="right")
    parts = zip(np.split(curve.steps, places), np.split(curve.values, places), strict=True)
    return [Curve(*part) for part in parts if len(part[0])]


def last_value(curve: Curve, begins: Sequence[int] = (), window: int | None = None) -> float:
    """Of the smoothed curve, in its last stage."""
    last = stages_of(curve, begins)[-1]
    return float(smooth(last.values, window_of(last, window))[-1])


def limits_of(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Bottom and top of a panel that the first steps would squeeze flat; None where they don't."""
    last = max((curve.steps[-1] for curve in curves), default=0)
    every = np.concatenate([curve.values for curve in curves] or [np.empty(0)])
    later = np.concatenate([curve.values[curve.steps > BEGINNING * last] for curve in curves] or [np.empty(0)])
    every, later = every[np.isfinite(every)], later[np.isfinite(later)]
    if not later.size or np.ptp(later) == 0 or np.ptp(every) <= FAR * np.ptp(later):
        return None
    room = 0.2 * float(np.ptp(later))
    return float(later.min()) - room, float(later.max()) + room


def curve_chart(
    names: Sequence[str],
    logs: Sequence[RunLog],
    colours: Sequence[tuple[float, float, float]],
    window: int | None,
    path: Path,
) -> None:
    """A panel per name; in each the runs that have such a curve, in their colours. Dotted lines are where a run's next
    stage begins; first steps that lie far off are cut away."""
    rows = math.ceil(len(names) / COLUMNS)
    figure = new_figure(PANEL[0] * min(COLUMNS, len(names)), PANEL[1] * rows + 0.4)
    panels = figure.subplots(rows, min(COLUMNS, len(names)), squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        shown: list[Curve] = []
        for log, colour in zip(logs, colours, strict=True):
            if name not in log.curves:
                continue
            for place, part in enumerate(stages_of(log.curves[name], log.begins)):
                width = window_of(part, window)
                if width > 1:
                    every = max(1, len(part.steps) // POINTS)
                    axes.plot(part.steps[::every], part.values[::every], color=colour, alpha=RAW, linewidth=0.7)
                label = plain(log.name) if place == 0 else None
                shown.append(Curve(part.steps, smooth(part.values, width)))
                axes.plot(part.steps, shown[-1].values, color=colour, linewidth=1.5, label=label)
            for begin in log.begins:
                axes.axvline(begin, color=STAGE, linestyle=":", linewidth=1.0)
        if limits := limits_of(shown):
            axes.set_ylim(*limits)
        axes.set_title(plain(name), fontsize=10)
        _plainly(axes)
    _finish(figure, list(panels), len(names), "steps")
    save_figure(figure, path)


def epoch_chart(
    names: Sequence[str], logs: Sequence[RunLog], colours: Sequence[tuple[float, float, float]], path: Path
) -> None:
    """Validation metrics by epoch, a panel each; the best epoch is a ring."""
    rows = math.ceil(len(names) / COLUMNS)
    figure = new_figure(PANEL[0] * min(COLUMNS, len(names)), PANEL[1] * rows + 0.4)
    panels = figure.subplots(rows, min(COLUMNS, len(names)), squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for log, colour in zip(logs, colours, strict=True):
            there = [(row["epoch"], row[name]) for row in log.epochs if name in row]
            if there:
                axes.plot(*zip(*there, strict=True), color=colour, marker="o", markersize=3.5, label=plain(log.name))
                if name in log.best:
                    axes.plot(
                        log.best["epoch"], log.best[name], "o", markersize=9, markeredgecolor=colour, fillstyle="none"
                    )
        axes.set_title(plain(name), fontsize=10)
        _plainly(axes)
    _finish(figure, list(panels), len(names), "epochs")
    save_figure(figure, path)


def _plainly(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _finish(figure: Figure, panels: Sequence[Axes], used: int, below: str) -> None:
    """One legend for all panels above them, what the lower ones count, and no axes where there is no panel."""
    handles: dict[str, Artist] = {}
    for axes in panels[:used]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        axes.set_xlabel(below, fontsize=8)
    for axes in panels[used:]:
        axes.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
