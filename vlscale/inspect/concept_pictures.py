"""Pictures of concepts: the map by kind, the map by object, and the most frequent phrases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vlscale.inspect import pictures
from vlscale.inspect.charts import new_figure, plain, rgb, save_figure
from vlscale.inspect.concept_places import AroundTag
from vlscale.inspect.concept_table import KINDS, Concept, ConceptTable, Kind
from vlscale.inspect.palette import distinct_colours

COLOURS: dict[Kind, str] = {"tag": "#1f4e9c", "attribute": "#e08214", "relation": "#3a9a5b"}
MARKS: dict[Kind, str] = {"tag": "^", "attribute": "o", "relation": "s"}
SIZES: dict[Kind, float] = {"tag": 60, "attribute": 16, "relation": 16}
INCHES = 10.0


def draw_kinds(
    concepts: Sequence[Concept], places: np.ndarray, labels: Sequence[int], title: str, path: Path
) -> list[int]:
    """The map coloured by kind, phrases joined with the tags that they are about.

    Args:
        places: [N, 2].
        labels: which to name, the most important first; where names would cover one another the later is left out.

    Returns:
        Those that are named.
    """
    figure, axes = _map(title)
    tags = {concept.name: row for row, concept in enumerate(concepts) if concept.kind == "tag"}
    for row, concept in enumerate(concepts):
        for name in concept.objects:
            if concept.kind != "tag" and name in tags:
                axes.plot(*places[[row, tags[name]]].T, color="#9aa5b1", linewidth=0.4, alpha=0.35, zorder=1)
    for kind in KINDS:
        rows = [row for row, concept in enumerate(concepts) if concept.kind == kind]
        if rows:
            name = f"{kind}s ({len(rows)})" if kind == "tag" else f"{kind} phrases ({len(rows)})"
            _scatter(axes, places[rows], kind, COLOURS[kind], name)
    axes.legend(loc="best", fontsize=9)
    named = _name(figure, axes, concepts, places, labels)
    save_figure(figure, path)
    return named


def draw_objects(
    concepts: Sequence[Concept], places: np.ndarray, around: Sequence[AroundTag], title: str, path: Path
) -> None:
    """The map coloured by what phrases are about, as in the paper; rows of `around` are those of `concepts`."""
    figure, axes = _map(title)
    axes.scatter(places[:, 0], places[:, 1], s=6, color="#d5dae0", zorder=1)
    colours = distinct_colours(len(around)) / 255
    for one, colour in zip(around, colours, strict=True):
        for kind in KINDS[1:]:
            rows = [row for row in one.phrases if concepts[row].kind == kind]
            _scatter(axes, places[rows], kind, tuple(colour), None)
    for one, colour in zip(around, colours, strict=True):
        _scatter(axes, places[[one.tag]], "tag", tuple(colour), f"{plain(concepts[one.tag].name)} ({len(one.phrases)})")
    axes.legend(loc="best", fontsize=9, title="tag (phrases about it)")
    _name(figure, axes, concepts, places, [one.tag for one in around])
    save_figure(figure, path)


def draw_frequent(table: ConceptTable, title: str, path: Path) -> None:
    """Attributes and relations that most texts of the data have."""
    longest = max((len(found) for found in table.frequent.values()), default=0)
    figure = new_figure(11.0, 1.1 + 0.26 * max(2, longest))
    figure.suptitle(title, fontsize=9, color=rgb(pictures.FAINT))
    for axes, (kind, found) in zip(figure.subplots(1, 2), table.frequent.items(), strict=True):
        names = [plain(name) for name, _ in found]
        axes.barh(range(len(found)), [count for _, count in found], color=COLOURS[kind])
        axes.set_yticks(range(len(found)), names, fontsize=9)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlabel("texts")
        axes.set_title(f"{kind}s", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _map(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(INCHES, INCHES)
    axes = figure.subplots()
    axes.set_title(title, fontsize=9, color=rgb(pictures.FAINT))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#d5dae0")
    return figure, axes


def _scatter(axes: Axes, places: np.ndarray, kind: Kind, colour: str | tuple[float, ...], label: str | None) -> None:
    edge = "white" if kind == "tag" else "none"
    axes.scatter(
        places[:, 0],
        places[:, 1],
        s=SIZES[kind],
        marker=MARKS[kind],
        color=[colour],
        edgecolors=edge,
        linewidths=0.6,
        label=label,
        zorder=3 if kind == "tag" else 2,
    )


def _name(
    figure: Figure, axes: Axes, concepts: Sequence[Concept], places: np.ndarray, labels: Sequence[int]
) -> list[int]:
    """Write names beside their places, as long as they cover no other name."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    figure.draw_without_rendering()  # places in pixels are known only then
    taken: list[Bbox] = []
    named: list[int] = []
    for row in labels:
        tag = concepts[row].kind == "tag"
        text = axes.annotate(
            plain(concepts[row].name),
            tuple(places[row].tolist()),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=10 if tag else 7.5,
            fontweight="bold" if tag else "normal",
            color=COLOURS[concepts[row].kind] if tag else rgb(pictures.INK),
            zorder=4,
        )
        extent = text.get_window_extent(canvas.get_renderer())
        if any(extent.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(extent)
            named.append(row)
    return named
