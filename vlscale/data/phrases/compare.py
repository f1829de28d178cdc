"""How two extractors agree on the same captions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vlscale.data.phrases.base import CaptionExtractor, PhraseTuple, is_phrase

KINDS = {1: "object", 2: "attribute", 3: "relation"}
"""Length of a tuple → what it is."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Tuples of one kind, summed over captions (micro)."""

    kind: str
    found: int
    """By the extractor."""
    expected: int
    """By the reference."""
    both: int

    @property
    def precision(self) -> float:
        """Share of what was found that the reference has; 0 where nothing was found."""
        return self.both / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Share of what the reference has that was found; 0 where it has nothing."""
        return self.both / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        total = self.found + self.expected
        return 2 * self.both / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Side:
    """What one extractor gives on the captions."""

    name: str
    version: str
    phrases_per_caption: float
    coverage: float
    """Share of captions with a phrase."""
    captions_per_second: float
    """CPU time of this process."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An extractor against a reference."""

    captions: int
    agreement: tuple[Agreement, ...]
    """Objects, attributes, relations, and phrases: the last two together."""
    extractor: Side
    reference: Side


def compare(
    extractor: CaptionExtractor,
    reference: CaptionExtractor,
    captions: Sequence[str],
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Comparison:
    """Agreement of tuples that are equal to the letter, caption by caption."""
    found, one = _run(extractor, captions, on_progress)
    expected, other = _run(reference, captions, on_progress)
    rows = [_agreement(name, found, expected, {length}) for length, name in KINDS.items()]
    return Comparison(len(captions), (*rows, _agreement("phrase", found, expected, {2, 3})), one, other)


def some_captions(captions: Iterable[str], count: int, seed: int = 0) -> list[str]:
    """At most `count` captions drawn at random, in their order."""
    everything = list(captions)
    if len(everything) <= count:
        return everything
    chosen = sorted(random.Random(seed).sample(range(len(everything)), count))
    return [everything[index] for index in chosen]


def _run(
    extractor: CaptionExtractor, captions: Sequence[str], on_progress: Callable[[str, int, int], None]
) -> tuple[list[set[PhraseTuple]], Side]:
    tuples: list[set[PhraseTuple]] = []
    started = time.process_time()
    for number, caption in enumerate(captions, start=1):
        tuples.append(set(extractor.extract(caption)))
        if number % 100 == 0:
            on_progress(extractor.name, number, len(captions))
    seconds = time.process_time() - started
    phrases = [sum(map(is_phrase, items)) for items in tuples]
    total = max(1, len(captions))
    side = Side(
        extractor.name,
        extractor.version,
        sum(phrases) / total,
        sum(count > 0 for count in phrases) / total,
        len(captions) / max(seconds, 1e-9),
    )
    return tuples, side


def _agreement(
    name: str, found: list[set[PhraseTuple]], expected: list[set[PhraseTuple]], lengths: set[int]
) -> Agreement:
    pairs = [
        ({item for item in one if len(item) in lengths}, {item for item in other if len(item) in lengths})
        for one, other in zip(found, expected, strict=True)
    ]
    sums = (sum(len(one) for one, _ in pairs), sum(len(other) for _, other in pairs))
    return Agreement(name, *sums, sum(len(one & other) for one, other in pairs))
