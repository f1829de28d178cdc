"""Is this data set what it should be? Every record, every image and every caption, with everything that is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

from vlscale.config import Tokenizer
from vlscale.data.corpus import has_caption
from vlscale.data.images import ImageError, load_image
from vlscale.data.open import STORED, load_sources
from vlscale.data.regions import problems as region_problems
from vlscale.data.regions import read_regions
from vlscale.data.sample import Box, ImageFile, Question, Sample, SampleError, Statement
from vlscale.data.shard_check import check_shards
from vlscale.data.sources.base import Notes, Source
from vlscale.data.sources.jsonl import scan_jsonl
from vlscale.data.sources.registry import read_source
from vlscale.data.sources.stored import open_stored
from vlscale.data.text import clean_caption

_CHUNK = 512
_MAX_WORDS: int = Tokenizer.model_fields["max_words"].default

Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What a data set holds and what is wrong with it."""

    file: str
    counts: dict[str, str] = field(default_factory=dict)
    """Name → number (with its unit or range), in the order to print them."""
    splits: dict[str, int] = field(default_factory=dict)
    """Records per split."""
    problems: list[str] = field(default_factory=list)
    """One line each, naming the line, record or image; empty when all is well."""


@dataclass
class _Seen:
    """What went by so far."""

    samples: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    captions_per_record: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    captions: set[int] = field(default_factory=set)
    """Hashes."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    broken: int = 0
    ids: dict[tuple[str, str], str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)


def validate(spec: str | Path, image_root: str | Path | None = None, on_progress: Progress | None = None) -> Report:
    """Read every record, decode every image, check every text; of shards also manifest, hashes and indices.

    Args:
        spec: whatever `--data` takes.
        on_progress: called with what is done, how much of it, and of how much.

    Raises:
        UserError: the data can't be read at all. What is wrong inside is in the report.
    """
    report, seen = Report(str(spec)), _Seen()
    sources, _ = load_sources(str(spec), None if image_root is None else str(image_root))
    lines = 0
    for source in sources:
        notes = Notes(strict=False)
        if source.format == "shards":
            report.problems += check_shards(Path(source.path), on_progress)
        records, total = _counted(source, notes)
        done = 0
        while chunk := list(islice(records, _CHUNK)):
            _check(chunk, seen, report)
            done += len(chunk)
            if on_progress is not None:
                on_progress("decoding", done, total)
        lines += done + len(notes.problems) + len(notes.missing)
        report.problems += notes.problems
        report.problems += [f"{name}: no such file" for name in notes.missing]
        seen.other.update({name: number for name, number in notes.counts.items() if number})
    if not lines:
        report.problems.append(f"{sources[0].path}: holds no record")
    report.splits = dict(seen.splits.most_common())
    report.counts = _counts(seen, report)
    return report


def _counted(source: Source, notes: Notes) -> tuple[Iterator[tuple[str, Sample]], int]:
    """The records and how many they are; what lies in tars is read as it goes by, everything else fits in memory."""
    records = _records(source, notes)
    if source.format in STORED:
        return records, len(open_stored(source))
    kept = list(records)
    return iter(kept), len(kept)


def _records(source: Source, notes: Notes) -> Iterator[tuple[str, Sample]]:
    """Samples with what names them: the line in vlscale's own format, elsewhere the id."""
    if source.format != "jsonl":
        for sample in read_source(source, notes):
            yield sample.id, sample
        return
    for line in scan_jsonl(Path(source.path), None if source.images is None else Path(source.images)):
        if line.sample is not None:
            yield f"line {line.number}", line.sample
        else:
            notes.problems.append(line.error)


