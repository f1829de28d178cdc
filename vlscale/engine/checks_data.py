"""Checks of the training data and of the arithmetic of batches, steps and epochs."""

from __future__ import annotations

import logging

from vlscale.config import Recipe, Train
from vlscale.data.corpus import Corpus
from vlscale.data.images import ImageError, load_image
from vlscale.data.regions import read_regions
from vlscale.data.sample import Sample, SampleError
from vlscale.engine.checks_finding import Case, Finding, shown_names
from vlscale.engine.schedule import batch_plan, total_steps
from vlscale.engine.start import training_examples

_LOOKED_AT = 64
"""Samples that are read, evenly over the data; `vlscale data validate` reads them all."""


def data_and_steps(case: Case) -> list[Finding]:
    """The data, read as training reads it, and what the recipe makes of so many samples."""
    assert case.recipe is not None
    said = _Sayings()
    room = logging.getLogger("vlscale.data")
    room.addHandler(said)
    try:
        corpus = training_examples(case.recipe)
    finally:
        room.removeHandler(said)
    return [
        _amount(case, case.recipe, corpus),
        *(Finding("data, left out", "warning", line, "vlscale data validate names every one") for line in said.lines),
        _readable(corpus, case.recipe),
        *_steps(case.recipe, corpus),
    ]


def batch(case: Case) -> list[Finding]:
    """How the global batch is shared out."""
    assert case.recipe is not None
    return [Finding("batch", "ok", str(batch_plan(case.recipe.train, case.world)))]


class _Sayings(logging.Handler):
    """Keeps what readers say of records and images that are not there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _amount(case: Case, recipe: Recipe, corpus: Corpus) -> Finding:
    """Samples and shards against ranks × workers × global batch; shards are read by index, so any number goes."""
    samples, per_step, workers = len(corpus), recipe.train.global_batch, recipe.data.workers
    blocks = [len(part.blocks) for part in corpus.parts() if len(part.blocks) < part.blocks.sum()]
    shards = f" in {sum(blocks):,} shards" if blocks else ""
    found = f"{recipe.data.path or 'embedded scenes'}: {samples:,} samples{shards}; "
    found += f"{case.world} ranks × {workers} loader processes, {per_step:,} images a step"
    if samples < per_step:
        fix = f"more data, or --set train.global_batch={samples - samples % case.world or samples}"
        return Finding("data", "warning", f"{found}: an image comes several times in a step", fix)
    return Finding("data", "ok", found)


def _readable(corpus: Corpus, recipe: Recipe) -> Finding:
    """The first samples and some evenly over the rest: pixels decoded, or regions read."""
    count = min(_LOOKED_AT, len(corpus))
    indices = sorted({*range(min(8, len(corpus))), *(number * len(corpus) // count for number in range(count))})
    wrong = []
    for index in indices:
        try:
            _read(corpus.sample(index), recipe)
        except (SampleError, ImageError) as error:
            wrong.append(f"{corpus.where(index)}: {error}")
    name, found = "samples", f"{len(indices) - len(wrong)} of {len(indices)} looked at can be read"
    if not wrong:
        return Finding(name, "ok", found)
    found = f"{found}; {shown_names(wrong, 3)}"
    fix = "check data.path and --image-root" if len(wrong) == len(indices) else "vlscale data validate names every one"
    return Finding(name, "failed" if len(wrong) == len(indices) else "warning", found, fix)


def _read(sample: Sample, recipe: Recipe) -> None:
    """Raises SampleError or ImageError."""
    concepts = recipe.data.concepts
    if concepts is None or (concepts.pixels is not None and sample.regions is None):
        for file in (sample.image, sample.second):
            if file is not None:
                load_image(file)
    elif read_regions(sample) is None:
        raise SampleError("no regions lie beside it")


def _steps(recipe: Recipe, corpus: Corpus) -> list[Finding]:
    """Epochs in steps or steps in epochs, of every stage."""
    per_epoch = corpus.per_epoch() / recipe.train.global_batch
    many = len(recipe.stages) > 1
    names = [f"steps, stage {number}" if many else "steps" for number in range(1, len(recipe.stages) + 1)]
    return [_steps_of(name, stage.train, per_epoch) for name, stage in zip(names, recipe.stages, strict=True)]


def _steps_of(name: str, train: Train, per_epoch: float) -> Finding:
    total = total_steps(train, per_epoch)
    found = f"{per_epoch:,.1f} an epoch, {total:,} in all = {total / per_epoch:.2f} epochs"
    warmup = train.warmup_steps if train.warmup_share is None else round(train.warmup_share * total)
    if warmup >= total:
        fix = "a shorter train.warmup_steps, or a longer run"
        return Finding(name, "warning", f"{found}; {warmup:,} of them warm the rate up: it never reaches train.lr", fix)
    return Finding(name, "ok", f"{found}; the rate warms up for {warmup:,}")
