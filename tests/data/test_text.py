"""Cleaning as recorded, and tokenizers that are the same everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.corpus import WORDS, make_tokenizer, reference
from vlscale.config import Tokenizer
from vlscale.data import text as text_module
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer, build_tokenizer, clean_caption, clean_question
from vlscale.errors import UserError

SAMPLES = [Sample(str(i), Path("a.jpg"), (words,)) for i, words in enumerate(WORDS)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return make_tokenizer(SAMPLES, max_tokens=8)


def test_cleaning_is_the_releases() -> None:
    for row in json.loads(reference("albef/extra_text_norm.json").read_text()):
        assert clean_caption(row["text"], row["max_words"]) == row["pre_caption"]
        assert clean_question(row["text"], row["max_words"]) == row["pre_question"]


def test_encoding(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode(["A dog, runs!", "", "a cat on the left of two children with a red ball"])
    v = tokenizer.vocabulary
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (3, 8)
    assert tokenizer.tokens(ids[0]) == ["[CLS]", "a", "dog", "runs", *["[PAD]"] * 4]
    assert ids[1].tolist() == [v.cls, *[v.pad] * 7]
    assert mask.sum(1).tolist() == [4, 1, 8]
    assert tokenizer.decode(ids[0]) == "a dog runs"
    assert tokenizer.encode(["a dog"])[0].shape == (1, 3)
    assert tokenizer.encode(["a dog"], pad_to=8)[0].shape == (1, 8)


def test_sep_ends_every_text_and_survives_the_cut() -> None:
    tokenizer = make_tokenizer(SAMPLES, max_tokens=5, sep=True)
    ids, mask = tokenizer.encode(["a dog", "a dog runs over green grass"])
    assert tokenizer.tokens(ids[0]) == ["[CLS]", "a", "dog", "[SEP]", "[PAD]"]
    assert tokenizer.tokens(ids[1]) == ["[CLS]", "a", "dog", "runs", "[SEP]"]
    assert mask.sum(1).tolist() == [4, 5]


def test_a_caption_of_five_thousand_words(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode(["dog " * 5000])
    assert ids.shape == (1, 8)


def test_unknown_characters_and_written_special_tokens(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode(["狗 dog"])
    assert tokenizer.tokens(ids[0]) == ["[CLS]", "[UNK]", "dog"]
    # Lower-cased by cleaning, so that a caption can't smuggle a mask or padding in.
    assert tokenizer.vocabulary.mask not in tokenizer.encode(["a [MASK] dog"])[0]


def test_saved_and_loaded_it_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = TextTokenizer.load(tmp_path / "tokenizer")
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.options == tokenizer.options
    for a, b in zip(loaded.encode(list(WORDS)), tokenizer.encode(list(WORDS)), strict=True):
        assert torch.equal(a, b)
    named = build_tokenizer(Tokenizer(name=str(tmp_path / "tokenizer"), max_tokens=5), [])
    assert (named.vocabulary, named.max_tokens) == (tokenizer.vocabulary, 5)


def test_a_damaged_tokenizer_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a tokenizer file"):
        TextTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    options = tmp_path / "vocabulary.json"
    content = json.loads(options.read_text())
    for broken, reason in [
        ("{", "not a saved vocabulary"),
        (json.dumps({**content, "vocabulary": {**content["vocabulary"], "size": 3}}), "size 3, but tokenizer.json"),
        (json.dumps({**content, "vocabulary": {**content["vocabulary"], "mask": 10**6}}), "mask is 1000000"),
        (json.dumps({**content, "options": {"max_token": 3}}), "not a saved vocabulary"),
    ]:
        options.write_text(broken)
        with pytest.raises(UserError, match=reason):
            TextTokenizer.load(tmp_path)


def test_training_is_equal_in_every_process(tmp_path: Path) -> None:
    # Many words of equal frequency: ties between merges are what hash order would decide.
    code = """
import random, sys
from pathlib import Path
from vlscale.config import Tokenizer
from vlscale.data.text import build_tokenizer
draw = random.Random(3)
texts = ["".join(draw.choices("abcdefghijéßñ", k=draw.randint(2, 9))) for _ in range(3000)]
build_tokenizer(Tokenizer(vocab_size=400), texts).save(Path(sys.argv[1]))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / seed], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    for name in ("tokenizer.json", "vocabulary.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert TextTokenizer.load(tmp_path / "1").vocabulary.size == 400


def test_a_small_vocabulary_splits_words_and_a_tiny_one_is_refused() -> None:
    tokenizer = make_tokenizer(SAMPLES, vocab_size=60)
    assert tokenizer.vocabulary.size == 60
    assert any(token.startswith("##") for token in tokenizer.tokens(tokenizer.encode(["children"])[0][0]))
    with pytest.raises(UserError, match=r"vocab_size: 20 is less than"):
        make_tokenizer(SAMPLES, vocab_size=20)
    with pytest.raises(UserError, match="no words to train"):
        build_tokenizer(Tokenizer(), [" ", "..."])


def test_the_same_vocabulary_cuts_texts_elsewhere() -> None:
    tokenizer = make_tokenizer(SAMPLES, vocab_size=60)
    options = tokenizer.options.model_copy(update={"max_tokens": 4, "sep": True})
    cut = tokenizer.cut_as(options)
    whole, (short,) = tokenizer.encode([SAMPLES[0].captions[0]])[0][0], cut.encode([SAMPLES[0].captions[0]])[0]
    assert short.tolist() == [*whole[:3].tolist(), cut.vocabulary.sep]
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size: 61, but the run that this begins with has 60"):
        tokenizer.cut_as(options.model_copy(update={"vocab_size": 61}))


def test_rare_characters_give_way(tmp_path: Path) -> None:
    chinese = [chr(0x4E00 + i) for i in range(500)]
    tokenizer = build_tokenizer(Tokenizer(vocab_size=300), [*chinese, *["dog cat"] * 5])
    assert tokenizer.vocabulary.size <= 300
    assert "[UNK]" in tokenizer.tokens(tokenizer.encode([chinese[-1]])[0][0])
    assert tokenizer.decode(tokenizer.encode(["dog cat"])[0][0]) == "dog cat"


def test_a_vocabulary_file(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n##s\n")
    tokenizer = build_tokenizer(Tokenizer(name=str(file)), [])
    assert tokenizer.encode(["A dogs"])[0].tolist() == [[2, 5, 6, 7]]
    file.write_text("a\ndog\n")
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        build_tokenizer(Tokenizer(name=str(file)), [])


def test_a_local_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "runs"]
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(file)).save_pretrained(tmp_path / "bert")
    tokenizer = build_tokenizer(Tokenizer(name=str(tmp_path / "bert")), [])
    assert (tokenizer.vocabulary.size, tokenizer.vocabulary.mask) == (len(words), 4)
    assert tokenizer.tokens(tokenizer.encode(["a dogs runs"])[0][0]) == ["[CLS]", "a", "dog", "##s", "runs"]
    tokenizer.save(tmp_path / "saved")
    assert TextTokenizer.load(tmp_path / "saved").vocabulary == tokenizer.vocabulary


def test_a_tokenizer_that_can_not_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, reason in [
        ("nobody/no-such-tokenizer", "the hub can't be reached"),
        (str(tmp_path), "holds no tokenizer"),
        ("../no/such/folder", "no such file or folder"),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            build_tokenizer(Tokenizer(name=name), [])
        assert "\n" not in str(caught.value)
