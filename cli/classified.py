"""`vlscale eval vqa|nlvr2|snli-ve`: a tuned run's answers, in numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, options, terminal

First = Annotated[int | None, typer.Option(metavar="N", help="Only the first N examples of the split; default: all.")]
Count = Annotated[int, typer.Option(min=1, metavar="PICTURES", help="Examples to draw on the page.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Result file (.json); predictions and page lie beside it; default: RUN/eval/<task>.json."),
]


def vqa(
    source: options.EvaluatedRun,
    data: options.EvaluatedData = None,
    image_root: options.ImageRoot = None,
    split: options.Split = None,
    first: First = None,
    submission: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an answer to every question of the split for VQA v2's server."),
    ] = None,
    count: Count = 12,
    out: Out = None,
    threads: options.Threads = None,
) -> None:
    """Visual question answering of a run tuned for it: VQA v2's soft accuracy, by type of answer; with a page."""
    _evaluate("vqa", source, split, count, threads, data, first, out, image_root, submission=submission)


def nlvr2(
    source: options.EvaluatedRun,
    data: options.EvaluatedData = None,
    image_root: options.ImageRoot = None,
    split: options.Split = None,
    first: First = None,
    count: Count = 12,
    out: Out = None,
    threads: options.Threads = None,
) -> None:
    """Statements about two images, of a run tuned for NLVR2: accuracy and consistency; with a page."""
    _evaluate("nlvr2", source, split, count, threads, data, first, out, image_root)


def snli_ve(
    source: options.EvaluatedRun,
    data: options.EvaluatedData = None,
    image_root: options.ImageRoot = None,
    split: options.Split = None,
    first: First = None,
    count: Count = 12,
    out: Out = None,
    threads: options.Threads = None,
) -> None:
    """Visual entailment of a run tuned for SNLI-VE: accuracy, by class; with a page."""
    _evaluate("snli-ve", source, split, count, threads, data, first, out, image_root)


def _evaluate(
    task: str,
    source: str,
    split: str | None,
    count: int,
    threads: int | None,
    data: str | None,
    first: int | None,
    out: Path | None,
    image_root: Path | None,
    **more: Any,
) -> None:
    launch.set_threads(threads, launch.world_size(None) if launch.joined() else 1)
    from vlscale import distributed
    from vlscale.inspect.classified import draw_classified
    from vlscale.tasks.classified import classified_table, run_classified

    if launch.has_company():
        distributed.init_from_environment()
    root = None if image_root is None else str(image_root)
    with terminal.progress() as report:
        result = run_classified(
            source, task, data=data, split=split, first=first, out=out, image_root=root, on_progress=report, **more
        )
    if launch.rank() == 0:
        page = draw_classified(result.path, result.predictions, result.examples, count)
        terminal.print_result(result.path, split, classified_table(result.path))
        print(page)
