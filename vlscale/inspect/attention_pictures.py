"""Attention of a pair as pictures: regions on the image, lines between two lists, a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle

from vlscale.inspect import pictures
from vlscale.inspect.charts import new_figure, plain, rgb, save_figure
from vlscale.inspect.concept_pairs import Attended, Pair
from vlscale.inspect.palette import distinct_colours

COLOURS = "YlOrRd"
MOST_REGIONS = 16
"""Regions in lists and matrices, those that get most; all are on the image."""
LABELLED = 2
"""Boxes of an image that say their share."""
COLUMNS = 3
PANEL = 3.6
"""Inches of a panel with an image."""
ROW = 0.34
"""Inches of a line of a list or matrix."""
THUMBNAIL = 40
"""Pixels of a region's picture in a list or matrix."""
LIGHTER = 0.55
"""How far images fade behind boxes."""


def draw_regions(pair: Pair, found: Attended, title: str, path: Path) -> None:
    """The regions, then what each phrase looks at; without phrases, each word."""
    asked, weights = pair.phrases, found.phrase_to_regions
    if not asked:
        asked, weights = pair.words, found.word_to_regions
    height, width = pair.pixels.shape[:2]
    panels = 1 + len(asked)
    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = new_figure(columns * PANEL, rows * (PANEL * min(1.6, height / width) + 0.5) + 0.3)
    figure.suptitle(title, fontsize=9, color=rgb(pictures.FAINT))
    spots = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in spots:
        axes.axis("off")
    _draw_numbers(spots[0], pair)
    for axes, thing, row in zip(spots[1:], asked, weights, strict=False):
        _draw_weights(axes, pair, row)
        axes.set_title(f"“{plain(thing.name)}”: {row.sum():.0%} to regions", fontsize=10)
    save_figure(figure, path)


def draw_lists(pair: Pair, found: Attended, title: str, path: Path) -> None:
    """Phrases with the words they look at, and regions with the tags they look at."""
    shown = most_seen(found)
    regions = found.region_to_tags[shown]
    lines = max(len(pair.phrases), len(pair.words), len(shown), len(pair.tags), 3)
    figure = new_figure(11.0, 0.9 + ROW * lines)
    figure.suptitle(title, fontsize=9, color=rgb(pictures.FAINT))
    left, right = figure.subplots(1, 2)
    words = [thing.name for thing in pair.words]
    colours = distinct_colours(max(len(pair.boxes), len(pair.phrases))) / 255
    _draw_lines(left, [thing.name for thing in pair.phrases], words, found.phrase_to_words, colours)
    left.set_title("phrase → word, textual encoder", fontsize=10)
    names = [_region_name(pair, index) for index in shown]
    _draw_lines(right, names, [thing.name for thing in pair.tags], regions, colours[shown])
    _draw_thumbnails(right, pair, shown, [(0.0, place) for place in _spread(len(shown))], figure)
    right.set_title("region → tag, visual encoder", fontsize=10)
    save_figure(figure, path)


def draw_matrix(pair: Pair, found: Attended, title: str, path: Path) -> None:
    """Phrases and words, and the share that each region gets of their attention."""
    shown = most_seen(found)
    weights = 100 * np.concatenate([found.phrase_to_regions, found.word_to_regions])[:, shown]
    names = [thing.name for thing in (*pair.phrases, *pair.words)]
    figure = new_figure(2.6 + 0.75 * max(4, len(shown)), 1.7 + 0.8 * ROW * len(names))
    figure.suptitle(title, fontsize=9, color=rgb(pictures.FAINT))
    axes = figure.subplots()
    scale = Normalize(0, max(1e-9, float(weights.max(initial=0))))
    axes.imshow(weights, cmap=COLOURS, norm=scale, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.set_xticks(range(len(shown)), [plain(_region_name(pair, index)).replace(" ", "\n") for index in shown])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    if pair.phrases:
        axes.axhline(len(pair.phrases) - 0.5, color="white", linewidth=3)
    for row, column in np.ndindex(weights.shape):
        colour = "white" if scale(weights[row, column]) > 0.6 else rgb(pictures.INK)
        axes.text(column, row, f"{weights[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title("phrases, then words → regions, multimodal encoder; per cent", fontsize=10, pad=THUMBNAIL + 6)
    above = [(float(column), -0.5) for column in range(len(shown))]
    _draw_thumbnails(axes, pair, shown, above, figure, (0.0, THUMBNAIL / 2 + 2))
    save_figure(figure, path)


def most_seen(found: Attended) -> list[int]:
    """The regions that words and phrases look at most, at most MOST_REGIONS, in their order."""
    sums = found.phrase_to_regions.sum(axis=0) + found.word_to_regions.sum(axis=0)
    return sorted(np.argsort(-sums, kind="stable")[:MOST_REGIONS].tolist())


def _draw_numbers(axes: Axes, pair: Pair) -> None:
    """The image with its regions, numbered from 1."""
    axes.imshow(pair.pixels)
    axes.set_title("regions", fontsize=10)
    for index, colour in enumerate(distinct_colours(len(pair.boxes)) / 255):
        left, top = _draw_box(axes, pair, index, tuple(colour), 1.6)
        _tab(axes, (left, top), str(index + 1), tuple(colour), "black")


def _draw_weights(axes: Axes, pair: Pair, weights: np.ndarray) -> None:
    """The image, faded, with its boxes the thicker and redder the more attention [R] they get."""
    axes.imshow((pair.pixels + LIGHTER * (255.0 - pair.pixels)).astype(np.uint8))
    top_weight = max(1e-9, float(weights.max(initial=0)))
    ranked = np.argsort(weights, kind="stable").tolist()  # the strongest is drawn last
    for index in ranked:
        strength = float(weights[index]) / top_weight
        colour = matplotlib.colormaps[COLOURS](0.15 + 0.85 * strength)
        left, top = _draw_box(axes, pair, index, colour, 0.8 + 3.2 * strength)
        if index in ranked[-LABELLED:]:
            _tab(axes, (left, top), f"{weights[index]:.0%}", colour, "white" if strength > 0.6 else "black")


def _draw_box(axes: Axes, pair: Pair, index: int, colour: tuple[float, ...], line: float) -> tuple[float, float]:
    """A region's outline; returns its left and top in pixels."""
    height, width = pair.pixels.shape[:2]
    x1, y1, x2, y2 = (pair.boxes[index] * (width, height, width, height) - 0.5).tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line))
    return x1, y1


