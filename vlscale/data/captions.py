"""Captions as evaluation sees them, with the phrases of those systems that read phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlscale.config import Data
from vlscale.data.answers import load_answers, spelled
from vlscale.data.concepts import encode_texts_with_phrases, load_phrases, with_phrases
from vlscale.data.sample import Vocabulary
from vlscale.data.text import TextTokenizer


class CaptionEncoder:
    """Captions → the text fields of a Batch."""

    def __init__(self, data: Data, tokenizer: TextTokenizer) -> None:
        """Reads the vocabulary of phrases, where the data has one.

        Raises:
            UserError: it can't be read.
        """
        self._concepts, self._tokenizer = data.concepts, tokenizer
        self._phrases = None if data.concepts is None else load_phrases(data.concepts)

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, [B, L] int64; with `data.concepts` `phrase_places` and `phrase_words` too.

        Raises:
            UserError: as `PhraseRows.of_caption`.
        """
        if self._concepts is None:
            input_ids, mask = self._tokenizer.encode(captions)
            return {"input_ids": input_ids, "attention_mask": mask}
        return encode_texts_with_phrases(captions, self._concepts, self._tokenizer, self._phrases)._asdict()


def vocabulary_of(tokenizer: TextTokenizer, data: Data, answers: Path | None = None) -> Vocabulary:
    """What a system is built for: the words, the phrases where the data has them, the answers of a task.

    Raises:
        UserError: a vocabulary can't be read.
    """
    words = tokenizer.vocabulary
    if data.concepts is not None:
        words = with_phrases(tokenizer, load_phrases(data.concepts))
    if answers is None:
        return words
    pieces = answer_pieces(load_answers(answers), tokenizer)
    return replace(words, answer_pieces=tuple(tuple(one) or (words.mask,) for one in pieces))


def answer_pieces(answers: Sequence[str], tokenizer: TextTokenizer) -> list[list[int]]:
    """Word pieces of each answer; of one that has no token, such as a digit where all captions spell it, its words'."""
    texts = [answer if tokenizer.knows(answer) else spelled(answer) for answer in answers]
    return [pieces.ids for pieces in tokenizer.pieces(texts)]
