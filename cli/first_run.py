"""`vlscale first-run`: the whole path once, from rendering the data to the pictures, and one table at the end."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, terminal
from .pretrain import DEFAULT_RECIPE


def first_run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")] = DEFAULT_RECIPE,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/first-run"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Render the embedded data, pre-train, evaluate and draw the pictures; ends with one table."""
    if (out / "codebook" / "index.html").is_file():
        print(f"{out} holds a finished first run; remove the folder to start over")
        return
    clock = Clock()
    with clock.part("rendering the data"):
        _render(recipe, overrides or [])
    with clock.part("pre-training"):
        _pretrain(recipe, out, overrides or [], threads)
    launch.set_threads(threads, 1)
    results = _evaluate(str(out), clock)
    _report(out, results, clock)


@dataclass
class Clock:
    """Wall-clock seconds of each part."""

    seconds: dict[str, float] = field(default_factory=dict)
    name: str = ""
    start: float = 0.0

    def part(self, name: str) -> Clock:
        """Name the part that the `with` block is."""
        self.name = name
        return self

    def __enter__(self) -> None:
        print(f"== {self.name}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = time.monotonic() - self.start


def _render(recipe: str, overrides: list[str]) -> None:
    from vlscale.config import load_recipe
    from vlscale.data.scenes import embedded_scenes

    data = load_recipe(recipe, overrides).data
    if data.path is None:
        print(embedded_scenes(data.scenes))


def _pretrain(recipe: str, out: Path, overrides: list[str], threads: int | None) -> None:
    """In processes of its own, so that a second rank or a dying engine cannot disturb what follows."""
    arguments = ["pretrain", recipe, "--out", str(out), "--resume", "auto"]
    for pair in overrides:
        arguments += ["--set", pair]
    if threads:
        arguments += ["--threads", str(threads)]
    code = launch.start_ranks(arguments, launch.world_size(None))
    if code:
        sys.exit(code)


def _evaluate(run: str, clock: Clock) -> dict[str, Path]:
    from vlscale.inspect.codebook import inspect_codebook
    from vlscale.inspect.reconstructions import inspect_reconstructions
    from vlscale.tasks.objectives import run_objectives
    from vlscale.tasks.retrieval import run_retrieval

    parts = {
        "retrieval": lambda: run_retrieval(run),
        "objectives": lambda: run_objectives(run),
        "codebook": lambda: inspect_codebook(run, show_patches=True),
        "reconstructions": lambda: inspect_reconstructions(run),
    }
    results = {}
    for name, work in parts.items():
        with clock.part(name):
            results[name] = work()
    return results


def _report(out: Path, results: dict[str, Path], clock: Clock) -> None:
    rows: list[tuple[str, Any]] = [("run", out), *results.items()]
    for name in ("retrieval", "objectives"):
        metrics = json.loads(results[name].read_text(encoding="utf-8"))["metrics"]
        rows += [(key, value) for key, value in metrics.items()]
    rows += [(f"seconds {name}", round(seconds, 1)) for name, seconds in clock.seconds.items()]
    terminal.print_table("first run", rows)
