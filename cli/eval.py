"""`vlscale eval`: what a run can do, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import launch, terminal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate a run: zero-shot retrieval, and what its objectives learned.",
)

RunOption = Annotated[str, typer.Option("--from", metavar="RUN", help="A run folder or one of its checkpoints.")]
DataOption = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Annotations, shards, tars or a data recipe (.yaml); default: the run's own."),
]
ImageRootOption = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder that image paths are relative to.")
]
SplitOption = Annotated[str | None, typer.Option(help="Split to read; default: test, else val.")]


@app.command()
def retrieval(
    source: RunOption,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    rerank: Annotated[
        int | None, typer.Option(help="Candidates per query that ITM re-ranks; default: the recipe's eval.rerank.")
    ] = None,
    first: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N images, with all their captions; default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: RUN/eval/retrieval.json.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Image-text retrieval both ways: contrastive candidates, re-ranked by ITM; every pair by ITM where a system has no
    contrastive features."""
    launch.set_threads(threads, 1)
    from vlscale.tasks.retrieval import retrieval_table, run_retrieval

    with terminal.progress() as report:
        result = run_retrieval(
            source,
            data=data,
            split=split,
            rerank=rerank,
            first=first,
            out=out,
            image_root=_text(image_root),
            on_progress=report,
            on_message=terminal.note,
        )
    terminal.print_result(result, split, retrieval_table(result))


@app.command()
def objectives(
    source: RunOption,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: RUN/eval/objectives.json.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """What each objective learned: ITM accuracy, MIM against code frequencies, and what images and captions add."""
    launch.set_threads(threads, 1)
    from vlscale.tasks.objectives import run_objectives

    result = run_objectives(source, data=data, split=split, out=out, image_root=_text(image_root))
    terminal.print_result(result, split)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
