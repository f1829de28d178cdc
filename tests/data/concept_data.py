"""A tokenizer, phrases, regions and samples for the tests of MVPTR's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.data.corpus import assert_equal, picture, take
from vlscale.config import Concepts, Data, Tokenizer
from vlscale.data.concepts import (
    TextInputs,
    encode_texts,
    encode_texts_with_phrases,
    load_phrases,
)
from vlscale.data.phrases import LightExtractor, Origin, PhraseConcept, PhraseVocabulary
from vlscale.data.regions import Regions, pack
from vlscale.data.sample import Batch, Sample, TarMember
from vlscale.data.stream import Stream
from vlscale.data.text import TextTokenizer, build_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PLAIN = "a man ride ##s ##ing big wave dog black and the in sits at bench hot two men long haired woman number riding"
DIGITS = [str(digit) for digit in range(10)]
WORDS = [*SPECIAL, *PLAIN.split(), *DIGITS, *(f"##{digit}" for digit in DIGITS)]
AT = {word: number for number, word in enumerate(WORDS)}
SIZE = len(WORDS)
PHRASES = {
    3: "big wave",
    40: "man ride wave",
    41: "black dog",
    77: "man sit at bench",
    900: "long-haired woman",
    901: "hot dog",
    905: "dog in wave",
}
NUMBER = {text: number for number, text in enumerate(PHRASES.values())}
WIDTH = 6
OPTIONS: dict[str, Any] = {
    "max_words": 9,
    "max_phrases": 2,
    "max_tags": 6,
    "max_regions": 4,
    "region_width": WIDTH,
}
NEW = (
    *("phrase_places", "phrase_words", "tag_ids", "tag_mask", "tag_places"),
    *("regions", "region_mask", "region_boxes"),
)
CAPTION = "a man rides a big wave and a black dog is in the wave"
"""Four phrases: big wave, man ride wave, black dog, dog in wave."""


def write_phrases(path: Path, extractor: str = "light") -> Path:
    version = LightExtractor().version if extractor == "light" else ""
    concepts = [PhraseConcept(number, text, tuple(text.split()[:3]), 9) for number, text in PHRASES.items()]
    PhraseVocabulary(concepts, Origin(extractor, version, 1, 9, "")).save(path)
    return path


def write_vocabularies(folder: Path) -> Path:
    """A tokenizer's vocabulary and one of phrases."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    write_phrases(folder / "phrases.jsonl")
    return folder


def data_with(place: Path, **options: Any) -> Data:
    concepts = {**OPTIONS, "phrases": str(place / "phrases.jsonl"), **options}
    tokenizer = Tokenizer(name=str(place / "vocab.txt"), max_tokens=3)
    return Data(image_size=16, tokenizer=tokenizer, concepts=Concepts(**concepts))


def concepts_of(data: Data) -> Concepts:
    assert data.concepts is not None
    return data.concepts


def tokenizer_of(data: Data) -> TextTokenizer:
    return build_tokenizer(data.tokenizer, [])


def some_regions(seed: int, count: int, width: int = WIDTH) -> Regions:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    sure = torch.rand(count, generator=generator).sort(descending=True).values
    return Regions(torch.randn(count, width, generator=generator).half(), boxes, sure, ("",) * count)


def stored(path: Path, content: bytes) -> TarMember:
    path.write_bytes(content)
    return TarMember(str(path), "0.regions.safetensors", 0, len(content))


def make(folder: Path, number: int, count: int = 3, **options: Any) -> Sample:
    """A sample whose image does not exist, with regions."""
    regions = stored(folder / f"{number}.safetensors", pack(some_regions(number, count)))
    captions = (f"{CAPTION} {number}", f"two dogs and a black dog number {number}")
    known = {"captions": captions, "tags": ("dog", "big wave"), "regions": regions, **options}
    return Sample(f"s{number}", folder / f"{number}.png", **known)


def stream(samples: list[Sample], data: Data, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": 4, "micro_batch": 4, **options}
    return Stream(samples, data, tokenizer_of(data), **settings)


def one(sample: Sample, data: Data) -> Batch:
    return take(stream([sample], data, global_batch=1, micro_batch=1), 1)[0]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert_equal(a, b)
    for left, right in zip(a, b, strict=True):
        assert all(torch.equal(getattr(left, name), getattr(right, name)) for name in NEW)


def padded(row: list[int], length: int) -> list[int]:
    return row + [0] * (length - len(row))


def encoded(place: Path, caption: str, **options: Any) -> TextInputs:
    data = data_with(place, **options)
    concepts = concepts_of(data)
    return encode_texts_with_phrases([caption], concepts, tokenizer_of(data), load_phrases(concepts))


def covered(place: Path, caption: str, phrase: str) -> list[str]:
    """The word pieces that say the phrase."""
    data = data_with(place, max_words=30)
    concepts, tokenizer = concepts_of(data), tokenizer_of(data)
    inputs = encode_texts([caption], [[NUMBER[phrase]]], concepts, tokenizer, load_phrases(concepts))
    assert not inputs.phrase_words[0, 1:].any()
    return tokenizer.tokens(inputs.input_ids[0][inputs.phrase_words[0, 0]])


def with_picture(folder: Path, number: int, boxes: tuple[Any, ...]) -> Sample:
    picture(number, 40, 30).save(folder / f"{number}.png")
    tags = tuple("dog" for _ in boxes)
    return Sample(f"p{number}", folder / f"{number}.png", (CAPTION,), boxes=boxes, tags=tags)
