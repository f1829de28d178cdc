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


@app.command()
def gradcam(
    run: RunArgument,
    text: Annotated[str | None, typer.Option(help="What to look for; default: each image's own caption.")] = None,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Look into this file; default: images of the data.")
    ] = None,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    count: Annotated[int, typer.Option(min=1, help="Images of the split to draw.")] = 4,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Fusion layer, from 0; default: the middle one (of six: 2, which BERT counts as 8). In the last one "
            "the match depends on [CLS] alone, so that words have no map. With --itc: block of the image encoder; "
            "default: the last.",
        ),
    ] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Attention head, from 0; default: the mean over all.")] = None,
    token: Annotated[
        str | None, typer.Option(metavar="N|WORD", help="Draw this word, or token ([CLS] is 0), only.")
    ] = None,
    itc: Annotated[
        bool, typer.Option("--itc", help="Evidence for the contrastive similarity instead of the match.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: RUN/gradcam.png.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Where in an image the text, and each of its words, finds evidence that the two match (Grad-CAM)."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.gradcam import Looked, inspect_gradcam

    number = int(token) if token is not None and token.isascii() and token.isdigit() else token
    picture = inspect_gradcam(
        run,
        text=text,
        image=image,
        data=data,
        split=split,
        image_root=_text(image_root),
        count=count,
        looked=Looked(layer, head, number, itc),
        out=out,
    )
    print(picture)


@app.command()
def attention(
    run: RunArgument,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    sample: Annotated[
        str | None, typer.Option(metavar="ID", help="Draw this sample; default: some of the split that have phrases.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples of the split to draw.")] = 4,
    layer: Annotated[int | None, typer.Option(min=0, help="Layer of every encoder, from 0; default: the last.")] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Attention head, from 0; default: the mean over all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the page; default: RUN/attention.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Who attends to whom in a system of concepts: phrases to words, regions to tags, phrases and words to regions."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.attention import inspect_attention

    page = inspect_attention(
        run,
        data=data,
        split=split,
        image_root=_text(image_root),
        sample=sample,
        count=count,
        layer=layer,
        head=head,
        out=out,
    )
    print(page)


@app.command()
def concepts(
    run: RunArgument,
    data: DataOption = None,
    image_root: ImageRootOption = None,
    split: SplitOption = None,
    count: Annotated[int, typer.Option(min=1, help="Phrases on the map, the most frequent.")] = 400,
    out: Annotated[Path | None, typer.Option(help="Folder of the page; default: RUN/concepts.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Embeddings of tags and phrases: a map by t-SNE, nearest neighbours, and statistics of the phrases."""
    launch.set_threads(threads, 1)
    from vlscale.inspect.concepts import inspect_concepts

    print(inspect_concepts(run, data=data, split=split, image_root=_text(image_root), count=count, out=out))
