"""Words with phrases, tags with regions: what MVPTR reads of a sample (section 3.1), as tensors.

The text is `[CLS] words phrases [SEP]`; a phrase is one id behind those of the words. Tags are `[CLS] tags [SEP]`, and
regions are their detector's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlscale.config import Concepts, Data
from vlscale.data.concept_regions import RegionInputs, region_inputs, stacked_regions
from vlscale.data.phrases.lexicon import lexicon
from vlscale.data.phrases.own import DataExtractor
from vlscale.data.phrases.vocabulary import FORMAT, PhraseConcept, PhraseVocabulary
from vlscale.data.regions import MIN_CONFIDENCE
from vlscale.data.sample import Sample, Vocabulary
from vlscale.data.text import Pieces, TextTokenizer, clean_caption

_WORDS = re.compile(r"[^\W_]+")


class PhraseRows:
    """The phrases of a vocabulary by number, 0 to P − 1 in the order of their ids, whatever those are."""

    def __init__(self, vocabulary: PhraseVocabulary) -> None:
        self.vocabulary = vocabulary
        self.concepts: Sequence[PhraseConcept] = vocabulary[vocabulary.word_ids :]
        """By number; MVPTR's file may list the tokenizer's words before them."""
        self._numbers = {phrase.id: number for number, phrase in enumerate(self.concepts)}
        self.texts: list[str] = [phrase.text for phrase in self.concepts]
        """Text of each phrase."""

    def __len__(self) -> int:
        return len(self.texts)

    def of_caption(self, caption: str, sample: Sample | None = None) -> list[int]:
        """Numbers of the caption's phrases, in the order they are mentioned, each once.

        A vocabulary made of the data's own tuples reads those of `sample`, the caption's.

        Raises:
            UserError: the vocabulary's extractor needs more than the caption, or is not installed.
        """
        if sample is not None and self.vocabulary.origin.extractor == DataExtractor.name:
            (tuples,) = DataExtractor().of_sample(replace(sample, captions=(caption,)))
            ids = self.vocabulary.ids_of(tuples)
        else:
            ids = self.vocabulary.phrases_of(caption)
        return [self._numbers[identity] for identity in ids]


def load_phrases(concepts: Concepts) -> PhraseRows | None:
    """The vocabulary that the recipe names; None where it names none.

    Raises:
        UserError: the file can't be read, or is no such vocabulary.
    """
    if concepts.phrases is None:
        return None
    path = Path(concepts.phrases).expanduser()
    public = path.suffix == ".json" and path.is_file() and FORMAT.encode() not in _start(path)
    return PhraseRows(PhraseVocabulary.from_id2phrase(path) if public else PhraseVocabulary.load(path))


def with_phrases(tokenizer: TextTokenizer, phrases: PhraseRows | None) -> Vocabulary:
    """The vocabulary of words, with the word pieces of every phrase.

    A phrase of which cleaning leaves nothing counts as [MASK].
    """
    vocabulary = tokenizer.vocabulary
    pieces = tokenizer.pieces(phrases.texts) if phrases else []
    return replace(vocabulary, phrase_pieces=tuple(tuple(one.ids) or (vocabulary.mask,) for one in pieces))


class TextInputs(NamedTuple):
    """Texts with their phrases; L = max_words + max_phrases, P = max_phrases."""

    input_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    phrase_places: Tensor
    """[B, L] int64, as in `Batch`."""
    phrase_words: Tensor
    """[B, P, L] bool, as in `Batch`."""


def encode_texts_with_phrases(
    captions: Sequence[str], concepts: Concepts, tokenizer: TextTokenizer, phrases: PhraseRows | None
) -> TextInputs:
    """Captions as evaluation sees them: each with the first of its phrases.

    Raises:
        UserError: as `PhraseRows.of_caption`.
    """
    numbers = [phrases.of_caption(caption)[: concepts.max_phrases] if phrases else [] for caption in captions]
    return encode_texts(captions, numbers, concepts, tokenizer, phrases)


def encode_texts(
    captions: Sequence[str],
    numbers: Sequence[Sequence[int]],
    concepts: Concepts,
    tokenizer: TextTokenizer,
    phrases: PhraseRows | None,
) -> TextInputs:
    """Captions with given phrases: [CLS] words phrases [SEP] and padding.

    Args:
        numbers: of each caption's phrases, at most `max_phrases`.
    """
    v, length = tokenizer.vocabulary, concepts.max_words + concepts.max_phrases
    ids = np.full((len(captions), length), v.pad, dtype=np.int64)
    mask, places = np.zeros_like(ids), np.zeros_like(ids)
    words = np.zeros((len(captions), concepts.max_phrases, length), dtype=np.bool_)
    room, texts = concepts.max_words - 2, phrases.texts if phrases else []
    for row, (pieces, own) in enumerate(zip(tokenizer.pieces(captions), numbers, strict=True)):
        first = 1 + min(room, len(pieces.ids))  # position of the first phrase
        content = [v.cls, *pieces.ids[:room], *(v.size + number for number in own), v.sep]
        ids[row, : len(content)] = content
        mask[row, : len(content)] = 1
        places[row, first : first + len(own)] = range(1, len(own) + 1)
        for slot, number in enumerate(own):
            words[row, slot, 1:first] = _said_by(texts[number], pieces)[:room]
    return TextInputs(*map(torch.from_numpy, (ids, mask, places, words)))


class ConceptInputs(NamedTuple):
    """What one sample gives a batch."""

    phrases: list[int]
    """Numbers of its text's phrases, at most `max_phrases`."""
    tags: list[str]
    regions: RegionInputs


