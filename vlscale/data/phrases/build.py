"""The phrase vocabulary of whole data sets, and the phrases of every caption: `vlscale data phrases`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vlscale.data.corpus import Corpus, SampleList
from vlscale.data.open import STORED, TRAINING_SPLITS, load_sources
from vlscale.data.phrases.base import Extractor, PhraseTuple, is_phrase, phrase_text
from vlscale.data.phrases.light import LightExtractor
from vlscale.data.phrases.parallel import extract_all
from vlscale.data.phrases.spice import SpiceExtractor
from vlscale.data.phrases.statistics import Statistics, Tally, summarise
from vlscale.data.phrases.vocabulary import Origin, PhraseConcept, PhraseVocabulary
from vlscale.data.recipe import excluded_aliases, kept
from vlscale.data.sample import Sample
from vlscale.data.sources.base import Notes, Source
from vlscale.data.sources.registry import read_source
from vlscale.data.sources.stored import open_stored
from vlscale.errors import UserError

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpora:
    """Data sets to take captions from, with their names."""

    names: tuple[str, ...]
    corpora: tuple[Corpus, ...]

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """The source's number, from 0, and the sample."""
        for number, corpus in enumerate(self.corpora):
            for sample in corpus.readable():
                yield number, sample

    def captions(self, splits: Sequence[str] | None = None) -> Iterator[str]:
        """All captions of the splits' samples; None: of all."""
        for _, sample in self.samples():
            if not splits or sample.split in splits:
                yield from sample.captions


@dataclass(frozen=True, slots=True)
class Built:
    """What was written, and statistics of it."""

    vocabulary: PhraseVocabulary
    statistics: Statistics
    files: tuple[Path, Path, Path]
    """The vocabulary, the captions' phrases, the statistics."""


def open_corpora(specs: Sequence[str], root: str | None = None) -> Corpora:
    """Everything that these sources hold, every split; their images need not be here.

    Raises:
        UserError: a source is wrong, or there is nothing in it.
    """
    names: list[Source] = []
    corpora: list[Corpus] = []
    for spec in specs:
        sources, excluded = load_sources(spec, root)
        aliases = excluded_aliases(excluded)
        for source in sources:
            notes = Notes(need_images=False)
            if source.format in STORED and not aliases and source.only is None:
                corpora.append(open_stored(source))
            else:
                corpora.append(SampleList.packed(kept(read_source(source, notes), aliases, notes)))
            notes.say(source)
            names.append(source)
    short = [Path(source.path).name for source in names]
    alike = len(set(short)) < len(short)
    found = Corpora(tuple(map(str, names) if alike else short), tuple(corpora))
    if not len(found):
        raise UserError(f"{', '.join(specs)}: no sample; check the path and only=")
    return found


def build_phrases(
    corpora: Corpora,
    extractor: Extractor,
    out: Path,
    min_count: int = 50,
    splits: Sequence[str] = TRAINING_SPLITS,
    workers: int = 1,
    on_progress: Progress = lambda stage, done, total: None,
) -> Built:
    """Write the phrases that `min_count` sentences contain (MVPTR, section 3.1.1), and every caption's.

    `out` has a line of JSON for the origin and one per phrase, by count, then by text, ids from 0. Beside it lie
    `out`.captions.jsonl, a line `{"source": 0, "id": sample, "caption": number, "phrases": [ids]}` for every caption of
    every split (source: number of the source, in which the sample's id is unique; caption −1: a sample's own tuples
    where it has no caption), ids in the order of mention; and `out`.statistics.json. The same corpus gives the same
    bytes, whatever `workers`.

    Args:
        splits: those whose captions are counted; a vocabulary that has seen the test split knows too much.

    Raises:
        UserError: no sentence to count, or no phrase is that frequent.
    """
    captions_file, statistics_file = (out.with_name(out.name + end) for end in (".captions.jsonl", ".statistics.json"))
    draft = captions_file.with_name(captions_file.name + ".draft")
    counts = _Counts(corpora.names, splits)
    try:
        with draft.open("w", encoding="utf-8") as file:
            for source, sample, lists in extract_all(corpora.samples(), len(corpora), extractor, workers, on_progress):
                counts.add(source, sample, lists, file)
        _check(counts, extractor, min_count)
        vocabulary, places = counts.vocabulary(extractor, min_count)
        tallies = _write_captions(draft, captions_file, places, counts)
    finally:
        draft.unlink(missing_ok=True)
    statistics = summarise(vocabulary, tallies, counts.sentences_of)
    statistics.save(statistics_file)
    vocabulary.save(out)
    return Built(vocabulary, statistics, (out, captions_file, statistics_file))


