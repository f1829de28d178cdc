"""Annotated phrases as tokens: which word pieces of a caption, cleaned and cut as systems see it, say a phrase.

An annotation counts the words of the caption as it was written. Cleaning drops some of them ("," alone), makes two of
others ("T-shirt") and joins none, so places are found by cleaning what stands before a phrase and what ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlscale.config import Data
from vlscale.data.concepts import encode_texts, load_phrases
from vlscale.data.sample import Phrase, Sample
from vlscale.data.text import Pieces, TextTokenizer, clean_caption


class Annotated(NamedTuple):
    """A caption of a sample, and phrases of it."""

    sample: Sample
    caption: int
    """Which one of the sample's."""
    phrases: tuple[Phrase, ...]
    """Each stands in it: `phrase_words` is not None."""

    @property
    def text(self) -> str:
        """The caption as it was written."""
        return self.sample.captions[self.caption]


class SpokenTexts(NamedTuple):
    """Captions as tensors, with where their phrases stand; B captions of at most S phrases."""

    fields: dict[str, Tensor]
    """Text fields of a Batch."""
    spans: Tensor
    """[B, S, L] bool: the tokens that say each phrase; none where cleaning or cutting left nothing of it."""
    concepts: list[list[str]]
    """The phrase concepts of each caption, in the order of their slots; none where the data has no `concepts`."""


class SpanEncoder:
    """Annotated captions → `SpokenTexts`, cleaned and cut as evaluation sees them."""

    def __init__(self, data: Data, tokenizer: TextTokenizer, with_concepts: bool = False) -> None:
        """Reads the vocabulary of phrase concepts, where the data has one.

        Args:
            with_concepts: a phrase concept that a phrase says alone, without the rest of the caption, belongs to it.

        Raises:
            UserError: the vocabulary can't be read.
        """
        self._data, self._tokenizer, self._with_concepts = data, tokenizer, with_concepts
        self._concepts = None if data.concepts is None else load_phrases(data.concepts)

    def __call__(self, captions: Sequence[Annotated]) -> SpokenTexts:
        """Encode captions.

        Raises:
            UserError: as `PhraseRows.of_caption`.
        """
        fields, numbers = self._encoded(captions)
        ids = fields["input_ids"]
        most = max((len(one.phrases) for one in captions), default=0)
        spans = torch.zeros(len(captions), most, ids.shape[1], dtype=torch.bool)
        pieces = self._tokenizer.pieces([one.text for one in captions])
        for row, (one, own) in enumerate(zip(captions, pieces, strict=True)):
            for slot, phrase in enumerate(one.phrases):
                said = phrase_words(one.text, phrase)
                assert said is not None
                spans[row, slot, tokens_of(said, own, self._room)] = True
                if self._with_concepts:
                    spans[row, slot, self._said_concepts(one, phrase, numbers[row], ids[row])] = True
        texts = self._concepts.texts if self._concepts else []
        return SpokenTexts(fields, spans, [[texts[number] for number in own] for own in numbers])

    @property
    def _room(self) -> int:
        """Word pieces of a text, its special tokens left out."""
        if self._data.concepts is not None:
            return self._data.concepts.max_words - 2
        return self._tokenizer.max_tokens - (2 if self._tokenizer.options.sep else 1)

    def _encoded(self, captions: Sequence[Annotated]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Text fields, and the numbers of each caption's phrase concepts."""
        texts, concepts = [one.text for one in captions], self._data.concepts
        if concepts is None:
            ids, mask = self._tokenizer.encode(texts)
            return {"input_ids": ids, "attention_mask": mask}, [[] for _ in texts]
        known = self._concepts
        numbers = [known.of_caption(one.text, one.sample)[: concepts.max_phrases] if known else [] for one in captions]
        return encode_texts(texts, numbers, concepts, self._tokenizer, known)._asdict(), numbers

    def _said_concepts(self, one: Annotated, phrase: Phrase, numbers: Sequence[int], ids: Tensor) -> Tensor:
        """[L] bool: where the caption's concepts stand that the phrase's words alone give too."""
        alone = self._concepts.of_caption(phrase.text, one.sample) if self._concepts else []
        said = [self._tokenizer.vocabulary.size + number for number in set(alone) & set(numbers)]
        return torch.isin(ids, torch.tensor(said, dtype=torch.int64))


def phrase_words(caption: str, phrase: Phrase) -> range | None:
    """Numbers of the cleaned caption's words that say a phrase, before any cut; empty where cleaning leaves none.

    A phrase that ends inside a word takes the part of it that cleaning makes a word of its own, else all of it.

    Returns:
        None where the phrase has no place in the caption, or other words stand there.
    """
    words = caption.split(" ")
    if not 0 <= phrase.first_word < len(words):
        return None
    start = sum(len(word) + 1 for word in words[: phrase.first_word])
    end = start + len(phrase.text)
    if not caption.startswith(phrase.text, start):  # written in another way: the same once cleaned?
        last = phrase.first_word + len(phrase.text.split(" "))
        end = start + len(" ".join(words[phrase.first_word : last]))
        if _cleaned(caption[start:end]) != _cleaned(phrase.text):
            return None
    return range(len(_cleaned(caption[:start])), len(_cleaned(caption[:end])))


def tokens_of(words: range, pieces: Pieces, room: int) -> list[int]:
    """Positions in the encoded text, [CLS] at 0, of the pieces of these words that are not cut off.

    Args:
        room: word pieces that an encoded text holds.
    """
    return [1 + place for place, word in enumerate(pieces.word_of[:room]) if word in words]


def _cleaned(text: str) -> list[str]:
    cleaned = clean_caption(text, len(text) + 1)
    return cleaned.split(" ") if cleaned else []
