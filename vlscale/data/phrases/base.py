"""What every extractor of phrases is and gives: tuples of a caption's scene graph, in words."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vlscale.data.sample import Sample

PhraseTuple = tuple[str, ...]
"""(object,), (attribute, object) or (subject, relation, object): lower case, in base forms."""

MAX_CHARACTERS = 2000
"""Of a caption that are looked at: alt texts of the web can be whole pages."""
MAX_WORDS = 100
MAX_TUPLES = 200
"""Of a caption or, where the source has them of an image, of that; the rest is left out."""
MAX_TEXT = 100
"""Characters of a phrase; longer ones are no phrases."""


class Extractor(Protocol):
    """Whatever turns captions into tuples."""

    name: str
    version: str
    """Whatever the same captions could give other tuples by: versions of libraries, hashes of files."""

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        """The tuples of each caption, in the order they are mentioned, each once.

        A sample without captions that has tuples of its own gives one list.
        """
        ...


@runtime_checkable
class CaptionExtractor(Protocol):
    """An extractor that needs nothing but the words."""

    name: str
    version: str

    def extract(self, caption: str) -> list[PhraseTuple]:
        """The caption's tuples, in the order they are mentioned, each once."""
        ...

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        """`extract` of each caption."""
        ...


def is_phrase(words: PhraseTuple) -> bool:
    """Whether it is an attribute or a relation: what MVPTR takes (section 3.1.1); single objects are words already."""
    return len(words) > 1 and len(phrase_text(words)) <= MAX_TEXT


def phrase_text(words: PhraseTuple) -> str:
    """`("man", "sit at", "table")` → `man sit at table`."""
    return " ".join(words)


def distinct(tuples: list[PhraseTuple]) -> list[PhraseTuple]:
    """Each once, at most MAX_TUPLES, those with an empty word left out."""
    return [words for words in dict.fromkeys(tuples) if all(words)][:MAX_TUPLES]


def shortened(caption: str) -> str:
    """At most MAX_WORDS words of the first MAX_CHARACTERS characters."""
    return " ".join(caption[:MAX_CHARACTERS].split()[:MAX_WORDS])
