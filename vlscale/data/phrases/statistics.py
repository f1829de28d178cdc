"""Statistics of phrases as MVPTR's Tables 5 and 8 give them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from vlscale.data.phrases.vocabulary import PhraseConcept, PhraseVocabulary

MOST_PHRASES = 5
"""Phrases of a text that MVPTR takes at most."""
THRESHOLDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Part:
    """A split of a source: a row of Table 5."""

    name: str
    images: int
    texts: int
    phrases: int
    """Occurrences, once per text."""
    unique: int
    per_text: float
    coverage: float
    """Share of texts with a phrase."""
    over_limit: float
    """Share of texts with more than MOST_PHRASES: the rest is cut off there."""
    frequent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of a vocabulary and the corpus it was counted on (Table 8), and of every part of the data (Table 5)."""

    all_phrases: int
    """Occurrences of valid phrases in the counted sentences, once per sentence."""
    unique_phrases: int
    mean_frequency: float
    """In sentences."""
    median_frequency: float
    per_image: float
    """Different phrases of an image's counted texts."""
    per_text: float
    coverage: float
    """Share of counted sentences with a phrase."""
    attributes: float
    """Share of attributes among the unique phrases; the rest are relations."""
    attribute_occurrences: float
    """The same among all occurrences."""
    frequent_attributes: tuple[str, ...]
    frequent_relations: tuple[str, ...]
    by_threshold: dict[str, int]
    """Sentences that a phrase needs → how many phrases there are."""
    parts: tuple[Part, ...]

    def save(self, path: Path) -> None:
        """Write them as JSON, beside the place and renamed."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)


class Tally:
    """Counts a part's texts as they come by."""

    def __init__(self, name: str, counted: bool) -> None:
        """`counted`: the part is one that the vocabulary is counted on."""
        self.name, self.counted = name, counted
        self.images = self.texts = self.phrases = self.covered = self.over = self.of_images = 0
        self._counts: Counter[int] = Counter()

    def add(self, texts: Sequence[Sequence[int]]) -> None:
        """An image's texts: the places of the phrases of each in the vocabulary."""
        self.images += 1
        self.of_images += len({phrase for text in texts for phrase in text})
        for text in texts:
            self.texts += 1
            self.phrases += len(text)
            self.covered += bool(text)
            self.over += len(text) > MOST_PHRASES
            self._counts.update(text)

    def part(self, vocabulary: PhraseVocabulary) -> Part:
        """The row."""
        texts = max(1, self.texts)
        frequent = sorted(self._counts, key=lambda place: (-self._counts[place], place))[:_EXAMPLES]
        return Part(
            name=self.name,
            images=self.images,
            texts=self.texts,
            phrases=self.phrases,
            unique=len(self._counts),
            per_text=self.phrases / texts,
            coverage=self.covered / texts,
            over_limit=self.over / texts,
            frequent=tuple(vocabulary[place].text for place in frequent),
        )


def summarise(vocabulary: PhraseVocabulary, tallies: Sequence[Tally], counts: Sequence[int]) -> Statistics:
    """All statistics.

    Args:
        tallies: one per part.
        counts: sentences of every phrase that was found, whether it is in the vocabulary or not.
    """
    counted = [tally for tally in tallies if tally.counted]
    texts, images = (max(1, sum(getattr(tally, name) for tally in counted)) for name in ("texts", "images"))
    attributes, relations = _of_length(vocabulary, 2), _of_length(vocabulary, 3)
    frequencies = [phrase.count for phrase in vocabulary]
    occurrences = sum(frequencies)
    return Statistics(
        all_phrases=occurrences,
        unique_phrases=len(vocabulary),
        mean_frequency=occurrences / max(1, len(vocabulary)),
        median_frequency=float(median(frequencies)) if frequencies else 0.0,
        per_image=sum(tally.of_images for tally in counted) / images,
        per_text=occurrences / texts,
        coverage=sum(tally.covered for tally in counted) / texts,
        attributes=len(attributes) / max(1, len(vocabulary)),
        attribute_occurrences=sum(phrase.count for phrase in attributes) / max(1, occurrences),
        frequent_attributes=tuple(phrase.text for phrase in attributes[:_EXAMPLES]),
        frequent_relations=tuple(phrase.text for phrase in relations[:_EXAMPLES]),
        by_threshold={str(least): sum(count >= least for count in counts) for least in THRESHOLDS},
        parts=tuple(tally.part(vocabulary) for tally in tallies),
    )


def _of_length(vocabulary: PhraseVocabulary, length: int) -> list[PhraseConcept]:
    return [phrase for phrase in vocabulary if len(phrase.words) == length]
