"""The vocabulary of phrase concepts: its file, MVPTR's public one, and the ids of a caption's phrases."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlscale.data.phrases.base import MAX_TEXT, CaptionExtractor, PhraseTuple, is_phrase, phrase_text
from vlscale.data.phrases.registry import FROM_CAPTIONS, caption_extractor
from vlscale.data.sources.fields import FieldError, get, json_object, kind, read_json, read_lines, strings, text
from vlscale.errors import UserError

FORMAT = "vlscale-phrases-1"
MAX_BYTES = 1 << 30
MAX_ID = 1 << 31
BERT_WORDS = 30522
"""Size of BERT's vocabulary: smaller ids of MVPTR's public file are words'."""
_EXPECTED = "a vocabulary written by `vlscale data phrases`"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PhraseConcept:
    """One phrase: an attribute with its object, or a relation between two objects (MVPTR, section 3.1.1)."""

    id: int
    text: str
    words: PhraseTuple
    """(attribute, object) or (subject, relation, object)."""
    count: int
    """Sentences of the corpus that contain it; 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a vocabulary was made of."""

    extractor: str
    version: str
    """Of the extractor."""
    min_count: int
    """Sentences that a phrase needed."""
    sentences: int
    """Captions that were counted."""
    corpus: str
    """sha256 of the counted samples in their order: ids, captions and the tuples the data has itself."""


