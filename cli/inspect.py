"""`vlscale codebook-inspect` and `vlscale inspect`: pictures of what a run learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import launch, terminal
from .eval import DataOption, ImageRootOption, SplitOption, _text

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pictures of what a run learned.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the page; default: RUN/codebook.")]


def codebook_inspect(
    run: RunArgument,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    show_patches: Annotated[
        bool, typer.Option("--show-patches", help="Draw what codes stand for, and images as codes.")
    ] = False,
    codes: Annotated[int, typer.Option(min=1, help="How many of the most used codes to draw.")] = 16,
    code: Annotated[int | None, typer.Option(min=0, help="Draw this code only.")] = None,
    out: OutOption = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """What each codeword stands for, usage, perplexity, dead codes, on one page: its image patches, or its images and
    captions where the two share the codes."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.codebook import inspect_codebook, usage_table

    page = inspect_codebook(
        run,
        data=data,
        split=split,
        codes=codes,
        code=code,
        show_patches=show_patches,
        out=out,
        image_root=_text(image_root),
    )
    terminal.print_rich(usage_table(page))
    print(page)


@app.command()
def reconstructions(
    run: RunArgument,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 8,
    out: OutOption = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Original, masked and predicted images side by side."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.reconstructions import inspect_reconstructions

    picture = inspect_reconstructions(run, data=data, split=split, count=count, out=out, image_root=_text(image_root))
    print(picture)