def _check(records: Sequence[tuple[str, Sample]], seen: _Seen, report: Report) -> None:
    for where, sample in records:
        seen.samples += 1
        seen.splits[sample.split] += 1
        for name in ("boxes", "tuples", "phrases", "questions", "statements"):
            seen.other[name] += len(getattr(sample, name))
        seen.captions_per_record.append(len(sample.captions))
        for caption in sample.captions:
            seen.captions.add(hash(caption))
            seen.words.append(len(clean_caption(caption, len(caption) + 1).split()))
        report.problems += _repeated(where, sample, seen)
        report.problems += [f"{where}: {problem}" for problem in _record_problems(sample)]
    images = dict.fromkeys(image for _, sample in records for image in (sample.image, sample.second) if image)
    for outcome in _decode(images):
        if isinstance(outcome, str):
            seen.broken += 1
            report.problems.append(outcome)
        else:
            seen.sizes.append(outcome)


def _repeated(where: str, sample: Sample, seen: _Seen) -> Iterator[str]:
    """Ids and images that occur in several records."""
    first_id = seen.ids.setdefault((sample.split, sample.id), where)
    image = str(sample.image)
    first_image = seen.images.setdefault(image, where)
    if first_image != where and sample.second is None:
        yield f"{where}: {image} is on {first_image} already; put its captions into one record"
    elif first_id != where:
        yield f"{where}: id {sample.id!r} is on {first_id} already; ids are unique"


def _record_problems(sample: Sample) -> Iterator[str]:
    if not (has_caption(sample) or sample.captions or sample.questions or sample.statements or sample.tags):
        yield "no captions; training and retrieval leave the record out"
    for number, caption in enumerate(sample.captions, start=1):
        if not clean_caption(caption, _MAX_WORDS):
            yield f"caption {number} is empty once cleaned: {caption[:40]!r}"
    try:
        regions = read_regions(sample)
        yield from () if regions is None else region_problems(regions)
    except SampleError as error:
        yield str(error)
    for number, box in enumerate(sample.boxes, start=1):
        yield from _box_problems(f"box {number}", box)
    for phrase in sample.phrases:
        for box in phrase.boxes:
            yield from _box_problems(f"a box of {phrase.text[:40]!r}", box)
    for name, items in (("tags", sample.tags), ("confidences", sample.confidences)):
        if sample.boxes and items and len(sample.boxes) != len(items):
            yield f"{len(items)} {name} for {len(sample.boxes)} boxes; expected one per box"
    judged: list[Question | Statement] = [*sample.questions, *sample.statements]
    yield from (f"the text of {item.id} is empty" for item in judged if not item.text.strip())


def _box_problems(name: str, box: Box) -> Iterator[str]:
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        numbers = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        yield f"{name} is {numbers}; expected 0 <= x1 < x2 <= 1 and the same for y (shares of the image)"


def _decode(images: Iterable[ImageFile]) -> Iterator[tuple[int, int] | str]:
    """Width and height of every image that decodes, a line for each that does not; in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_size, images)


def _size(file: ImageFile) -> tuple[int, int] | str:
    try:
        return load_image(file).size
    except ImageError as error:
        return f"{file}: {error}"


def _counts(seen: _Seen, report: Report) -> dict[str, str]:
    return {
        "records": f"{seen.samples:,}",
        "images": f"{len(seen.sizes) + seen.broken:,}",
        "images that decode": f"{len(seen.sizes):,}",
        "captions": f"{len(seen.words):,}",
        "different captions": f"{len(seen.captions):,}",
        "captions per record": _range(seen.captions_per_record),
        "words per caption": _range(seen.words),
        f"captions cut at {_MAX_WORDS} words": f"{sum(n > _MAX_WORDS for n in seen.words):,}",
        **{name: f"{number:,}" for name, number in seen.other.items() if number},
        "image width": _range([width for width, _ in seen.sizes], "px"),
        "image height": _range([height for _, height in seen.sizes], "px"),
        "problems": f"{len(report.problems):,}",
    }


def _range(values: Sequence[int], unit: str = "") -> str:
    """Smallest, median and largest."""
    if not values:
        return "–"
    text = f"{min(values)}" if min(values) == max(values) else f"{min(values)} … {median(values):g} … {max(values)}"
    return f"{text} {unit}".rstrip()
