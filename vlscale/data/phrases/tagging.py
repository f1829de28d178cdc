"""A caption's tokens with their parts of speech: the likeliest sequence under the lexicon (Viterbi)."""

from __future__ import annotations

import re
from typing import NamedTuple

from vlscale.data.phrases.base import shortened
from vlscale.data.phrases.lexicon import PREP, STOP, Lexicon

_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|m|d)\b|[^\W_]+(?:[-.&][^\W_]+)*|[$#]?\d[\d.,]*|[,;:.!?()\"]|&")
_CONTRACTION = re.compile(r"(?<=\w)n't\b")
_CLAUSE_MARKS = frozenset(';:.!?()"')


class Token(NamedTuple):
    """A word, a preposition of several words, or a punctuation mark."""

    text: str
    """In lower case."""
    tag: str
    """One of `lexicon.TAGS`."""

    @property
    def ends_clause(self) -> bool:
        return self.text in _CLAUSE_MARKS


def tag(caption: str, lexicon: Lexicon) -> list[Token]:
    """The caption's tokens; prepositions of several words ("in front of") are one."""
    words = _merged(tokens(caption), lexicon)
    return [Token(_bare(word), kind) for word, kind in zip(words, _likeliest(words, lexicon), strict=True)]


def tokens(caption: str) -> list[str]:
    """Words and punctuation marks, in lower case; `'s` and `n't` stand alone."""
    text = shortened(caption).lower().replace("’", "'").replace("`", "'")
    return _TOKEN.findall(_CONTRACTION.sub(" n't", text))


def _bare(word: str) -> str:
    """A preposition of several words without its article: `in the middle of` → `in middle of`."""
    return word.replace(" the ", " ")


def _merged(words: list[str], lexicon: Lexicon) -> list[str]:
    merged: list[str] = []
    place = 0
    while place < len(words):
        choices = lexicon.long_prepositions.get(words[place], ())
        found = next((phrase for phrase in choices if tuple(words[place : place + len(phrase)]) == phrase), None)
        merged.append(" ".join(found) if found else words[place])
        place += len(found) if found else 1
    return merged


def _likeliest(words: list[str], lexicon: Lexicon) -> list[str]:
    """Viterbi: the sequence of tags with the highest sum of word weights and transition weights."""
    paths: dict[str, tuple[float, tuple]] = {"^": (0.0, ())}  # tag → score, chain of (tag, earlier chain)
    for word in words:
        if not word[0].isalnum() and word[0] not in "'$#&":
            choices = {STOP: 0.0}
        elif " " in word:
            choices = {PREP: 0.0}
        else:
            choices = lexicon.tags(word)
        following: dict[str, tuple[float, tuple]] = {}
        for kind, weight in choices.items():
            score, before = max(
                ((score + lexicon.follows[last][kind], last) for last, (score, _) in paths.items()),
                key=lambda scored: scored[0],
            )
            following[kind] = (score + weight, (kind, paths[before][1]))
        paths = following
    chain = max(paths.values(), key=lambda path: path[0])[1]
    found: list[str] = []
    while chain:
        found.append(chain[0])
        chain = chain[1]
    return found[::-1]
