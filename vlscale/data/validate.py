"""Is this data set what it should be? Every line, every image and every caption, with everything that is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from vlscale.config import Tokenizer
from vlscale.data.images import ImageError, load_image
from vlscale.data.sample import ImageFile, Sample
from vlscale.data.sources import annotation_file
from vlscale.data.sources.jsonl import Line, scan_jsonl
from vlscale.data.text import clean_caption

_CHUNK = 512
_MAX_WORDS: int = Tokenizer.model_fields["max_words"].default


@dataclass
class Report:
    """What a data set holds and what is wrong with it."""

    file: Path
    counts: dict[str, str] = field(default_factory=dict)
    """Name → number (with its unit or range), in the order to print them."""
    splits: dict[str, int] = field(default_factory=dict)
    """Records per split."""
    problems: list[str] = field(default_factory=list)
    """One line each, naming the line or image; empty when all is well."""


def validate(
    path: str | Path, image_root: str | Path | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Report:
    """Read every record, decode every image, check every caption; `on_progress(images done, images in all)`.

    Raises:
        UserError: the file or the image root can't be read at all. What is wrong inside is in the report.
    """
    file = annotation_file(path)
    lines = list(scan_jsonl(file, None if image_root is None else Path(image_root).expanduser()))
    records = [(line, line.sample) for line in lines if line.sample is not None]
    samples = [sample for _, sample in records]
    report = Report(file, splits=dict(Counter(sample.split for sample in samples).most_common()))
    report.problems += [line.error for line in lines if line.sample is None]
    if not lines:
        report.problems.append(f"{file}: holds no record")
    report.problems += _repeated(records)
    for line, sample in records:
        report.problems += [f"line {line.number}: {problem}" for problem in _record_problems(sample)]
    sizes, broken = _decode(list(dict.fromkeys(sample.image for sample in samples)), on_progress)
    report.problems += broken
    report.counts = {
        "lines": f"{len(lines):,}",
        "records": f"{len(samples):,}",
        "images": f"{len(sizes) + len(broken):,}",
        "images that decode": f"{len(sizes):,}",
        **_caption_counts(samples),
        "boxes": f"{sum(len(sample.boxes) for sample in samples):,}",
        "tuples": f"{sum(len(sample.tuples) for sample in samples):,}",
        "image width": _range([width for width, _ in sizes], "px"),
        "image height": _range([height for _, height in sizes], "px"),
        "problems": f"{len(report.problems):,}",
    }
    return report


def _repeated(records: Sequence[tuple[Line, Sample]]) -> Iterator[str]:
    """Ids and images that occur on several lines."""
    ids: dict[str, int] = {}
    images: dict[ImageFile, int] = {}
    for line, sample in records:
        first = ids.setdefault(sample.id, line.number)
        where = images.setdefault(sample.image, line.number)
        if where != line.number:
            yield f"line {line.number}: {sample.image} is on line {where} already; put its captions into one record"
        elif first != line.number:
            yield f"line {line.number}: id {sample.id!r} is on line {first} already; ids are unique"


def _record_problems(sample: Sample) -> Iterator[str]:
    if not sample.captions:
        yield "no captions; training and retrieval leave the record out"
    for number, caption in enumerate(sample.captions, start=1):
        if not clean_caption(caption, _MAX_WORDS):
            yield f"caption {number} is empty once cleaned: {caption[:40]!r}"
    for number, (x1, y1, x2, y2) in enumerate(sample.boxes, start=1):
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            box = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
            yield f"box {number} is {box}; expected 0 <= x1 < x2 <= 1 and the same for y (shares of the image)"
    if sample.boxes and sample.tags and len(sample.boxes) != len(sample.tags):
        yield f"{len(sample.tags)} tags for {len(sample.boxes)} boxes; expected one per box"


def _decode(
    images: Sequence[ImageFile], on_progress: Callable[[int, int], None] | None
) -> tuple[list[tuple[int, int]], list[str]]:
    """Width and height of every image that decodes, and one line for each that does not."""
    sizes: list[tuple[int, int]] = []
    broken: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), _CHUNK):
            for outcome in pool.map(_size, images[start : start + _CHUNK]):
                (broken if isinstance(outcome, str) else sizes).append(outcome)  # type: ignore[arg-type]
            if on_progress is not None:
                on_progress(min(start + _CHUNK, len(images)), len(images))
    return sizes, broken


def _size(path: ImageFile) -> tuple[int, int] | str:
    try:
        return load_image(path).size
    except ImageError as error:
        return f"{path}: {error}"


def _caption_counts(samples: Sequence[Sample]) -> dict[str, str]:
    captions = [caption for sample in samples for caption in sample.captions]
    words = [len(clean_caption(caption, len(caption) + 1).split()) for caption in captions]
    return {
        "captions": f"{len(captions):,}",
        "different captions": f"{len(set(captions)):,}",
        "captions per record": _range([len(sample.captions) for sample in samples]),
        "words per caption": _range(words),
        f"captions cut at {_MAX_WORDS} words": f"{sum(n > _MAX_WORDS for n in words):,}",
    }


def _range(values: Sequence[int], unit: str = "") -> str:
    """Smallest, median and largest."""
    if not values:
        return "–"
    text = f"{min(values)}" if min(values) == max(values) else f"{min(values)} … {median(values):g} … {max(values)}"
    return f"{text} {unit}".rstrip()
