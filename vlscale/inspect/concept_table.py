"""Concepts of a run: words of the data's tags and phrases of the vocabulary, their frequencies and embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlscale.data.concepts import PhraseRows, object_tags_of
from vlscale.data.phrases.statistics import Part, Tally
from vlscale.data.phrases.vocabulary import PhraseConcept
from vlscale.data.sample import Sample
from vlscale.data.text import UNK, TextTokenizer
from vlscale.systems.concept_attention import ConceptRows

Kind = Literal["tag", "attribute", "relation"]
KINDS: tuple[Kind, ...] = ("tag", "attribute", "relation")
FREQUENT = 12
"""Phrases of a kind that are listed."""


@dataclass(frozen=True, slots=True)
class Concept:
    """A word that images are tagged with, or a phrase."""

    name: str
    kind: Kind
    count: int
    """Images with the tag, or sentences with the phrase."""
    objects: tuple[str, ...]
    """What a phrase is about: of an attribute its object, of a relation both; of a tag itself."""


@dataclass(frozen=True, slots=True)
class ConceptTable:
    """Tags, most frequent first, then all phrases, most frequent first."""

    concepts: list[Concept]
    unit: np.ndarray
    """[N, D] float32 of length 1: embeddings, of a word of several pieces their mean."""
    of_words: np.ndarray
    """[N, D] float32 of length 1: the mean of a phrase's words, where its embedding started; of a tag itself."""
    part: Part | None
    """Phrases in this data (Table 5); None without a vocabulary."""
    frequent: dict[Kind, list[tuple[str, int]]]
    """Attributes and relations with the texts of this data that have them, the FREQUENT most frequent."""
    counted: bool
    """Whether the phrases' counts are the vocabulary's; else, where it has none, this data's."""

    def of_kind(self, *kinds: Kind) -> list[int]:
        """Rows of these kinds, most frequent first within each."""
        return [row for row, concept in enumerate(self.concepts) if concept.kind in kinds]


def concept_table(
    samples: Sequence[Sample], phrases: PhraseRows | None, tokenizer: TextTokenizer, rows: ConceptRows, name: str
) -> ConceptTable:
    """Count and look up.

    Args:
        name: of the data, for the statistics.

    Raises:
        UserError: the vocabulary can't read this data's captions.
    """
    words, embedded = (part.detach().float().cpu().numpy() for part in rows)
    tags, pieces = _tag_words(samples, tokenizer)
    tag_vectors = [words[pieces[tag]].mean(axis=0) for tag, _ in tags]
    part, counts = _phrases_in(samples, phrases, name)
    known: Sequence[PhraseConcept] = () if phrases is None else phrases.concepts
    counted = any(phrase.count for phrase in known)
    order = sorted(range(len(known)), key=lambda number: -(known[number].count if counted else counts[number]))
    concepts = [Concept(tag, "tag", count, (tag,)) for tag, count in tags]
    concepts += [_concept(known[number], known[number].count if counted else counts[number]) for number in order]
    spelt = tokenizer.pieces([known[number].text for number in order])
    of_words = [words[one.ids].mean(axis=0) if one.ids else words[tokenizer.vocabulary.mask] for one in spelt]
    width = words.shape[1]
    return ConceptTable(
        concepts,
        _unit([*tag_vectors, *embedded[order]], width),
        _unit([*tag_vectors, *of_words], width),
        part,
        {kind: _frequent(known, counts, kind) for kind in KINDS[1:]},
        counted,
    )


def _tag_words(
    samples: Sequence[Sample], tokenizer: TextTokenizer
) -> tuple[list[tuple[str, int]], dict[str, list[int]]]:
    """(word, images that have it in a tag), most frequent first, and each word's pieces; unknown words are left out."""
    images: Counter[str] = Counter()
    pieces: dict[str, list[int]] = {}
    for sample in samples:
        here: set[str] = set()
        for tag in tokenizer.pieces(object_tags_of(sample)):
            for number, word in enumerate(tag.words):
                ids = [identity for identity, of_word in zip(tag.ids, tag.word_of, strict=True) if of_word == number]
                if ids and UNK not in tokenizer.tokens(ids):
                    pieces[word] = ids
                    here.add(word)
        images.update(sorted(here))
    return images.most_common(), pieces


def _phrases_in(samples: Sequence[Sample], phrases: PhraseRows | None, name: str) -> tuple[Part | None, Counter[int]]:
    """Statistics of the samples' captions, and texts by number of the phrase; None without a vocabulary."""
    counts: Counter[int] = Counter()
    if phrases is None:
        return None, counts
    tally, first = Tally(name, counted=False), phrases.vocabulary.word_ids
    for sample in samples:
        texts = [phrases.of_caption(caption, sample) for caption in sample.captions]
        tally.add([[first + number for number in text] for text in texts])
        counts.update(number for text in texts for number in text)
    return tally.part(phrases.vocabulary), counts


def _concept(phrase: PhraseConcept, count: int) -> Concept:
    kind = _kind(phrase)
    objects = (phrase.words[0], phrase.words[-1]) if kind == "relation" else phrase.words[-1:]
    return Concept(phrase.text, kind, count, objects)


def _kind(phrase: PhraseConcept) -> Kind:
    return "relation" if len(phrase.words) > 2 else "attribute"


def _frequent(known: Sequence[PhraseConcept], counts: Counter[int], kind: Kind) -> list[tuple[str, int]]:
    found = [(known[number].text, count) for number, count in counts.most_common() if _kind(known[number]) == kind]
    return found[:FREQUENT]


def _unit(vectors: list[np.ndarray], width: int) -> np.ndarray:
    """[N, D] of length 1; 0 stays 0."""
    stacked = np.array(vectors, dtype=np.float32).reshape(-1, width)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
