"""MVPTR's texts and tags: layouts, cuts, phrases and the words that say them."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.concept_data import (
    AT,
    CAPTION,
    NEW,
    NUMBER,
    PHRASES,
    SIZE,
    WIDTH,
    concepts_of,
    covered,
    data_with,
    encoded,
    make,
    one,
    padded,
    some_regions,
    stored,
    stream,
    tokenizer_of,
    write_phrases,
    write_vocabularies,
)
from tests.data.corpus import take
from vlscale.config import Augmentation, Concepts, Data, Texts, Tokenizer
from vlscale.data.concepts import (
    PhraseRows,
    TextInputs,
    encode_texts,
    encode_texts_with_phrases,
    load_phrases,
    object_tags_of,
    with_phrases,
)
from vlscale.data.phrases import LightExtractor, Origin, PhraseConcept, PhraseVocabulary, is_phrase
from vlscale.data.regions import pack
from vlscale.data.sample import Sample, Vocabulary
from vlscale.data.scene_captions import captions as scene_captions
from vlscale.data.scene_world import sample_scene
from vlscale.data.text import build_tokenizer
from vlscale.errors import UserError

# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabularies(tmp_path_factory.mktemp("concepts"))


def test_a_batch_by_hand(place: Path, tmp_path: Path) -> None:
    regions = some_regions(1, 2)
    sample = make(
        tmp_path,
        0,
        captions=("A man rides a big wave!",),
        tags=("Big wave", "dog", "big-wave", "man"),
        regions=stored(tmp_path / "r", pack(regions)),
    )
    batch = one(sample, data_with(place))
    v = [AT[word] for word in ("[CLS]", "a", "man", "ride", "##s", "a", "big", "wave")]
    # Nine word pieces with [CLS] and [SEP]: "wave" is the seventh and just fits; then both phrases, as mentioned.
    mentioned = [SIZE + NUMBER["big wave"], SIZE + NUMBER["man ride wave"]]
    assert batch.input_ids.tolist() == [[*v, *mentioned, AT["[SEP]"]]]
    assert batch.attention_mask.tolist() == [[1] * 11]
    assert batch.phrase_places is not None
    assert batch.phrase_places.tolist() == [[0] * 8 + [1, 2, 0]]
    says = {
        SIZE + NUMBER["man ride wave"]: [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0],
        SIZE + NUMBER["big wave"]: [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
    }
    assert batch.phrase_words is not None
    assert batch.phrase_words.dtype == torch.bool
    assert batch.phrase_words.int().tolist() == [[says[identity] for identity in mentioned]]
    tags = [AT[word] for word in ("[CLS]", "big", "wave", "dog", "man", "[SEP]")]
    assert (batch.tag_ids is not None, batch.tag_mask is not None, batch.tag_places is not None) == (True,) * 3
    assert batch.tag_ids.tolist() == [tags]  # type: ignore[union-attr]
    assert batch.tag_mask.tolist() == [[1] * 6]  # type: ignore[union-attr]
    assert batch.tag_places.tolist() == [[0, 1, 1, 2, 3, 0]]  # type: ignore[union-attr]
    assert batch.regions is not None
    assert (batch.regions.shape, batch.regions.dtype) == ((1, 4, WIDTH + 6), torch.float32)
    for row in range(2):
        x1, y1, x2, y2 = regions.boxes[row].tolist()
        assert torch.equal(batch.regions[0, row, :WIDTH], regions.features[row].float())
        assert batch.regions[0, row, WIDTH:].tolist() == pytest.approx([x1, y1, x2, y2, x2 - x1, y2 - y1])
    assert not batch.regions[0, 2:].any()
    assert batch.region_mask is not None
    assert batch.region_mask.tolist() == [[1, 1, 0, 0]]
    assert batch.region_boxes is not None
    assert torch.equal(batch.region_boxes[0], torch.cat([regions.boxes, torch.zeros(2, 4)]))
    assert (batch.images.shape, batch.images.dtype) == ((1, 3, 0, 0), torch.uint8)
    assert (batch.image_sizes, batch.matched, batch.second_images) == (None, None, None)
    assert all(getattr(batch, name).dtype == torch.int64 for name in NEW if name.startswith(("tag", "phrase_p")))


def test_the_layout_of_the_recordings_notes(place: Path) -> None:
    """Side a: [CLS] words phrases [SEP], and padding behind, phrase ids from the number of words on."""
    inputs = encoded(place, "a black dog")
    phrase = SIZE + NUMBER["black dog"]
    row = [AT["[CLS]"], AT["a"], AT["black"], AT["dog"], phrase, AT["[SEP]"]]
    assert inputs.input_ids.tolist() == [padded(row, 11)]
    assert inputs.attention_mask.tolist() == [padded([1] * 6, 11)]
    assert inputs.phrase_places.tolist() == [padded([0] * 4 + [1], 11)]


@pytest.mark.parametrize("more", [0, 1, 2, 3, 20])
def test_words_are_cut(place: Path, more: int) -> None:
    """Seven word pieces stay beside [CLS] and [SEP]."""
    caption = "a black dog" + " and a dog" * more
    words = caption.split()[:7]
    inputs = encoded(place, caption)
    row = [AT["[CLS]"], *(AT[word] for word in words), SIZE + NUMBER["black dog"], AT["[SEP]"]]
    assert inputs.input_ids.tolist() == [padded(row, 11)]
    assert inputs.attention_mask.tolist() == [padded([1] * len(row), 11)]
    says = [0, *(int(word in ("black", "dog")) for word in words)]
    assert inputs.phrase_words[0, 0].int().tolist() == padded(says, 11)
    short = encoded(place, caption, max_words=3, max_phrases=0)
    assert short.input_ids.tolist() == [[AT["[CLS]"], AT["a"], AT["[SEP]"]]]
    assert short.phrase_words.shape == (1, 0, 3)


def test_too_many_phrases(place: Path, tmp_path: Path) -> None:
    """Evaluation takes the first, training draws: each as often as any other, in the caption's order."""
    data = data_with(place)
    rows = load_phrases(concepts_of(data))
    assert rows is not None
    every = rows.of_caption(CAPTION)
    assert [rows.texts[number] for number in every] == ["big wave", "man ride wave", "black dog", "dog in wave"]
    inputs = encoded(place, CAPTION)
    assert inputs.input_ids[0, 8:10].tolist() == [SIZE + number for number in every[:2]]
    sample = make(tmp_path, 0, captions=(CAPTION,))
    seen: Counter[tuple[int, ...]] = Counter()
    for batch in take(stream([sample], data, global_batch=1, micro_batch=1), 240):
        seen[tuple((batch.input_ids[0, 8:10] - SIZE).tolist())] += 1
    pairs = {(a, b) for place_a, a in enumerate(every) for b in every[place_a + 1 :]}
    assert set(seen) == pairs
    assert min(seen.values()) > 15  # 40 each


