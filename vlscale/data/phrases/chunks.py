"""Tagged tokens → noun chunks, verb groups, prepositions and marks, in the order of the caption."""

from __future__ import annotations

from dataclasses import dataclass

from vlscale.data.phrases.lexicon import (
    ADJ,
    ADV,
    AUX,
    CONJ,
    DET,
    ING,
    NOUN,
    NUM,
    PART,
    POSS,
    PREP,
    PRON,
    STOP,
    VERB,
    Lexicon,
)
from vlscale.data.phrases.tagging import Token

_DESCRIBES = frozenset({NUM, ADJ, ING, PART})
_BEFORE_NOUN = frozenset({DET, NUM, ADJ, ING, PART, NOUN, ADV})
_NEEDS_WORD = frozenset({"haired", "sized", "skinned", "coated", "colored", "coloured", "eyed", "shaped"})
_NEEDS_WORD |= {"covered", "filled", "lined", "capped", "soaked", "sleeved", "legged"}
"""Participles that describe with the word before them: "red haired", "snow covered"."""
_FULL = {"do": VERB, "does": VERB, "did": VERB, "doing": ING, "have": VERB, "has": VERB, "had": VERB, "having": ING}
"""Auxiliaries that are verbs where no other follows."""
_BE = frozenset({"am", "is", "are", "was", "were", "be", "been", "being", "'s", "'m", "'re"})


@dataclass(frozen=True, slots=True)
class Chunk:
    """A noun with its compounds and what describes it; a pronoun has no name."""

    name: str
    attributes: tuple[str, ...] = ()
    possessor: bool = False
    """Of the chunk that follows: "the man's dog"."""


@dataclass(frozen=True, slots=True)
class Description:
    """Adjectives without a noun: "is big and brown"."""

    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerbGroup:
    """Auxiliaries, adverbs and a verb; without a verb of its own where it is a form of `be` alone."""

    verb: str
    """Base form; empty: be."""
    form: str
    """VERB, ING or PART; AUX for be alone."""
    helped: bool
    """An auxiliary stands before it."""
    passive: bool
    """A participle with a form of be, or maybe one without."""


@dataclass(frozen=True, slots=True)
class Preposition:
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What separates: punctuation, conjunctions, subordinators, the infinitive's `to`, adverbs, others."""

    text: str
    tag: str
    ends_clause: bool = False


Item = Chunk | Description | VerbGroup | Preposition | Mark


def chunk(tokens: list[Token], lexicon: Lexicon) -> list[Item]:
    """The caption as items."""
    return _Chunker(tokens, lexicon).items()


