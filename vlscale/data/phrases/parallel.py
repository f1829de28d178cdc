"""Extraction in several processes, in the order of the samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

from vlscale.data import workers as processes
from vlscale.data.phrases.base import CaptionExtractor, Extractor, PhraseTuple
from vlscale.data.phrases.registry import FROM_CAPTIONS, caption_extractor
from vlscale.data.sample import Sample

CHUNK = 256
"""Samples that a process takes at once."""
_AHEAD = 4
"""Chunks per process that wait: enough to keep it busy, few enough for the memory."""
_WORTH = {"light": 20_000, "parser": 500}
"""Samples per process below which starting it costs more than it saves."""

Extracted = tuple[int, Sample, list[list[PhraseTuple]]]


def extract_all(
    samples: Iterable[tuple[int, Sample]],
    total: int,
    extractor: Extractor,
    workers: int,
    on_progress: Callable[[str, int, int], None],
) -> Iterator[Extracted]:
    """Number of the source, sample and the tuples of its captions, in the order of the samples.

    Args:
        total: samples, for the progress.
        workers: processes at most; extractors that look tuples up need no more than this one.
    """
    alone = extractor.name not in FROM_CAPTIONS or min(workers, total // _WORTH[extractor.name]) < 2
    found = (
        _one_by_one(samples, extractor)
        if alone
        else _pooled(samples, extractor.name, min(workers, total // _WORTH[extractor.name]))
    )
    for number, item in enumerate(found, start=1):
        yield item
        if number % CHUNK == 0 or number == total:
            on_progress("extracting", number, total)


def _one_by_one(samples: Iterable[tuple[int, Sample]], extractor: Extractor) -> Iterator[Extracted]:
    for source, sample in samples:
        yield source, sample, extractor.of_sample(sample)


def _pooled(samples: Iterable[tuple[int, Sample]], name: str, workers: int) -> Iterator[Extracted]:
    stream = iter(samples)
    waiting: deque[tuple[list[tuple[int, Sample]], Future[list[list[list[PhraseTuple]]]]]] = deque()
    pool = ProcessPoolExecutor(workers, processes.context(), _start, (name,))
    try:
        while True:
            while len(waiting) < workers * _AHEAD and (chunk := list(islice(stream, CHUNK))):
                waiting.append((chunk, pool.submit(_extract, [sample.captions for _, sample in chunk])))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            for (source, sample), lists in zip(chunk, future.result(), strict=True):
                yield source, sample, lists
    finally:
        pool.shutdown(cancel_futures=True)


_extractor: CaptionExtractor | None = None


def _start(name: str) -> None:
    global _extractor
    processes.start_worker(0)
    _extractor = caption_extractor(name)


def _extract(chunk: list[tuple[str, ...]]) -> list[list[list[PhraseTuple]]]:
    assert _extractor is not None
    return [[_extractor.extract(caption) for caption in captions] for captions in chunk]