@pytest.mark.parametrize(
    ("tags", "row", "places"),
    [
        ((), [], []),
        (("dog",), ["dog"], [1]),
        (("hot dog", "man", "bench"), ["hot", "dog", "man", "bench"], [1, 1, 2, 3]),
        (("hot dog", "man", "black bench"), ["hot", "dog", "man", "black"], [1, 1, 2, 3]),
        (("a", "big", "man", "dog", "bench"), ["a", "big", "man", "dog"], [1, 2, 3, 4]),
        (("", "!", "zzz", "qqq", "Zzz."), ["[UNK]", "[UNK]"], [1, 2]),
    ],
)
def test_tags(place: Path, tmp_path: Path, tags: tuple[str, ...], row: list[str], places: list[int]) -> None:
    batch = one(make(tmp_path, 0, tags=tags), data_with(place))
    found = [AT[word] for word in ("[CLS]", *row, "[SEP]")]
    assert batch.tag_ids.tolist() == [padded(found, 6)]  # type: ignore[union-attr]
    assert batch.tag_mask.tolist() == [padded([1] * len(found), 6)]  # type: ignore[union-attr]
    assert batch.tag_places.tolist() == [padded([0, *places], 6)]  # type: ignore[union-attr]


def test_unsure_tags_are_left_out() -> None:
    sample = Sample("x", Path("x"), tags=("dog", "cat", "dog", "man"), confidences=(0.9, 0.19, 0.1, 0.2))
    assert object_tags_of(sample) == ["dog", "man"]
    assert object_tags_of(replace(sample, confidences=())) == ["dog", "cat", "man"]