class _Chunker:
    """Goes through the tokens once."""

    def __init__(self, tokens: list[Token], lexicon: Lexicon) -> None:
        self._tokens, self._lexicon, self._place = tokens, lexicon, 0

    def items(self) -> list[Item]:
        found: list[Item] = []
        while self._place < len(self._tokens):
            found += self._next()
        return found

    def _tag(self, offset: int = 0) -> str:
        place = self._place + offset
        return self._tokens[place].tag if place < len(self._tokens) else STOP

    def _next(self) -> list[Item]:
        token = self._tokens[self._place]
        if token.tag in {DET, NUM, ADJ, NOUN} or (token.tag in {ING, PART} and self._describes_noun()):
            return self._chunk()
        if token.tag in {AUX, VERB, ING, PART}:
            return [self._verb_group()]
        self._place += 1
        if token.tag == PREP:
            return [Preposition(token.text)]
        if token.tag == PRON:
            return [Chunk("")]
        return [] if token.tag == ADV else [Mark(token.text, token.tag, token.ends_clause)]

    def _describes_noun(self) -> bool:
        """Whether the participle here starts a noun chunk: "smiling children", where nothing stands before it."""
        before = self._tokens[self._place - 1].tag if self._place else STOP
        return before in {STOP, PREP, CONJ} and self._tag(1) in {NOUN, ADJ} and self._tag(2) not in {DET}

    def _chunk(self) -> list[Item]:
        """A noun chunk, after it its possessor's where there is one; adjectives alone are a Description."""
        before = self._tokens[self._place - 1].text if self._place else ""
        found: list[Item] = []
        attributes: list[str] = []
        nouns: list[str] = []
        determined = False
        while True:
            token, kind = self._tokens[self._place], self._tag()
            if kind == NOUN:
                nouns.append(self._lexicon.noun(token.text))
            elif kind in _DESCRIBES:
                attributes.append(self._attribute(token, nouns or attributes))
            elif kind == DET:
                determined = True
                attributes += [token.text] if token.text in self._lexicon.questions else []
            elif kind == POSS:
                found.append(Chunk(" ".join(nouns), tuple(attributes), possessor=True))
                attributes, nouns = [], []
            self._place += 1
            if not self._goes_on(bool(nouns)):
                break
        if nouns:
            return [*found, Chunk(" ".join(nouns), tuple(attributes))]
        if attributes and before in {"in", "wear", "wearing", "wears", "wore"}:
            return [*found, Chunk(attributes[-1], tuple(attributes[:-1]))]  # "a player in red"
        return [*found, Chunk("")] if determined or not attributes else [*found, Description(tuple(attributes))]

    def _goes_on(self, has_noun: bool) -> bool:
        """Whether the token here still belongs to the chunk that the one before belongs to."""
        kind, before = self._tag(), self._tag(-1)
        if kind == POSS:
            return has_noun
        if has_noun and before != POSS:
            return kind == NOUN or (self._place < len(self._tokens) and self._compound_participle())
        if kind in {NOUN, ADJ, NUM}:
            return True
        if kind in {ING, PART}:
            return self._tag(1) in _BEFORE_NOUN - {DET} or self._listed(1)
        if kind == ADV:
            return self._tag(1) in {ADJ, PART, ING, NUM}
        if kind == DET:
            return before == DET
        return self._listed(0)

    def _compound_participle(self) -> bool:
        """Whether "covered" of "snow covered field" stands here."""
        return self._tokens[self._place].text in _NEEDS_WORD and self._tag() in _DESCRIBES and self._tag(1) == NOUN

    def _listed(self, offset: int) -> bool:
        """Whether a comma or conjunction between two adjectives of one noun stands here: "black and white dog"."""
        if self._tag(offset) not in {CONJ, STOP} or self._tag(offset - 1) not in {ADJ, PART, ING}:
            return False
        place = offset + 1
        if self._tag(offset) == STOP and self._tag(place) == CONJ:
            place += 1
        if self._tag(place) not in {ADJ, PART, ING}:
            return False
        while self._tag(place) in {ADJ, PART, ING, CONJ, STOP} and place < offset + 6:
            if self._place + place >= len(self._tokens):
                return False
            place += 1
        return self._tag(place) == NOUN

    def _attribute(self, token: Token, earlier: list[str]) -> str:
        """The base form; "red haired" and "medium sized" are one, which takes the word before out of `earlier`."""
        if token.text in _NEEDS_WORD and earlier:
            return f"{earlier.pop()}-{token.text}"
        return self._lexicon.attribute(token.text, token.tag in {ING, PART})

    def _verb_group(self) -> VerbGroup:
        helpers: list[str] = []
        while self._tag() in {AUX, ADV} or (self._tag() == VERB and self._tag(1) == AUX):
            if self._tag() == AUX:
                helpers.append(self._tokens[self._place].text)
            self._place += 1
        kind = self._tag()
        if kind not in {VERB, ING, PART}:
            if helpers and helpers[-1] in _FULL:
                return VerbGroup(self._lexicon.verb(helpers[-1]), _FULL[helpers[-1]], len(helpers) > 1, False)
            return VerbGroup("", AUX, bool(helpers), False)
        verb = self._lexicon.verb(self._tokens[self._place].text)
        self._place += 1
        passive = kind == PART and (not helpers or any(word in _BE for word in helpers))
        return VerbGroup(verb, kind, bool(helpers), passive)
