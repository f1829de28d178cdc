"""`vlscale eval`: what a run can do, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import classified, launch, options, terminal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate a run: retrieval, phrase grounding, VQA, NLVR2, SNLI-VE, and what its objectives learned.",
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
    folds: Annotated[
        str | None,
        typer.Option(metavar="N", help="Within each N consecutive images too, and the mean of that; COCO's 1k."),
    ] = None,
    first: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N images, with all their captions; default: all.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="PICTURES", help="Queries to draw on the page, each way.")] = 12,
    out: Annotated[
        Path | None,
        typer.Option(help="Result file (.json); predictions and page lie beside it; default: RUN/eval/retrieval.json."),
    ] = None,
    nproc: options.Nproc = None,
    threads: options.RankThreads = None,
    local_rank: options.LocalRank = None,
) -> None:
    """Image-text retrieval both ways: contrastive candidates, re-ranked by ITM; every pair by ITM where a system has no
    contrastive features; with a page of pictures."""
    if launch.become_rank(launch.world_size(nproc), threads) is None:
        return
    from vlscale import distributed
    from vlscale.inspect.retrieval import draw_retrieval
    from vlscale.tasks.retrieval import retrieval_table, run_retrieval

    if launch.has_company():
        distributed.init_from_environment()
    with terminal.progress() as report:
        result = run_retrieval(
            source,
            data=data,
            split=split,
            rerank=rerank,
            folds=folds,
            first=first,
            out=out,
            image_root=_text(image_root),
            on_progress=report if launch.rank() == 0 else None,
            on_message=terminal.note if launch.rank() == 0 else None,
        )
    if launch.rank() == 0:
        page = draw_retrieval(result.path, result.predictions, result.samples, count)
        terminal.print_result(result.path, split, retrieval_table(result.path))
        print(page)
    if launch.has_company():
        distributed.shutdown()


@app.command()
def grounding(
    source: RunOption,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Take a run that was not tuned for grounding, as it is.")
    ] = False,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Multimodal layer whose states are compared, or whose attention is looked at, from 0; default: the "
            "recipe's wpg.layer, or the middle one."
        ),
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Count phrase concepts that a phrase says among its tokens.")
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Grad-CAM over a grid of boxes in place of the annotated ones.")
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
    """Which region of its image each phrase of a caption means, against annotated boxes, by a system of regions or by
    Grad-CAM; with a page of pictures."""
    launch.require_alone("eval grounding")
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
            grid=grid,
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
    launch.require_alone("eval objectives")
    launch.set_threads(threads, 1)
    from vlscale.tasks.objectives import run_objectives

    result = run_objectives(source, data=data, split=split, out=out, image_root=_text(image_root))
    terminal.print_result(result, split)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


app.command("vqa")(classified.vqa)
app.command("nlvr2")(classified.nlvr2)
app.command("snli-ve")(classified.snli_ve)
