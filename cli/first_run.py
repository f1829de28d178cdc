"""`vlscale first-run`: the whole path once, from rendering the data to the pictures, and one table at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, terminal
from .pretrain import DEFAULT_RECIPE

SUMMARY = "first-run.json"


def first_run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")] = DEFAULT_RECIPE,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/first-run"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Render the embedded data, pre-train, evaluate and draw the pictures; ends with one table."""
    summary = out / SUMMARY
    if not summary.is_file():
        clock = Clock()
        with clock.part("rendering the data"):
            _render(recipe, overrides or [])
        with clock.part("pre-training"):
            _pretrain(recipe, out, overrides or [], threads)
        launch.set_threads(threads, 1)
        files = {name: str(path.relative_to(out)) for name, path in _evaluate(str(out), clock).items()}
        _write(summary, {"files": files, "seconds": clock.seconds})
    else:
        print(f"{out} holds a finished first run; remove the folder to start over")
    _report(out, json.loads(summary.read_text(encoding="utf-8")))


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
        with terminal.progress() as report:
            print(embedded_scenes(data.scenes, partial(report, "scenes")))


def _pretrain(recipe: str, out: Path, overrides: list[str], threads: int | None) -> None:
    """In processes of its own, as `vlscale pretrain` runs: what follows starts with all memory free again."""
    arguments = ["pretrain", recipe, "--out", str(out), "--resume", "auto"]
    for pair in overrides:
        arguments += ["--set", pair]
    if threads:
        arguments += ["--threads", str(threads)]
    code = launch.start_ranks(arguments, launch.world_size(None))
    if code:
        sys.exit(code)


def _evaluate(run: str, clock: Clock) -> dict[str, Path]:
    """Result file, page or picture of each part."""
    from vlscale.inspect.codebook import inspect_codebook
    from vlscale.inspect.reconstructions import inspect_reconstructions
    from vlscale.tasks.objectives import run_objectives
    from vlscale.tasks.retrieval import run_retrieval

    parts: dict[str, Callable[[], Path]] = {
        "retrieval": lambda: run_retrieval(run).path,
        "objectives": lambda: run_objectives(run),
        "codebook": lambda: inspect_codebook(run, show_patches=True),
        "reconstructions": lambda: inspect_reconstructions(run),
    }
    files = {}
    for name, work in parts.items():
        with clock.part(name):
            files[name] = work()
    return files


def _write(path: Path, value: dict[str, Any]) -> None:
    from vlscale.interop.layout import write_json

    write_json(path, value)


def _report(out: Path, summary: dict[str, Any]) -> None:
    files = {name: out / path for name, path in summary["files"].items()}
    seconds = {f"seconds, {name}": round(value, 1) for name, value in summary["seconds"].items()}
    terminal.print_table(
        "first run",
        [("run", out), *files.items()],
        _recalls(_read(files["retrieval"])),
        _read(files["objectives"])["metrics"].items(),
        _codebooks(files["codebook"].with_name("codebook.json")),
        [*seconds.items(), ("seconds, all", round(sum(summary["seconds"].values()), 1))],
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _recalls(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Recalls in per cent of every score that was computed, three to a line, and what guessing would reach."""
    metrics = result["metrics"] | {f"chance_{name}": value for name, value in result["protocol"]["chance"].items()}
    scores = {"first stage": "itc_", "re-ranked by ITM": "", "ITM + first stage": "sum_", "chance": "chance_"}
    for score, prefix in scores.items():
        if f"{prefix}rsum" not in metrics:
            continue
        for way, key in (("text → image", "t2i"), ("image → text", "i2t")):
            values = " / ".join(f"{metrics[f'{prefix}{key}_r{k}']:.1f}" for k in (1, 5, 10))
            yield f"{score}, {way} R@1 / 5 / 10", values
        yield f"{score}, RSUM", f"{metrics[f'{prefix}rsum']:.1f}"


def _codebooks(path: Path) -> Iterator[tuple[str, str]]:
    """Perplexity and dead codes over the held-out images."""
    for name, book in _read(path)["codebooks"].items():
        yield f"{name}, perplexity", f"{book['perplexity']:.1f}"
        yield f"{name}, codes never chosen", f"{len(book['dead'])} of {book['size']}"
