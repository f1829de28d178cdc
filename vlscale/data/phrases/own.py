"""Tuples that the data has itself: the embedded scenes', Visual Genome's attributes, the `tuples` of a jsonl file."""

from __future__ import annotations

from vlscale.data.phrases.base import PhraseTuple, distinct
from vlscale.data.phrases.lexicon import Lexicon, lexicon, lexicon_hash
from vlscale.data.phrases.tagging import tokens
from vlscale.data.sample import Sample


class DataExtractor:
    """A sample's own tuples, in base forms, each for the captions that say all of its words.

    A tuple that a caption doesn't say is true of the image, but as input beside the caption it would give away what
    only the image shows. Synonyms are not known: a "violet sphere" says nothing of a purple ball.
    """

    name = "data"

    def __init__(self) -> None:
        self._lexicon = lexicon()
        self.version = f"1-{lexicon_hash()}"

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        """The tuples that each caption says; of a sample without captions all of them, as one list."""
        own = distinct([base_forms(words, self._lexicon) for words in sample.tuples])
        return [said(own, caption, self._lexicon) for caption in sample.captions] or ([own] if own else [])


def said(tuples: list[PhraseTuple], caption: str, words: Lexicon) -> list[PhraseTuple]:
    """The tuples all of whose words the caption has, in whatever form, in the order it completes them."""
    places: dict[str, int] = {}
    for place, token in enumerate(tokens(caption)):
        for form in (token, words.noun(token), words.verb(token), words.adjective(token)):
            places.setdefault(form, place)
    complete: list[tuple[int, PhraseTuple]] = []
    for item in tuples:
        needed = [word for part in item for word in part.split()]
        if needed and all(word in places for word in needed):
            complete.append((max(places[word] for word in needed), item))
    return [item for _, item in sorted(complete, key=lambda pair: pair[0])]


def base_forms(item: PhraseTuple, words: Lexicon) -> PhraseTuple:
    """Lower case and single spaces; objects in the singular, the relation's first word as an infinitive."""
    parts = [" ".join(part.lower().split()) for part in item]
    last = len(parts) - 1
    for place, part in enumerate(parts):
        *first, final = part.split() or [""]
        if place == last or last == 2 != place + 1:
            parts[place] = " ".join([*first, words.noun(final)])
        elif last == 2:
            verb, *rest = part.split() or [""]
            parts[place] = " ".join([words.verb(verb) if words.is_verb(verb) else verb, *rest])
        else:
            parts[place] = words.adjective(part)
    return tuple(parts)
