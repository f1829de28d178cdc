"""Words of caption English, their possible parts of speech and their base forms; rules for those not listed.

The lists (nouns.txt, verbs.txt, adjectives.txt: base forms, `~` behind one that is rarely of that class; closed.json:
the closed classes, complete; irregular.json: irregular forms) are written for captions. transitions.json holds how much
more often than by chance one part of speech follows another in captions, as natural logarithms: counted on 5,000
captions of Flickr8k's training split as spaCy tags them, cut at ±5 and rounded to one decimal.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from functools import lru_cache
from importlib.resources import files
from math import log

DET, NUM, ADJ, NOUN, PRON, VERB, ING, PART, AUX, PREP, ADV, CONJ, SUB, POSS, INF, STOP = TAGS = tuple(
    "DQANOVGEXPRCWSI,"
)
"""Determiner, number or quantity, adjective, noun, pronoun, verb in a finite or base form, -ing form, past form or
participle, auxiliary, preposition, adverb, conjunction, subordinator or question word, possessive 's, infinitive's to,
punctuation."""

MEMBERS = ("nouns.txt", "verbs.txt", "adjectives.txt", "closed.json", "irregular.json", "transitions.json")
_RARE = log(0.12)
_NAMES = {
    "determiners": DET,
    "questions": DET,
    "numbers": NUM,
    "quantities": NUM,
    "pronouns": PRON,
    "auxiliaries": AUX,
    "prepositions": PREP,
    "adverbs": ADV,
    "conjunctions": CONJ,
    "subordinators": SUB,
}
_CLOSED_RARELY = {("but", PREP), ("like", ADV), ("that", DET), ("before", SUB), ("after", SUB), ("until", SUB)}
_ALSO = {
    "one": {PRON: 0.0},
    "to": {INF: 0.0},
    "her": {PRON: _RARE},
    "'s": {POSS: 0.0, AUX: _RARE},
    "can": {NOUN: _RARE},
}
_ALSO |= {"like": {VERB: _RARE}, "which": {SUB: 0.0}, "what": {SUB: 0.0}, "whose": {SUB: _RARE}}
_NOT_DOUBLED = re.compile(r"(?:qu|[^aeiou])[aeiou][^aeiouwxy]$")
_SYLLABLE = re.compile(r"[aeiouy]+")
_DOUBLED_ANYWAY = frozenset({"begin", "control", "equip", "refer", "prefer", "admit", "commit", "zigzag", "kidnap"})
_SUFFIXES = (
    (re.compile(r"^[$#]?\d[\d.,:]*(?:st|nd|rd|th|s)?$"), {NUM: 0.0}),
    (re.compile(r"-(?:\w+ed|haired|skinned|eyed|colou?red|like|shaped|clad|size|foot|year)$"), {ADJ: 0.0}),
    (re.compile(r"ing$"), {ING: 0.0, NOUN: _RARE}),
    (re.compile(r"ed$"), {PART: 0.0, ADJ: _RARE}),
    (re.compile(r"ly$"), {ADV: 0.0, ADJ: _RARE}),
    (re.compile(r"(?:ful|ous|ish|ic|al|ive|able|ible|less|ary|ese|most)$"), {ADJ: 0.0, NOUN: _RARE}),
    (re.compile(r"[^aeious]y$"), {NOUN: 0.0, ADJ: -1.0}),
    (re.compile(r"[^siu]s$"), {NOUN: 0.0, VERB: _RARE}),
)
_UNKNOWN = {NOUN: 0.0, ADJ: _RARE, VERB: _RARE}


class Lexicon:
    """Parts of speech and base forms. One is shared by all: see `lexicon`."""

    def __init__(self) -> None:
        self._tags: dict[str, dict[str, float]] = defaultdict(dict)
        self._nouns: dict[str, str] = {}
        self._verbs: dict[str, str] = {}
        closed, irregular = json.loads(_read("closed.json")), json.loads(_read("irregular.json"))
        self.follows: dict[str, dict[str, float]] = json.loads(_read("transitions.json"))
        """follows[a][b]: log of how much more often than by chance b comes behind a; `^` is the caption's start."""
        self.measures = frozenset(closed["measures"].split())
        """Nouns that another one follows with `of`: a group of people."""
        self.questions = frozenset(closed["questions"].split())
        self._adjectives: dict[str, str] = {}
        self.long_prepositions = _by_first_word(closed["phrasal_prepositions"])
        """First word → the prepositions of several words that start with it, the longest first, as words."""
        self._irregular_nouns: dict[str, str] = irregular["nouns"]
        self._add_verbs(irregular["verbs"])
        self._add_nouns()
        self._add_adjectives()
        self._add_closed(closed)

    def tags(self, word: str) -> dict[str, float]:
        """Part of speech → log-likelihood up to a constant, for a word in lower case."""
        known = self._tags.get(word)
        if known:
            return known
        return next((tags for pattern, tags in _SUFFIXES if pattern.search(word)), _UNKNOWN)

    def noun(self, word: str) -> str:
        """The singular."""
        return self._nouns.get(word) or self._irregular_nouns.get(word) or _singular(word)

    def verb(self, word: str) -> str:
        """The infinitive."""
        return self._verbs.get(word) or self._infinitive(word)

    def attribute(self, word: str, participle: bool) -> str:
        """Base form of what stands before a noun: `older` → `old`, `smiling` → `smile`, but `striped` stays."""
        return self.verb(word) if participle and word not in self._adjectives else self.adjective(word)

    def adjective(self, word: str) -> str:
        """Without comparison: `older` → `old`."""
        return self._adjectives.get(word, word)

    def is_verb(self, word: str) -> bool:
        """Whether the word is a form of a listed verb, and maybe one here: "in" and "left" (of) are none."""
        return word in self._verbs and not {PREP, ADV} & self.tags(word).keys()

    def _infinitive(self, word: str) -> str:
        for ending in ("ing", "ed", "es", "s"):
            if word.endswith(ending) and len(word) - len(ending) >= 2:
                stem = word[: -len(ending)]
                tries = (stem, f"{stem}e", stem[:-1] if stem[-2:-1] == stem[-1] else "", f"{stem[:-1]}y")
                found = next((base for base in tries if base in self._verbs), None)
                return found or _unlisted_stem(stem)
        return word

    def _add(self, form: str, tag: str, weight: float) -> None:
        tags = self._tags[form]
        tags[tag] = max(weight, tags.get(tag, weight))

    def _add_nouns(self) -> None:
        plurals: dict[str, list[str]] = defaultdict(list)
        for plural, singular in self._irregular_nouns.items():
            plurals[singular].append(plural)
        for word, weight in _entries("nouns.txt"):
            for form in {word, *(plurals.get(word) or [_with_s(word)])}:
                self._add(form, NOUN, weight)
                self._nouns.setdefault(form, word)

    def _add_adjectives(self) -> None:
        for word, weight in _entries("adjectives.txt"):
            word = word.lower()
            self._adjectives[word] = word
            self._add(word, ADJ, weight)
            for form in _compared(word):
                self._adjectives.setdefault(form, word)
                self._add(form, ADJ, weight)

    def _add_verbs(self, irregular: str) -> None:
        odd = dict(entry.split(":", 1) for entry in irregular.split())
        weights = dict(_entries("verbs.txt"))
        for word in [*weights, *(word for word in odd if word not in weights)]:
            third, past, *participle = (*odd.get(word, "::").split(":"), "", "")[:3]
            weight = weights.get(word, 0.0)
            forms = [(word, VERB), *((form, VERB) for form in (third or _with_s(word)).split(","))]
            forms += [(form, ING) for form in _joined(word, "ing")]
            if past:
                forms += [(form, VERB if participle[0] else PART) for form in past.split(",")]
                forms += [(form, PART) for form in participle if form]
            else:
                forms += [(form, PART) for form in _joined(word, "ed")]
            for form, tag in forms:
                self._verbs.setdefault(form, word)
                # A verb that is rarely one in its base form ("a park") is a common one in -ing and -ed.
                self._add(form, tag, weight if tag == VERB else 0.0)

    def _add_closed(self, closed: dict[str, str]) -> None:
        for name in _NAMES:
            for word in [] if name == "adverbs" else closed[name].split():
                self._tags[word] = {}  # "in" is no noun whatever a list says; adverbs are often something else too
        for name, tag in _NAMES.items():
            for word in closed[name].split():
                self._add(word, tag, _RARE if (word, tag) in _CLOSED_RARELY else 0.0)
        for word, tags in _ALSO.items():
            for tag, weight in tags.items():
                self._add(word, tag, weight)


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The shipped one."""
    return Lexicon()


@lru_cache(maxsize=1)
def lexicon_hash() -> str:
    """First 12 digits of the sha256 of its files."""
    return hashlib.sha256("\0".join(_read(name) for name in MEMBERS).encode()).hexdigest()[:12]


def _read(name: str) -> str:
    return (files("vlscale.data.phrases") / name).read_text(encoding="utf-8")


def _entries(name: str) -> list[tuple[str, float]]:
    """Words with their weights; the first mention of a word counts."""
    found: dict[str, float] = {}
    for line in _read(name).splitlines():
        for word in [] if line.startswith("#") else line.split():
            found.setdefault(word.rstrip("~"), _RARE if word.endswith("~") else 0.0)
    return list(found.items())


def _by_first_word(phrases: list[str]) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for phrase in sorted(phrases, key=lambda text: -len(text.split())):
        words = tuple(phrase.split())
        found[words[0]].append(words)
    return dict(found)


def _with_s(word: str) -> str:
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"[^aeiou]o$", word) else f"{word}s"


def _joined(word: str, ending: str) -> list[str]:
    """The verb with -ing or -ed; both spellings where an l may be doubled."""
    if ending == "ed" and re.search(r"[^aeiou]y$", word):
        return [f"{word[:-1]}ied"]
    if word.endswith("ie"):
        return [f"{word[:-2]}ying" if ending == "ing" else f"{word}d"]
    if word.endswith("e") and not word.endswith(("ee", "oe", "ye")):
        return [f"{word[:-1]}{ending}"]
    if word.endswith("e") and ending == "ed":
        return [f"{word}d"]
    if _NOT_DOUBLED.search(word):
        one = len(_SYLLABLE.findall(word.replace("qu", "q"))) == 1
        if one or word in _DOUBLED_ANYWAY:
            return [f"{word}{word[-1]}{ending}"]
        if word.endswith("l"):
            return [f"{word}{ending}", f"{word}l{ending}"]
    return [f"{word}{ending}"]


def _compared(word: str) -> list[str]:
    """Comparative and superlative of a short adjective."""
    if len(_SYLLABLE.findall(word)) > 2 or "-" in word or word.endswith(("ed", "ing")):
        return []
    if re.search(r"[^aeiou]y$", word):
        return [f"{word[:-1]}ier", f"{word[:-1]}iest"]
    stem = word[:-1] if word.endswith("e") else word
    if _NOT_DOUBLED.search(word) and len(_SYLLABLE.findall(word)) == 1:
        stem += word[-1]
    return [f"{stem}er", f"{stem}est"]


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-2] if re.search(r"(?:ss|x|z|ch|sh)es$", word) else word[:-1]


def _unlisted_stem(stem: str) -> str:
    if stem[-1:] == stem[-2:-1] and stem[-1:] not in "lsfz":
        return stem[:-1]
    return f"{stem}e" if re.search(r"(?:[vcu]|[^z]z|[^aeiou]l|[aeiou]s|dg)$", stem) else stem
