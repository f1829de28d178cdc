"""Annotated phrases as tokens: what cleaning, hyphens, numbers, punctuation and cuts do to their places."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.data.concept_data import data_with, tokenizer_of, write_vocabularies
from vlscale.config import Data, Tokenizer
from vlscale.data.sample import Phrase, Sample
from vlscale.data.spans import Annotated, SpanEncoder, phrase_words
from vlscale.data.text import build_tokenizer, clean_caption


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabularies(tmp_path_factory.mktemp("spans"))


def said(caption: str, text: str, first_word: int) -> list[str] | None:
    """The cleaned words that say a phrase."""
    words = phrase_words(caption, Phrase(text, first_word=first_word))
    cleaned = clean_caption(caption, 1000).split(" ")
    return None if words is None else [cleaned[number] for number in words]


@pytest.mark.parametrize(
    ("caption", "text", "first_word", "expected"),
    [
        ("A man , in a red hat", "a red hat", 4, ["a", "red", "hat"]),
        ("A man, in a red hat", "A man", 0, ["a", "man"]),
        (
            "- - A man - in a tri-colored dog-suit .",
            "a tri-colored dog-suit",
            6,
            ["a", "tri", "colored", "dog", "suit"],
        ),
        ("a T-shirt and/or trousers", "trousers", 3, ["trousers"]),
        ("a T-shirt and/or trousers", "T", 1, ["t"]),
        ("the man 's dog 's 2 1/2 bones", "2 1/2 bones", 5, ["2", "1", "2", "bones"]),
        ("dog's bones", "dog", 0, ["dogs"]),
        ("  a  dog  and a cat", "a cat", 7, ["a", "cat"]),
        ("a  dog  and a cat", "a  dog", 0, ["a", "dog"]),
        ("\ta dog\n\n and a cat \n", "a cat", 3, ["a", "cat"]),
        ("one \t two three", "three", 3, ["three"]),
        ("Ein Straßenschild İ und ΑΣ", "ΑΣ", 4, ["ας"]),
        ("a <person> rides", "<person>", 1, ["person"]),
        ("a dog , !! a cat", ", !!", 2, []),
        ("a dog ...", "...", 2, []),
        ("\ud800 a dog", "a dog", 1, ["a", "dog"]),
        ("A Dog and a cat", "a dog", 0, ["a", "dog"]),
        ("a dog-like cat", "a dog", 0, ["a", "dog"]),
        ("Two (2) dogs!", "two 2 dogs", 0, ["two", "2", "dogs"]),
        ("a dog and a cat", "a dog", 3, None),
        ("a dog", "dog", 2, None),
        ("a dog", "dog", -1, None),
    ],
)
def test_words_of_a_phrase_in_nasty_captions(
    caption: str, text: str, first_word: int, expected: list[str] | None
) -> None:
    assert said(caption, text, first_word) == expected


@pytest.mark.parametrize("seed", range(50))
def test_words_between_marks_are_always_the_phrase_alone(seed: int) -> None:
    """Words that are told apart by their letters: cleaning keeps letters, whatever stands around them."""
    rng = random.Random(seed)
    parts = ["-", "/", "a-b", ",", "don't", "…", "1.5", "x", "", "\t", "&", "l/r", "U.S.", "#", "?!", "\n\n"]
    words = [rng.choice(parts) for _ in range(12)]
    first, last = sorted(rng.sample(range(1, 11), 2))
    words[first], words[last] = "Zq", "zw"
    text = " ".join(words[first : last + 1])
    found = said(" ".join(words), text, first)
    assert found is not None
    assert (found[0], found[-1]) == ("zq", "zw")
    assert found == clean_caption(text, 1000).split(" ")


def encode(data: Data, caption: str, *phrases: tuple[str, int], concepts: bool = False) -> list[list[str]]:
    """The tokens of each phrase."""
    sample = Sample("s", Path("none.png"), ("", caption))
    annotated = Annotated(sample, 1, tuple(Phrase(text, (), 1, first) for text, first in phrases))
    tokenizer = tokenizer_of(data)
    texts = SpanEncoder(data, tokenizer, concepts)([annotated])
    ids, size = texts.fields["input_ids"][0], tokenizer.vocabulary.size
    names = [
        tokenizer.tokens([int(number)])[0] if number < size else texts.concepts[0][list(ids[ids >= size]).index(number)]
        for number in ids
    ]
    return [[name for name, on in zip(names, span, strict=True) if on] for span in texts.spans[0].tolist()]


def test_spans_are_word_pieces_and_end_at_the_cut(place: Path) -> None:
    data = data_with(place, max_words=7)  # five pieces and two special tokens
    caption = "Man , riding-wave , 12 dogs"
    found = encode(data, caption, ("Man", 0), ("riding-wave", 2), ("12 dogs", 4), ("dogs", 5))
    assert found == [["man"], ["riding", "wave"], ["1", "##2"], []]
    assert encode(data, "! a man", ("!", 0), ("a man", 1)) == [[], ["a", "man"]]


def test_words_beyond_the_tokenizer_s_own_cut_are_gone(place: Path) -> None:
    data = data_with(place, max_words=60)
    caption = " ".join(["a"] * 29 + ["big", "wave"])  # tokenizer.max_words is 30
    assert encode(data, caption, ("a big wave", 28)) == [["a", "big"]]
    assert encode(data, caption, ("wave", 30)) == [[]]


def test_concepts_of_a_phrase_are_those_its_words_say_alone(place: Path) -> None:
    data = data_with(place, max_words=20)
    caption = "a black dog and a man riding the big wave"
    asked: tuple[Any, ...] = (("a black dog", 0), ("a man", 4), ("the big wave", 7))
    plain = encode(data, caption, *asked)
    assert plain == [["a", "black", "dog"], ["a", "man"], ["the", "big", "wave"]]
    with_concepts = encode(data, caption, *asked, concepts=True)
    assert with_concepts == [["a", "black", "dog", "black dog"], ["a", "man"], ["the", "big", "wave", "big wave"]]


def test_texts_without_concepts_leave_room_for_their_special_tokens() -> None:
    captions = ["a dog and a cat and a man"]
    for sep, last in ((False, ["a", "cat", "and"]), (True, ["a", "cat"])):
        options = Tokenizer(vocab_size=200, max_tokens=7, sep=sep)
        tokenizer = build_tokenizer(options, captions)
        annotated = Annotated(Sample("s", Path("x.png"), tuple(captions)), 0, (Phrase("a cat and", (), 0, 3),))
        texts = SpanEncoder(Data(tokenizer=options), tokenizer)([annotated])
        said_ids = texts.fields["input_ids"][0][texts.spans[0, 0]]
        assert tokenizer.decode(said_ids).split() == last
        assert texts.concepts == [[]]
