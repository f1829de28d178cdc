"""`vlscale data phrases`: phrase concepts of captions, their vocabulary and statistics."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vlscale.data.phrases import Built, Comparison, Corpora

SourcesArgument = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="One or more sources or data recipes, in this order.")
]


def phrases(
    sources: SourcesArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="Vocabulary to write; FILE.captions.jsonl and FILE.statistics.json go beside it."),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(help="light: built in; parser: SceneGraphParser; spice: SPICE's output; data: the data's tuples."),
    ] = "light",
    min_count: Annotated[int, typer.Option(min=1, help="Sentences of the corpus that a phrase needs.")] = 50,
    split: Annotated[
        list[str] | None, typer.Option(help="Split to count, repeatable; default: train and restval.")
    ] = None,
    spice: Annotated[
        list[Path] | None, typer.Option(help="JSON that SPICE wrote with -detailed, for --extractor spice; repeatable.")
    ] = None,
    spice_input: Annotated[
        Path | None, typer.Option(help="Write the captions as SPICE reads them to this file, and nothing else.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Compare --extractor with this one (parser or light), and write nothing.")
    ] = None,
    compare_captions: Annotated[
        int, typer.Option(min=1, help="Captions to compare on, drawn at random with a fixed seed.")
    ] = 5000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the images; they need not be here.")
    ] = None,
) -> None:
    """Build the phrase vocabulary of captions (MVPTR), without Java, and list every caption's phrases."""
    from vlscale.data.phrases import build_phrases, make_extractor, open_corpora, write_spice_input
    from vlscale.errors import UserError

    from . import terminal

    tasks = {"--out": out, "--spice-input": spice_input, "--compare": compare}
    if sum(value is not None for value in tasks.values()) != 1:
        raise UserError(f"expected one of {', '.join(tasks)}: the vocabulary to write, SPICE's input, or a comparison")
    for file in (out, spice_input):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: no folder {file.parent}; make it first")
    # What is wrong with the extractor is told before the data is read.
    parts = None if spice_input is not None or compare is not None else make_extractor(extractor, spice or ())
    corpora = open_corpora(sources, None if image_root is None else str(image_root))
    if spice_input is not None:
        count = write_spice_input((sample for _, sample in corpora.samples()), spice_input)
        print(f"{count:,} captions: {spice_input}")
    elif compare is not None:
        terminal.print_rich(_comparison_table(_compare(corpora, extractor, compare, compare_captions, split)))
    elif out is not None and parts is not None:
        with terminal.progress() as report:
            options = {} if not split else {"splits": split}
            cores = len(os.sched_getaffinity(0))
            built = build_phrases(
                corpora, parts, out, min_count, workers=workers or cores, on_progress=report, **options
            )
        _print(built)


def _compare(corpora: Corpora, extractor: str, reference: str, count: int, splits: list[str] | None) -> Comparison:
    from vlscale.data.phrases import caption_extractor, compare, some_captions

    from . import terminal

    chosen = [caption_extractor(name) for name in (extractor, reference)]
    captions = some_captions(corpora.captions(splits), count)
    with terminal.progress() as report:
        return compare(chosen[0], chosen[1], captions, report)


def _print(built: Built) -> None:
    from . import terminal

    numbers, origin = built.statistics, built.vocabulary.origin
    rows: list[tuple[str, object]] = [
        ("extractor", f"{origin.extractor} {origin.version}"),
        ("sentences counted", origin.sentences),
        ("all phrases", numbers.all_phrases),
        (f"unique phrases in {origin.min_count} sentences or more", numbers.unique_phrases),
        ("mean / median frequency", f"{numbers.mean_frequency:,.1f} / {numbers.median_frequency:g} sentences"),
        ("phrases per image", numbers.per_image),
        ("phrases per text", numbers.per_text),
        ("texts with a phrase", f"{numbers.coverage:.1%}"),
        ("attributes", f"{numbers.attributes:.1%} of unique, {numbers.attribute_occurrences:.1%} of all phrases"),
        ("frequent attributes", numbers.frequent_attributes),
        ("frequent relations", numbers.frequent_relations),
        ("phrases by threshold", ", ".join(f"{least}: {count:,}" for least, count in numbers.by_threshold.items())),
    ]
    terminal.print_table(str(built.files[0]), rows)
    terminal.print_rich(_parts_table(built))
    for file in built.files:
        print(file)


def _parts_table(built: Built) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("data", "images", "texts", "unique phrases", "per text", "with a phrase", "over 5", "frequent")
    for part in built.statistics.parts:
        shares = f"{part.per_text:.3f}", f"{part.coverage:.1%}", f"{part.over_limit:.1%}"
        counts = f"{part.images:,}", f"{part.texts:,}", f"{part.unique:,}"
        table.add_row(escape(part.name), *counts, *shares, escape(", ".join(part.frequent[:6])))
    return table


def _comparison_table(comparison: Comparison) -> Table:
    from rich.table import Table

    one, other = comparison.extractor, comparison.reference
    title = f"{one.name} {one.version} against {other.name} {other.version}, {comparison.captions:,} captions"
    table = Table("", one.name, other.name, "both", "precision", "recall", "F1", title=title, title_justify="left")
    for row in comparison.agreement:
        counts = f"{row.found:,}", f"{row.expected:,}", f"{row.both:,}"
        table.add_row(f"{row.kind}s", *counts, f"{row.precision:.3f}", f"{row.recall:.3f}", f"{row.f1:.3f}")
    table.add_section()
    for name, value in (
        ("phrases per caption", "phrases_per_caption"),
        ("captions with a phrase", "coverage"),
        ("captions per CPU second", "captions_per_second"),
    ):
        shown = "{:.1%}" if value == "coverage" else "{:,.3f}" if value == "phrases_per_caption" else "{:,.0f}"
        table.add_row(name, *(shown.format(getattr(side, value)) for side in (one, other)))
    return table
