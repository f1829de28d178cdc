"""`vlscale eval`: what a run can do, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import launch, terminal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate a run: zero-shot retrieval and phrase grounding, and what its objectives learned.",
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
def grounding(
    source: RunOption,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Take the run as it was pre-trained: all that can be done so far.")
    ] = False,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Multimodal layer whose states are compared, from 0; default: the recipe's wpg.layer."),
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Count phrase concepts that a phrase says among its tokens.")
    ] = False,
    first: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N images of the split; default: all.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="PICTURES", help="Captions to draw on the page.")] = 12,
    out: Annotated[
        Path | None,
        typer.Option(help="Result file (.json); predictions and page lie beside it; default: RUN/eval/grounding.json."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Which region of its image each phrase of a caption means, against annotated boxes; with a page of pictures."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.grounding import draw_grounding
    from vlscale.tasks.grounding import grounding_table, run_grounding

    with terminal.progress() as report:
        result = run_grounding(
            source,
            zero_shot=zero_shot,
            data=data,
            split=split,
            layer=layer,
            concepts=concepts,
            first=first,
            out=out,
            image_root=_text(image_root),
            on_progress=report,
        )
    page = draw_grounding(result.path, result.predictions, result.samples, count)
    terminal.print_result(result.path, split, grounding_table(result.path))
    print(page)


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
