"""Charts of a codebook: usage, and where images and texts share it, transport plans and agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import NullFormatter

from vlscale.inspect.charts import new_figure, save_figure

PLAN_SIZE = (11.0, 6.0)
"""Inches of the picture of the plans."""
COLOURS = "viridis"
MAX_LABELS = 32
"""Codes up to which each gets its number on the axis."""


def usage_histogram(counts: np.ndarray, perplexity: float, path: Path) -> None:
    """Patches of every code, sorted, on a log scale; counts [K]."""
    figure = new_figure(9.0, 3.2)
    axes = figure.subplots()
    _draw_usage(axes, counts, perplexity)
    axes.set_xlabel("codes, most used first")
    axes.set_ylabel("patches")
    save_figure(figure, path)


def usage_chart(counts: dict[str, np.ndarray], perplexity: dict[str, float], path: Path) -> None:
    """Uses of every code, sorted, on a log scale, one panel per kind; counts [K] each."""
    figure = new_figure(11.0, 3.2)
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (kind, values) in zip(panels, counts.items(), strict=True):
        _draw_usage(axes, values, perplexity[kind])
        axes.set_xlabel(f"codes, those most used by {kind} first")
        axes.set_ylabel(kind)
    save_figure(figure, path)


def plan_chart(images: np.ndarray, texts: np.ndarray, codes: np.ndarray, path: Path) -> None:
    """Plans [G, C] of images and of their texts on one colour scale, codes [C]."""
    figure = new_figure(*PLAN_SIZE)
    panels = figure.subplots(1, 2, sharey=True)
    scale = PowerNorm(0.5, vmin=0, vmax=float(max(images.max(), texts.max())))  # small shares stay visible
    for axes, plan, kind in zip(panels, (images, texts), ("images", "their texts"), strict=True):
        drawn = axes.imshow(plan, cmap=COLOURS, norm=scale, aspect="auto", interpolation="nearest")
        axes.set_title(kind, fontsize=11)
        axes.set_xlabel("codes in use, similar ones side by side")
        _label(axes, codes, "x")
    panels[0].set_ylabel(f"{len(images)} pairs, by the code of the image")
    figure.colorbar(drawn, ax=panels, label="G · T", fraction=0.04, pad=0.02)
    save_figure(figure, path)


def agreement_chart(counts: np.ndarray, codes: np.ndarray, path: Path) -> None:
    """Pairs by the code of the image (rows) and of the text (columns); counts [C, C], codes [C]."""
    figure = new_figure(7.6, 6.4)
    axes = figure.subplots()
    scale = PowerNorm(0.5, vmin=0, vmax=float(max(1, counts.max())))
    drawn = axes.imshow(counts, cmap=COLOURS, norm=scale, interpolation="nearest")
    _label(axes, codes, "x")
    _label(axes, codes, "y")
    axes.set_xlabel("code of the text")
    axes.set_ylabel("code of the image")
    for row, column in np.argwhere(counts > 0):
        colour = "black" if scale(counts[row, column]) > 0.6 else "white"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(drawn, ax=axes, label="pairs", fraction=0.046, pad=0.02)
    save_figure(figure, path)


def _draw_usage(axes: Axes, counts: np.ndarray, perplexity: float) -> None:
    """Bars of the codes that are used, the range of those that are not, and the perplexity; counts [K]."""
    ordered = np.sort(counts)[::-1]
    size, used = len(ordered), int((ordered > 0).sum())
    axes.bar(np.arange(used), ordered[:used], width=1.0, color="#3b6ea5")
    if used < size:
        axes.axvspan(used - 0.5, size - 0.5, color="#f2c6c6", label=f"never chosen: {size - used}")
    axes.axvline(perplexity, color="#c2410c", linestyle="--", linewidth=1.2, label=f"perplexity: {perplexity:.1f}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # a single use is seen too
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(-0.5 - 0.01 * size, size - 0.5)  # nor does the axis cover the first bar
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", facecolor="white", framealpha=1.0, edgecolor="none")


def _label(axes: Axes, codes: np.ndarray, axis: Literal["x", "y"]) -> None:
    if len(codes) > MAX_LABELS:
        axes.set(**{f"{axis}ticks": []})
        return
    axes.set(**{f"{axis}ticks": range(len(codes)), f"{axis}ticklabels": codes})
    axes.tick_params(axis=axis, labelsize=7, rotation=90 if axis == "x" else 0)