def test_without_phrases(place: Path, tmp_path: Path) -> None:
    """No vocabulary, and a caption that has none of it: the same."""
    for caption, phrases in ((CAPTION, None), ("two men", str(place / "phrases.jsonl"))):
        batch = one(make(tmp_path, 0, captions=(caption,)), data_with(place, phrases=phrases))
        assert int(batch.input_ids.max()) < SIZE
        assert not batch.phrase_places.any()  # type: ignore[union-attr]
        assert not batch.phrase_words.any()  # type: ignore[union-attr]
        assert batch.phrase_words.shape == (1, 2, 11)  # type: ignore[union-attr]
        assert int(batch.attention_mask.sum()) == 2 + min(7, len(caption.split()))


# --- phrases ----------------------------------------------------------------------------------------------------------


def test_numbers_are_dense(place: Path, tmp_path: Path) -> None:
    rows = load_phrases(concepts_of(data_with(place)))
    assert rows is not None
    assert rows.texts == list(PHRASES.values())
    assert len(rows) == len(PHRASES)
    tokenizer = tokenizer_of(data_with(place))
    vocabulary = with_phrases(tokenizer, rows)
    assert vocabulary == Vocabulary(SIZE, 0, 2, 3, 4, vocabulary.phrase_pieces)
    assert tokenizer.decode(vocabulary.phrase_pieces[0]) == rows.texts[0]
    assert with_phrases(tokenizer, None) == tokenizer.vocabulary
    assert load_phrases(Concepts()) is None


def test_the_public_file(tmp_path: Path) -> None:
    """Ids of words come first in it, and have no row."""
    public = {str(30522 + number): text for number, text in PHRASES.items()}
    path = tmp_path / "id2phrase.json"
    path.write_text(json.dumps({"17": "a", "18": "black dog", **public}))
    rows = load_phrases(Concepts(phrases=str(path)))
    assert rows is not None
    assert rows.texts == list(PHRASES.values())
    assert rows.of_caption("a black dog in the big wave") == [
        NUMBER["black dog"],
        NUMBER["big wave"],
        NUMBER["dog in wave"],
    ]
    named_so = write_phrases(tmp_path / "phrases.json")
    assert len(load_phrases(Concepts(phrases=str(named_so))) or ()) == len(PHRASES)
    for wrong in (tmp_path / "nowhere.json", tmp_path / "nowhere.jsonl"):
        with pytest.raises(UserError, match=r"nowhere.*can't be read"):
            load_phrases(Concepts(phrases=str(wrong)))


def test_phrases_that_the_data_has_itself(tmp_path: Path) -> None:
    rows = load_phrases(Concepts(phrases=str(write_phrases(tmp_path / "p", "data"))))
    assert rows is not None
    sample = Sample("x", Path("x"), ("other",), tuples=(("black", "dog"), ("hot", "dog"), ("big", "wave")))
    assert rows.of_caption("a wave, so big, and a black dog", sample) == [NUMBER["big wave"], NUMBER["black dog"]]
    with pytest.raises(UserError, match="extractor 'data'"):
        rows.of_caption("a black dog")


@pytest.mark.parametrize(
    ("caption", "phrase", "pieces"),
    [
        ("a man rides a big wave", "man ride wave", ["man", "ride", "##s", "wave"]),
        ("two men riding", "man ride wave", ["men", "riding"]),  # what is there of it, in any form
        ("a black dog and a dog", "black dog", ["black", "dog", "dog"]),  # every occurrence
        ("the men's big dog sits at a bench at 9", "man sit at bench", ["men", "##s", "sits", "at", "bench", "at"]),
        ("a long-haired woman", "long-haired woman", ["long", "haired", "woman"]),
        ("a long haired woman", "long-haired woman", ["long", "haired", "woman"]),
        ("A BLACK DOG!", "black dog", ["black", "dog"]),
        ("two men", "black dog", []),
    ],
)
def test_words_that_say_a_phrase(place: Path, caption: str, phrase: str, pieces: list[str]) -> None:
    assert covered(place, caption, phrase) == pieces


