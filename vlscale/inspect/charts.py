"""matplotlib without a screen, and the same bytes for the same picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, laid out by its contents."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write it as PNG; the same bytes every time."""
    figure.savefig(path, metadata={"Software": None})


def plain(text: str) -> str:
    """A text from the data as matplotlib shall draw it: `$` starts no formula."""
    return text.replace("$", r"\$")


def rgb(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """A colour of `pictures` as matplotlib takes it."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