def frequent_phrases(samples: Corpus, min_count: int) -> PhraseVocabulary:
    """The phrases that `min_count` captions of these samples contain, found by the light extractor.

    Raises:
        UserError: no phrase is that frequent.
    """
    extractor = LightExtractor()
    counts = _Counts(("training captions",), ())
    for sample in samples.readable():
        counts.count(sample, [extractor.extract(caption) for caption in sample.captions])
    vocabulary, _ = counts.vocabulary(extractor, min_count)
    if not len(vocabulary):
        most = max(counts.sentences_of, default=0)
        raise UserError(
            f"data.concepts.min_count: no phrase is in {min_count} of the {counts.sentences} training captions; the "
            f"most frequent one is in {most}: lower it"
        )
    return vocabulary


class _Counts:
    """Phrases by the order in which they first come, with the number of sentences that contain each.

    A corpus of millions of captions has millions of different phrases: some 300 bytes each are held until the rare ones
    are dropped.
    """

    def __init__(self, names: Sequence[str], splits: Sequence[str]) -> None:
        self._names = names
        self.splits = frozenset(splits)
        self.sentences = 0
        self.sentences_of: list[int] = []
        """By number of the phrase."""
        self.parts: dict[str, bool] = {}
        """Name → whether it is counted, in the order they come."""
        self.seen_splits: dict[str, None] = {}
        self._numbers: dict[str, int] = {}
        self._words: list[PhraseTuple] = []
        self._digest = hashlib.sha256()

    def add(self, source: int, sample: Sample, lists: list[list[PhraseTuple]], draft: TextIO) -> None:
        """Count a sample's phrases, and note their numbers in the draft."""
        counted = sample.split in self.splits
        part = f"{self._names[source]}, {sample.split}"
        self.parts[part] = counted
        self.seen_splits[sample.split] = None
        rows = self.count(sample, lists) if counted else self._rows(lists)
        draft.write(json.dumps([part, source, sample.id, bool(sample.captions), rows]) + "\n")

    def count(self, sample: Sample, lists: list[list[PhraseTuple]]) -> list[list[int]]:
        """Count the phrases of a sample's captions; returns their numbers."""
        rows = self._rows(lists)
        for row in rows:
            self.sentences += 1
            for number in row:
                self.sentences_of[number] += 1
        self._digest.update(json.dumps([sample.id, sample.captions, sample.tuples]).encode())
        return rows

    def _rows(self, lists: list[list[PhraseTuple]]) -> list[list[int]]:
        return [list(dict.fromkeys(self._number(words) for words in items if is_phrase(words))) for items in lists]

    def _number(self, words: PhraseTuple) -> int:
        phrase = phrase_text(words)
        number = self._numbers.get(phrase)
        if number is None:
            number = self._numbers[phrase] = len(self._words)
            self._words.append(words)
            self.sentences_of.append(0)
        return number

    def vocabulary(self, extractor: Extractor, min_count: int) -> tuple[PhraseVocabulary, list[int]]:
        """The frequent phrases; and number of a phrase → its id, −1 for the others."""
        texts = list(self._numbers)
        frequent = [number for number, count in enumerate(self.sentences_of) if count >= min_count]
        frequent.sort(key=lambda number: (-self.sentences_of[number], texts[number]))
        places = [-1] * len(texts)
        for place, number in enumerate(frequent):
            places[number] = place
        phrases = [
            PhraseConcept(place, texts[number], self._words[number], self.sentences_of[number])
            for place, number in enumerate(frequent)
        ]
        digest = self._digest.hexdigest()
        origin = Origin(extractor.name, extractor.version, min_count, self.sentences, digest)
        return PhraseVocabulary(phrases, origin), places


def _check(counts: _Counts, extractor: Extractor, min_count: int) -> None:
    if isinstance(extractor, SpiceExtractor) and extractor.missing:
        _log.warning("--spice: %d captions are not in it and get no phrases", extractor.missing)
    if not counts.sentences:
        wanted, there = ", ".join(sorted(counts.splits)), ", ".join(counts.seen_splits)
        if not counts.splits.isdisjoint(counts.seen_splits):
            raise UserError(f"no sample of the splits {wanted} has a caption; give a source with captions")
        raise UserError(f"no sample is in the splits {wanted}; there are {there}; name one with --split")
    most = max(counts.sentences_of, default=0)
    if most < min_count:
        raise UserError(
            f"no phrase occurs in {min_count} of {counts.sentences} sentences, the most frequent in {most}; "
            "lower --min-count"
        )


def _write_captions(draft: Path, out: Path, places: list[int], counts: _Counts) -> list[Tally]:
    tallies = {name: Tally(name, counted) for name, counted in counts.parts.items()}
    temporary = out.with_name(out.name + ".tmp")
    with draft.open(encoding="utf-8") as lines, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            part, source, identity, has_captions, rows = json.loads(line)
            texts = [[places[number] for number in row if places[number] >= 0] for row in rows]
            tallies[part].add(texts)
            for number, phrases in enumerate(texts):
                caption = number if has_captions else -1
                row = {"source": source, "id": identity, "caption": caption, "phrases": phrases}
                file.write(json.dumps(row) + "\n")
    os.replace(temporary, out)
    return list(tallies.values())