def test_every_word_of_a_found_phrase_is_found_in_its_caption() -> None:
    """Counted over captions: a phrase whose word is not found would give that word away."""
    extractor, captions = LightExtractor(), list[str]()
    for seed in range(60):
        rng = random.Random(seed)
        captions += scene_captions(sample_scene(rng), rng, set())
    captions += [
        "The children's book is on the table, a man's hat isn't.",
        "Three t-shirts hang in the middle of the room",
        "an older woman’s dogs were sitting on the grasses by the knives and mice",
        "a man in a statefarm.com hat",
        "two smiling women carried long-haired cats",
    ]
    tuples = {caption: [words for words in extractor.extract(caption) if is_phrase(words)] for caption in captions}
    texts = sorted({" ".join(words) for found in tuples.values() for words in found})
    assert len(texts) > 100
    concepts = [PhraseConcept(number, text, tuple(text.split()[:3]), 1) for number, text in enumerate(texts)]
    rows = PhraseRows(PhraseVocabulary(concepts, Origin("light", extractor.version, 1, 1, "")))
    # One phrase per word of each phrase: each must cover something.
    words = sorted({word for text in texts for word in text.replace("-", " ").split()})
    single = PhraseRows(
        PhraseVocabulary(
            [PhraseConcept(n, word, ("", ""), 1) for n, word in enumerate(words)], Origin("", "", 1, 1, "")
        )
    )
    tokenizer = build_tokenizer(Tokenizer(max_words=60), captions)
    options = Concepts(max_words=100, max_phrases=200)
    missing = Counter[str]()
    for caption in captions:
        numbers = rows.of_caption(caption)
        needed = sorted({word for number in numbers for word in rows.texts[number].replace("-", " ").split()})
        places = [words.index(word) for word in needed]
        inputs = encode_texts([caption], [places], options, tokenizer, single)
        found = inputs.phrase_words[0, : len(needed)].any(1).tolist()
        missing.update(word for word, there in zip(needed, found, strict=True) if not there)
    assert missing == Counter()


def test_captions_of_evaluation(place: Path, tmp_path: Path) -> None:
    """Those that training gives where nothing has to be drawn."""
    caption = "a man rides a big wave"
    batch = one(make(tmp_path, 0, captions=(caption,)), data_with(place))
    for found, name in zip(encoded(place, caption), TextInputs._fields, strict=True):
        assert torch.equal(found, getattr(batch, name))
    data = data_with(place)
    concepts = concepts_of(data)
    two = encode_texts_with_phrases([caption, "dog"], concepts, tokenizer_of(data), load_phrases(concepts))
    assert two.input_ids.shape == two.phrase_places.shape == (2, 11)
    none = encode_texts_with_phrases([], concepts, tokenizer_of(data), None)
    assert (none.input_ids.shape, none.phrase_words.shape) == ((0, 11), (0, 2, 11))


def test_recipes_that_can_not_work() -> None:
    with pytest.raises(ValueError, match=r"pixels: .*48 numbers wide, but region_width is 2048"):
        Concepts(pixels=4)
    with pytest.raises(ValueError, match="concepts: one text per image, but texts asks for 4"):
        Data(concepts=Concepts(), texts=Texts(positive=2, negative=2))
    with pytest.raises(ValueError, match="second_view is about images"):
        Data(concepts=Concepts(), second_view=True)
    with pytest.raises(ValueError, match="aspect is about images"):
        Data.model_validate({"concepts": {}, "aspect": {}})
    for key in ("max_words", "max_tags"):
        with pytest.raises(ValueError, match=key):
            Concepts.model_validate({key: 1})
    assert Data(concepts=Concepts(), augment=Augmentation()).concepts == Concepts()
