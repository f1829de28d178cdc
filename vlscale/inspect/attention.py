"""Who attends to whom: phrases to words, regions to tags, phrases and words to regions (MVPTR, section 4.4, Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.data.images import ImageError
from vlscale.data.sample import Sample, SampleError
from vlscale.errors import UserError
from vlscale.inspect import attention_pictures as draw
from vlscale.inspect.attention_page import page
from vlscale.inspect.concept_pairs import Attended, Pair, PairReader, attended
from vlscale.inspect.folders import replaced
from vlscale.inspect.usage import MAX_IMAGES, SEED, some_samples
from vlscale.interop.layout import write_json, write_text
from vlscale.interop.run import load_run, run_samples
from vlscale.systems.concept_attention import ReadsConcepts, as_reader, concept_attention, resting

FOLDER, PAGE, CONTENT = "attention", "index.html", "attention.json"


def inspect_attention(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    image_root: str | None = None,
    sample: str | None = None,
    count: int = 4,
    layer: int | None = None,
    head: int | None = None,
    out: Path | None = None,
) -> Path:
    """Draw the attention of a concept system on one image, or on some that have phrases, each with a caption.

    The caption is the first one with a phrase of the run's vocabulary, as evaluation encodes it.

    Args:
        source: run folder or checkpoint folder.
        sample: id of the one to draw; None: `count` of the split.
        layer: of every encoder, from 0; None: the last.
        head: from 0; None: the mean over all.
        out: folder of the page, default `attention/` in the run folder; replaced as a whole.

    Returns:
        Its `index.html`.

    Raises:
        UserError: the system reads no concepts, there is no such sample, layer or head, no image can be read, or `out`
            holds something else.
    """
    run = load_run(source)
    system = as_reader(run.system, source)
    split_name, samples = run_samples(run, data, split, image_root)
    reader = PairReader(run)
    pairs, skipped = _readable(_candidates(reader, samples, sample, split_name), reader, 1 if sample else count)
    found: list[Attended] = []
    for pair in pairs:
        attention = concept_attention(system, pair.batch.to(run.device), layer, head)
        layer = attention.layer
        found.append(attended(pair, attention))
    facts = {"run": run.folder.resolve().name, "checkpoint": run.checkpoint.name, "step": run.step, "split": split_name}
    content: dict[str, Any] = {"facts": facts, "settings": _settings(system, layer, head), "notes": _notes(system)}
    with replaced(out or run.folder / FOLDER, CONTENT) as folder:
        title = f"{facts['run']}, step {run.step}: {content['settings']}"
        sections = zip(pairs, found, strict=True)
        content["pairs"] = [_drawn(folder, number, *one, title) for number, one in enumerate(sections)]
        content["skipped"] = skipped
        write_json(folder / CONTENT, content)
        write_text(folder / PAGE, page(content))
    return (out or run.folder / FOLDER) / PAGE


def _candidates(
    reader: PairReader, samples: list[Sample], wanted: str | None, split: str
) -> Iterator[tuple[Sample, str]]:
    """Samples with a caption each, in the order to try: drawn with `SEED`, those with phrases first."""
    if wanted is not None:
        named = next((sample for sample in samples if sample.id == wanted), None)
        if named is None:
            raise UserError(f"--sample {wanted}: split {split} has no such sample (the first is {samples[0].id})")
        yield named, reader.caption_with_phrases(named) or named.captions[0]
        return
    some = some_samples(samples, MAX_IMAGES)
    without: list[Sample] = []
    for number in np.random.default_rng(SEED).permutation(len(some)).tolist():
        caption = reader.caption_with_phrases(some[number])
        if caption is None:
            without.append(some[number])
        else:
            yield some[number], caption
    yield from ((sample, sample.captions[0]) for sample in without)


def _readable(candidates: Iterator[tuple[Sample, str]], reader: PairReader, count: int) -> tuple[list[Pair], list[str]]:
    """The first `count` pairs that can be read, and why others can't.

    Raises:
        UserError: none can.
    """
    pairs: list[Pair] = []
    skipped: list[str] = []
    for sample, caption in candidates:
        try:
            pairs.append(reader.pair(sample, caption))
        except (ImageError, SampleError) as error:
            skipped.append(f"{sample.id}: {error}")
        if len(pairs) == count:
            break
    if not pairs:
        raise UserError(f"no sample can be drawn, {len(skipped)} tried: {skipped[0]}; check --image-root")
    return pairs, skipped


def _drawn(folder: Path, number: int, pair: Pair, found: Attended, title: str) -> dict[str, Any]:
    """Pictures of a pair, and all that they show in numbers."""
    names = {name: f"{number}-{name}.png" for name in ("regions", "lists", "matrix")}
    draw.draw_regions(pair, found, title, folder / names["regions"])
    draw.draw_lists(pair, found, title, folder / names["lists"])
    draw.draw_matrix(pair, found, title, folder / names["matrix"])
    things = {kind: [thing.name for thing in getattr(pair, kind)] for kind in ("words", "phrases", "tags", "regions")}
    return {
        "sample": pair.sample,
        "caption": pair.caption,
        "pictures": names,
        **things,
        "boxes": _rounded(pair.boxes),
        **{name: _rounded(value) for name, value in found._asdict().items() if name != "shares"},
        "shares": found.shares,
    }


def _settings(system: ReadsConcepts, layer: int | None, head: int | None) -> str:
    layers = system.attention_layers()
    heads = "mean over the heads" if head is None else f"head {head}"
    where = "of every encoder" if layers.textual else "of the one encoder"
    return f"layer {layer} (of 0 to {len(layers.multimodal) - 1}) {where}, {heads}"


def _notes(system: ReadsConcepts) -> Sequence[str]:
    """What a reader has to know before looking."""
    notes = []
    if not system.attention_layers().textual:
        notes.append(
            "This system has one encoder for everything: what stands below for the textual, visual and multimodal "
            "encoder are parts of the same attention."
        )
    if resting(system):
        notes.append(
            "The multimodal encoder is not trained in this run’s stage: its attention is as it was initialised."
        )
    return notes


def _rounded(values: np.ndarray) -> list[Any]:
    return np.asarray(values, dtype=np.float64).round(6).tolist()