class ConceptReader:
    """Samples → the fields of a Batch. Runs in the workers."""

    def __init__(self, data: Data, concepts: Concepts, tokenizer: TextTokenizer, phrases: PhraseRows | None) -> None:
        """`phrases`: not needed for images alone."""
        self._data, self._concepts, self._tokenizer, self._phrases = data, concepts, tokenizer, phrases

    def read(self, sample: Sample, caption: str = "", drawn: np.random.Generator | None = None) -> ConceptInputs:
        """What the sample gives, with one caption or none.

        Args:
            drawn: chooses among more phrases than `max_phrases`; None: the first are taken.

        Raises:
            SampleError, ImageError, UserError: as `region_inputs`.
            UserError: as `PhraseRows.of_caption`.
        """
        regions = region_inputs(sample, self._data, self._concepts)
        numbers = self._phrases.of_caption(caption, sample) if self._phrases and caption else []
        most = self._concepts.max_phrases
        if drawn is not None and len(numbers) > most:
            numbers = [numbers[place] for place in sorted(drawn.permutation(len(numbers))[:most].tolist())]
        return ConceptInputs(numbers[:most], object_tags_of(sample), regions)

    def texts(self, captions: Sequence[str], inputs: Sequence[ConceptInputs]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `phrase_places` and `phrase_words`."""
        numbers = [one.phrases for one in inputs]
        return encode_texts(captions, numbers, self._concepts, self._tokenizer, self._phrases)._asdict()

    def images(self, inputs: Sequence[ConceptInputs]) -> dict[str, Tensor]:
        """`tag_ids`, `tag_mask`, `tag_places`, `regions`, `region_mask` and `region_boxes`."""
        tags = _encode_tags([one.tags for one in inputs], self._tokenizer, self._concepts.max_tags)
        return tags | stacked_regions([one.regions for one in inputs], self._concepts)


def object_tags_of(sample: Sample) -> list[str]:
    """The sample's tags in order, each once; where confidences are known, those of MIN_CONFIDENCE and more."""
    sure = sample.confidences if len(sample.confidences) == len(sample.tags) else (1.0,) * len(sample.tags)
    return list(dict.fromkeys(tag for tag, of_tag in zip(sample.tags, sure, strict=True) if of_tag >= MIN_CONFIDENCE))


def _encode_tags(tags: Sequence[Sequence[str]], tokenizer: TextTokenizer, length: int) -> dict[str, Tensor]:
    """[CLS] tags [SEP] and padding, a row per image; tags that are the same once cleaned come once."""
    v = tokenizer.vocabulary
    ids = np.full((len(tags), length), v.pad, dtype=np.int64)
    mask, places = np.zeros_like(ids), np.zeros_like(ids)
    pieces = iter(tokenizer.pieces([tag for of_image in tags for tag in of_image]))
    for row, of_image in enumerate(tags):
        distinct = {tuple(tag.words): tag.ids for tag in (next(pieces) for _ in of_image) if tag.ids}
        numbered = [(piece, number) for number, tag in enumerate(distinct.values(), 1) for piece in tag][: length - 2]
        ids[row, : len(numbered) + 2] = [v.cls, *(piece for piece, _ in numbered), v.sep]
        mask[row, : len(numbered) + 2] = 1
        places[row, 1 : len(numbered) + 1] = [number for _, number in numbered]
    names = ("tag_ids", "tag_mask", "tag_places")
    return dict(zip(names, map(torch.from_numpy, (ids, mask, places)), strict=True))


def _said_by(phrase: str, pieces: Pieces) -> list[bool]:
    """Which pieces of the caption belong to a word that the phrase has, in whatever form.

    Every occurrence counts: a word too many hides the phrase too often, one too few gives a hidden word away.
    """
    wanted = _forms(phrase) | _forms(clean_caption(phrase, len(phrase)))  # as captions are cleaned: "u.s." is "us"
    said = [not wanted.isdisjoint(_forms(word)) for word in pieces.words]
    return [said[word] for word in pieces.word_of]


@lru_cache(maxsize=1 << 15)
def _forms(text: str) -> frozenset[str]:
    """The words of a text and everything that each may be a form of.

    Twice over: cleaned captions have "childrens" for "children's".
    """
    words = lexicon()
    forms = set(_WORDS.findall(text.lower()))
    for _ in range(2):
        forms |= {base(form) for form in forms for base in (words.noun, words.verb, words.adjective)}
    return frozenset(forms)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)