def _tab(axes: Axes, place: tuple[float, float], text: str, colour: tuple[float, ...], ink: str) -> None:
    """A few letters in the corner of a box."""
    frame = {"facecolor": colour, "edgecolor": "none", "pad": 1}
    axes.text(*place, text, ha="left", va="top", fontsize=8, color=ink, bbox=frame)


def _draw_lines(
    axes: Axes, left: Sequence[str], right: Sequence[str], weights: np.ndarray, colours: np.ndarray
) -> None:
    """Names in two columns, joined the stronger the more attention [left, right] passes; the best says its share.

    Colours [≥ left, 3] float.
    """
    axes.axis("off")
    axes.set(xlim=(-0.75, 1.6), ylim=(1.04, -0.04))
    places = _spread(len(left)), _spread(len(right))
    if not len(left) or not len(right):
        axes.text(0.5, 0.5, "none", ha="center", va="center", color=rgb(pictures.FAINT))
        return
    top = max(1e-9, float(weights.max()))
    for row, (name, colour) in enumerate(zip(left, colours, strict=False)):
        for column in range(len(right)):
            strength = float(weights[row, column]) / top
            ends = [places[0][row], places[1][column]]
            axes.plot([0.13, 1], ends, color=colour, alpha=strength, linewidth=0.4 + 3.6 * strength, zorder=1)
        best = int(weights[row].argmax())
        label = f"{plain(name)} ({weights[row, best]:.0%})"
        axes.text(-0.13, places[0][row], label, ha="right", va="center", fontsize=9, color=rgb(pictures.INK))
        axes.plot([0.0], [places[0][row]], marker="s", color=colour, markersize=6)
    for place, name in zip(places[1], right, strict=True):
        axes.text(1.04, place, plain(name), ha="left", va="center", fontsize=9, color=rgb(pictures.INK))


def _draw_thumbnails(
    axes: Axes,
    pair: Pair,
    shown: Sequence[int],
    places: Sequence[tuple[float, float]],
    figure: Figure,
    offset: tuple[float, float] = (0.0, 0.0),
) -> None:
    """What each region shows, at places of the axes, moved by an offset in points."""
    for index, place in zip(shown, places, strict=True):
        picture = OffsetImage(_crop(pair, index), zoom=72 / figure.dpi)
        picture.image.axes = axes
        box = AnnotationBbox(
            picture, place, xybox=offset, boxcoords="offset points", frameon=False, pad=0, annotation_clip=False
        )
        axes.add_artist(box)


def _crop(pair: Pair, index: int) -> np.ndarray:
    """A region's pixels, THUMBNAIL high at most."""
    height, width = pair.pixels.shape[:2]
    x1, y1, x2, y2 = (pair.boxes[index] * (width, height, width, height)).tolist()
    left, top = min(int(x1), width - 1), min(int(y1), height - 1)
    crop = pair.pixels[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))]
    return pictures.fitted(crop, THUMBNAIL)


def _region_name(pair: Pair, index: int) -> str:
    return f"{index + 1} {pair.regions[index].name}".rstrip()


def _spread(count: int) -> list[float]:
    """Places from top to bottom of so many lines."""
    return ((np.arange(count) + 0.5) / max(1, count)).tolist()
