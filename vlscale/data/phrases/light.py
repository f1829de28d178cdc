"""Phrases without any library: a lexicon, likely parts of speech, noun chunks, and a walk over them.

What it misses: coordination of more than pairs of things ("a man, a woman and a dog riding" has one rider), what a
pronoun stands for, infinitives ("tries to catch a ball" gives nothing), verbs without object or preposition ("a dog
runs"), relative clauses other than those of `who`, `that` and `which` right behind their noun, and which of several
nouns a preposition further behind belongs to (it goes by simple rules). English only.
"""

from __future__ import annotations

from vlscale.data.phrases.base import PhraseTuple, distinct
from vlscale.data.phrases.chunks import Chunk, Description, Item, Mark, Preposition, VerbGroup, chunk
from vlscale.data.phrases.lexicon import AUX, CONJ, INF, VERB, lexicon, lexicon_hash
from vlscale.data.phrases.tagging import tag
from vlscale.data.sample import Sample

RULES_VERSION = 1
"""Goes up whenever the same lexicon could give other tuples."""

_RELATIVE = frozenset({"who", "that", "which"})
_TO_NOUN = frozenset({"of", "with", "between", "like"})
"""Prepositions that belong to the noun before them even where a verb could take them."""
_HOLDING = frozenset({"mouth", "hand"})
"""What is in them is the thing named before, not whoever has them: "carries a ball in its mouth"."""


class LightExtractor:
    """Attribute and relation tuples by rules; a pure function of the caption."""

    name = "light"

    def __init__(self) -> None:
        self._lexicon = lexicon()
        self.version = f"{RULES_VERSION}-{lexicon_hash()}"

    def extract(self, caption: str) -> list[PhraseTuple]:
        """The caption's tuples, in the order they are mentioned."""
        return _Walk(chunk(tag(caption, self._lexicon), self._lexicon)).tuples()

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        return [self.extract(caption) for caption in sample.captions]


class _Walk:
    """Goes through a caption's items once and remembers who could be the subject of what comes."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items
        self._found: list[PhraseTuple] = []
        self._subject: list[str] = []
        """Of the clause; empty where it is a pronoun or not there yet."""
        self._nearest: list[str] = []
        """The noun last mentioned, with the one it is joined to."""
        self._verb: VerbGroup | None = None
        """Of the clause, the last one."""
        self._doer: list[str] = []
        """Who does it."""
        self._waiting: tuple[list[str], str] | None = None
        """Subjects and relation that the next noun completes."""
        self._last: tuple[list[str], str] | None = None
        """What the noun before completed: its twin behind `and` completes it too."""

        self._behind_with = False
        """The last preposition was `with`: "with a stick in its mouth" is about the stick."""

    def tuples(self) -> list[PhraseTuple]:
        for place, item in enumerate(self._items):
            match item:
                case Chunk():
                    self._on_noun(item, place)
                case Description():
                    self._on_description(item)
                case VerbGroup():
                    self._on_verb(item, place)
                case Preposition():
                    self._on_preposition(item, place)
                case Mark():
                    self._on_mark(item)
        return distinct(self._found)

    def _at(self, place: int) -> Item | None:
        return self._items[place] if 0 <= place < len(self._items) else None

    def _on_noun(self, item: Chunk, place: int) -> None:
        names = [item.name] if item.name else []
        self._found += [(name,) for name in names] + [(word, item.name) for word in item.attributes if names]
        if item.possessor:
            return
        if self._is_twin(place):
            self._twin(names)
            return
        if self._waiting is not None:
            self._relate(self._waiting, names)
        elif not self._subject or self._verb is not None:
            self._subject, self._verb = names, None
        self._last, self._waiting = self._waiting, None
        self._nearest = names

    def _is_twin(self, place: int) -> bool:
        """Whether the noun is the second of a pair; the subject of a clause of its own is none."""
        before, twin, after = self._at(place - 1), self._at(place - 2), self._at(place + 1)
        if not (isinstance(before, Mark) and before.tag == CONJ and isinstance(twin, Chunk)):
            return False
        return self._verb is None or not (isinstance(after, VerbGroup) and (after.helped or after.form == VERB))

    def _twin(self, names: list[str]) -> None:
        if self._last is not None:
            self._relate(self._last, names)
        elif self._subject == self._nearest:
            self._subject = self._subject + names
        self._nearest = self._nearest + names

    def _relate(self, relation: tuple[list[str], str], names: list[str]) -> None:
        subjects, verb = relation
        if verb.endswith(_BY_WHOM):  # the boat is pulled by a man
            self._found += [(name, verb.removesuffix(_BY_WHOM), subject) for name in names for subject in subjects]
        else:
            self._found += [(subject, verb, name) for subject in subjects for name in names]

    def _on_description(self, item: Description) -> None:
        if self._verb is not None and self._verb.form == AUX:
            self._found += [(word, name) for name in self._doer for word in item.attributes]

    def _on_verb(self, item: VerbGroup, place: int) -> None:
        before = self._at(place - 1)
        self._doer = self._doer_of(item, before)
        self._behind_with = False
        self._verb = item
        after = self._at(place + 1)
        takes_object = item.verb and isinstance(after, Chunk)
        self._waiting = (self._doer, item.verb) if takes_object else None
        if item.form == AUX and isinstance(after, Chunk):
            self._waiting = ([], "")  # "is a …" says what something is: no relation

    def _doer_of(self, item: VerbGroup, before: Item | None) -> list[str]:
        match before:
            case Mark(tag=tag) if tag == INF:
                return []
            case Mark(text=text) if text in _RELATIVE:
                return self._nearest
            case Preposition():
                return []
            case VerbGroup():
                return self._doer
            case Chunk() if self._verb is not None and not item.helped and item.form != VERB:
                return self._nearest  # a man watching a dog running
        return self._subject

    def _on_preposition(self, item: Preposition, place: int) -> None:
        thing = self._at(place + 1)
        if not isinstance(thing, Chunk):
            return  # a particle: "picks up", "looks on"
        before, verb = self._at(place - 1), self._verb
        of_noun = item.text in _TO_NOUN or self._behind_with or thing.name in _HOLDING
        self._behind_with = item.text == "with"
        if isinstance(before, VerbGroup) and verb is not None and verb.verb:
            agent = item.text == "by" and verb.passive
            self._waiting = (self._doer, verb.verb + _BY_WHOM if agent else f"{verb.verb} {item.text}")
        elif verb is None or verb.verb == "have" or (isinstance(before, Chunk) and of_noun):
            self._waiting = (self._nearest, item.text)
        else:
            self._waiting = (self._doer, item.text)

    def _on_mark(self, item: Mark) -> None:
        self._waiting = None
        if item.ends_clause:
            self._subject, self._nearest, self._verb, self._doer, self._last = [], [], None, [], None


_BY_WHOM = "\0by"