class PhraseVocabulary(Sequence[PhraseConcept]):
    """Phrase concepts in the order of their ids, which need not be without gaps."""

    def __init__(self, phrases: Iterable[PhraseConcept], origin: Origin, words: int = 0) -> None:
        """`words`: ids below are not phrases but words, and never given to a caption."""
        self._phrases = sorted(phrases, key=lambda phrase: phrase.id)
        self.origin = origin
        self._ids: dict[str, int] = {}
        for phrase in self._phrases:
            if phrase.id >= words:
                self._ids.setdefault(_key(phrase.text), phrase.id)
        self.word_ids = sum(phrase.id < words for phrase in self._phrases)
        """How many ids are words'."""

    @property
    def missing_ids(self) -> int:
        """Gaps: numbers between the smallest and the largest id that no phrase has."""
        return self._phrases[-1].id - self._phrases[0].id + 1 - len(self) if self._phrases else 0

    def __len__(self) -> int:
        return len(self._phrases)

    def __getitem__(self, index: Any) -> Any:
        """The phrase at a place (not: of an id), or those of a slice."""
        return self._phrases[index]

    def __iter__(self) -> Iterator[PhraseConcept]:
        return iter(self._phrases)

    @cached_property
    def _extractor(self) -> CaptionExtractor:
        if self.origin.extractor not in FROM_CAPTIONS:
            raise UserError(
                f"phrases: extractor {self.origin.extractor!r} can't parse unseen captions; take the phrases from the "
                ".captions.jsonl beside the vocabulary, or build it with --extractor light or parser"
            )
        extractor = caption_extractor(self.origin.extractor)
        if self.origin.version not in ("", extractor.version):
            _log.warning(
                "phrases: the vocabulary was made by %s %s, here is %s: captions may get other phrases",
                *(extractor.name, self.origin.version, extractor.version),
            )
        return extractor

    def phrases_of(self, caption: str) -> list[int]:
        """Ids of the caption's phrases, in the order they are mentioned, each once.

        Raises:
            UserError: the vocabulary's extractor needs more than the caption, or is not installed.
        """
        return self.ids_of(self._extractor.extract(caption))

    def ids_of(self, tuples: Iterable[PhraseTuple]) -> list[int]:
        """Ids of the attributes and relations among the tuples that the vocabulary has, each once."""
        keys = (_key(phrase_text(words)) for words in tuples if is_phrase(words))
        return list(dict.fromkeys(self._ids[key] for key in keys if key in self._ids))

    def save(self, path: Path) -> None:
        """Write a line of JSON for the origin, then one per phrase; equal vocabularies give equal bytes."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"format": FORMAT, **asdict(self.origin), "phrases": len(self)}) + "\n")
            for phrase in self._phrases:
                row = {"id": phrase.id, "text": phrase.text, "tuple": phrase.words, "count": phrase.count}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> PhraseVocabulary:
        """Read what `save` wrote.

        Raises:
            UserError: the file can't be read, is too large, cut off, or a line is wrong.
        """
        _check_size(path, _EXPECTED)
        lines = read_lines(path, _EXPECTED)
        phrases: list[PhraseConcept] = []
        origin, count = None, 0
        for number, line in lines:
            try:
                row = json_object(line)
                if origin is None:
                    origin, count = _origin(row), get(row, "phrases", int)
                else:
                    phrases.append(_phrase(row))
            except FieldError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
        if origin is None:
            raise UserError(f"{path}: empty; expected {_EXPECTED}")
        if len(phrases) != count:
            raise UserError(f"{path}: expected {count} phrases, got {len(phrases)}; write it anew")
        return _distinct(path, PhraseVocabulary(phrases, origin))

    @staticmethod
    def from_id2phrase(path: Path, words: int = BERT_WORDS, extractor: str = "light") -> PhraseVocabulary:
        """MVPTR's public `id2phrase` JSON: an object from id to text, or to a list of words. Ids stay as they are.

        Which words are the relation's is not in the file: the first and the last word are taken for the objects.

        Args:
            words: ids below are words of the tokenizer.
            extractor: finds the phrases of captions; SPICE did for the release.

        Raises:
            UserError: the file can't be read or is too large, or an entry is wrong.
        """
        expected = "MVPTR's id2phrase, an object from id to phrase"
        _check_size(path, expected)
        content = read_json(path, expected)
        if not isinstance(content, dict) or not content:
            raise UserError(f"{path}: expected {expected}, got {kind(content) if content != {} else 'an empty one'}")
        phrases = []
        for key, value in content.items():
            try:
                phrases.append(_public_phrase(key, value))
            except FieldError as error:
                raise UserError(f"{path}, entry {key[:60]!r}: {error}") from None
        return _distinct(path, PhraseVocabulary(phrases, Origin(extractor, "", 0, 0, ""), words))


def _key(phrase: str) -> str:
    """What counts in comparing texts: the paper joins words with hyphens where others put spaces."""
    return phrase.lower().replace("-", " ")


def _distinct(path: Path, vocabulary: PhraseVocabulary) -> PhraseVocabulary:
    ids = [phrase.id for phrase in vocabulary]
    double = next((one for one, other in pairwise(ids) if one == other), None)
    if double is not None:
        raise UserError(f"{path}: expected different ids, got {double} twice")
    return vocabulary


def _check_size(path: Path, expected: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {expected}") from None
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes; expected {expected} of at most {MAX_BYTES:,}")


def _origin(row: dict[str, Any]) -> Origin:
    if row.get("format") != FORMAT:
        raise FieldError(f'field "format": expected "{FORMAT}"; is this {_EXPECTED}?')
    extractor, version, corpus = (get(row, key, str) for key in ("extractor", "version", "corpus"))
    return Origin(extractor, version, get(row, "min_count", int), get(row, "sentences", int), corpus)


def _phrase(row: dict[str, Any]) -> PhraseConcept:
    words = strings(row, "tuple")
    if not 2 <= len(words) <= 3:
        raise FieldError(f'field "tuple": expected two or three strings, got {len(words)}')
    return PhraseConcept(_id(get(row, "id", int)), _short(text(row, "text")), words, get(row, "count", int))


def _public_phrase(key: str, value: Any) -> PhraseConcept:
    if not key.isascii() or not key.isdigit() or len(key) > 12:
        raise FieldError("expected an id, a whole number from 0")
    written = " ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value
    if not isinstance(written, str) or not written.strip():
        raise FieldError(f"expected a phrase, got {kind(value)}")
    parts = _short(written).split()
    words = (parts[0], " ".join(parts[1:-1]), parts[-1]) if len(parts) > 2 else tuple(parts)
    return PhraseConcept(_id(int(key)), " ".join(parts), words, 0)


def _id(number: int) -> int:
    if not 0 <= number < MAX_ID:
        raise FieldError(f"expected an id from 0 to {MAX_ID - 1}, got {str(number)[:20]}")
    return number


def _short(phrase: str) -> str:
    if len(phrase) > MAX_TEXT:
        raise FieldError(f"expected a phrase of at most {MAX_TEXT} characters, got {len(phrase)}")
    return phrase
