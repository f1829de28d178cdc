"""Several texts per image: its own and others', in which order, drawn from what, and when an image is mirrored."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.corpus import assert_equal, ids, make_samples, make_tokenizer, take
from tests.data.test_stream_shards import make, shard
from vlscale.config import Augmentation, Data, Texts, Tokenizer
from vlscale.data.corpus import SampleList, image_identity
from vlscale.data.open import read_data, training_split
from vlscale.data.order import generator, number_of
from vlscale.data.pairs import DrawnTexts, draw_texts
from vlscale.data.sample import Batch, Sample, SampleError
from vlscale.data.stream import Stream, evaluation_batches
from vlscale.errors import UserError

COUNT = 23
TOKENS = 7
FOUR = Texts(positive=2, negative=2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("images"), COUNT)


def data_with(texts: Texts, **augment: Any) -> Data:
    return Data(
        image_size=16, texts=texts, tokenizer=Tokenizer(max_tokens=TOKENS), augment=Augmentation.model_validate(augment)
    )


def stream(samples: Any, texts: Texts = FOUR, data: Data | None = None, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": 8, "micro_batch": 8, **options}
    data = data or data_with(texts)
    return Stream(samples, data, make_tokenizer(list(samples), max_tokens=TOKENS), **settings)


def rows(batch: Batch, per_image: int) -> list[tuple[str, list[str], list[int]]]:
    """Sample id, its texts and which of them match."""
    assert batch.matched is not None
    texts = [batch.texts[at : at + per_image] for at in range(0, len(batch.texts), per_image)]
    matched = batch.matched.reshape(-1, per_image).tolist()
    return list(zip(batch.sample_ids, texts, matched, strict=True))


def test_a_batch(samples: list[Sample]) -> None:
    (batch,) = take(stream(samples), 1)
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.image_ids.shape == (8,)
    assert batch.input_ids.shape == batch.attention_mask.shape == (32, TOKENS)
    assert batch.matched is not None
    assert (batch.matched.shape, batch.matched.dtype) == ((32,), torch.int64)
    assert len(batch) == len(batch.texts) == 32
    tokenizer = make_tokenizer(samples, max_tokens=TOKENS)
    assert torch.equal(batch.input_ids, tokenizer.encode(batch.texts, pad_to=TOKENS)[0])
    by_id = {sample.id: sample for sample in samples}
    everyone = {caption: sample.id for sample in samples for caption in sample.captions}
    for identity, texts, matched in rows(batch, 4):
        assert matched == [1, 1, 0, 0]
        own = by_id[identity].captions
        assert set(texts[:2]) <= set(own)
        assert len(set(texts[:2])) == min(2, len(own))
        assert all(text not in own and everyone[text] != identity for text in texts[2:])


def test_one_text_is_what_it_was(samples: list[Sample]) -> None:
    """The caption, crop and flip of a run that began before there could be several."""
    for batch in take(stream(samples, Texts()), 6):
        assert batch.matched is None
        assert len(batch.texts) == len(batch.sample_ids)
    for seed in range(20):
        for sample in samples[:5]:
            drawn, by_hand = generator(seed, 3, number_of(sample.id)), generator(seed, 3, number_of(sample.id))
            found = draw_texts(sample, SampleList(samples), Texts(), drawn)
            assert found == ([sample.captions[int(by_hand.integers(len(sample.captions)))]], [True])
            assert drawn.random() == by_hand.random()


def test_own_captions_come_once_before_they_come_again() -> None:
    sample = Sample("x", Path("x.png"), ("one", " ", "two", "three"))
    seen: Counter[tuple[str, ...]] = Counter()
    for seed in range(600):
        texts, matched = draw_texts(sample, SampleList([sample]), Texts(positive=2), np.random.default_rng(seed))
        assert matched == [True, True]
        assert len(set(texts)) == 2
        seen[tuple(texts)] += 1
        more, _ = draw_texts(sample, SampleList([sample]), Texts(positive=7), np.random.default_rng(seed))
        assert sorted(Counter(more).values()) == [2, 2, 3]
        assert set(more[:3]) == set(more[3:6]) == {"one", "two", "three"}
    assert len(seen) == 6
    assert min(seen.values()) > 60  # 100 each


def test_mismatches_are_equally_likely_of_all_other_images(samples: list[Sample]) -> None:
    corpus = SampleList(samples)
    owner = {caption: number for number, sample in enumerate(samples) for caption in sample.captions}
    seen = Counter(
        owner[text]
        for seed in range(2200)
        for text in draw_texts(samples[4], corpus, Texts(negative=1), np.random.default_rng(seed)).texts[1:]
    )
    assert set(seen) == set(range(COUNT)) - {4}
    assert max(abs(count - 100) for count in seen.values()) < 45


def test_mismatches_change_with_the_epoch_and_the_seed(samples: list[Sample]) -> None:
    batches = take(stream(samples, global_batch=COUNT, micro_batch=COUNT), 4)
    epochs = [{identity: tuple(texts[2:]) for identity, texts, _ in rows(batch, 4)} for batch in batches]
    for earlier, later in itertools.pairwise(epochs):
        assert earlier.keys() == later.keys()
        assert sum(earlier[name] != later[name] for name in earlier) > 0.8 * COUNT
    (other,) = take(stream(samples, global_batch=COUNT, micro_batch=COUNT, seed=6), 1)
    assert epochs[0] != {identity: tuple(texts[2:]) for identity, texts, _ in rows(other, 4)}


def test_the_same_photograph_is_no_mismatch(samples: list[Sample]) -> None:
    """Under another name, and under another path where an alias tells."""
    mine = [replace(samples[0], id=f"twin-{n}", captions=(f"twin {n}",)) for n in range(20)]
    aliased = [
        replace(samples[n], aliases=(f"vg:{n}", "coco:7"), captions=(f"alias {n}",)) for n in range(1, COUNT - 1)
    ]
    last = samples[-1]
    for group in (mine, aliased):
        corpus = SampleList([*group, last])
        for sample in group:
            assert image_identity(sample) == image_identity(group[0])
            texts, _ = draw_texts(sample, corpus, Texts(negative=3), np.random.default_rng(0))
            assert set(texts[1:]) <= set(last.captions)


def test_a_caption_that_fits_both_images_is_no_mismatch(samples: list[Sample]) -> None:
    same = [replace(sample, captions=("a dog", f"number {n}")) for n, sample in enumerate(samples[:3])]
    for seed in range(50):
        texts, _ = draw_texts(same[0], SampleList(same), Texts(negative=2), np.random.default_rng(seed))
        assert set(texts[1:]) <= {"number 1", "number 2"}


@pytest.mark.parametrize("count", [1, 300])
def test_the_last_image_with_another_caption_is_found(samples: list[Sample], count: int) -> None:
    crowd = [replace(samples[0], id=str(n)) for n in range(count)]
    for place in (0, len(crowd) // 2, len(crowd)):
        corpus = SampleList([*crowd[:place], samples[1], *crowd[place:]])
        for seed in range(5):
            texts, _ = draw_texts(crowd[0], corpus, Texts(negative=2), np.random.default_rng(seed))
            assert set(texts[1:]) <= set(samples[1].captions)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_image_alone_is_an_error(samples: list[Sample], workers: int) -> None:
    alone = [samples[0], replace(samples[0], id="again", captions=("something else",))]
    with pytest.raises(UserError, match=r"data\.texts: no caption of another image.*2 samples.*negative=0") as caught:
        take(stream(alone, workers=workers), 1)
    assert "\n" not in str(caught.value)
    assert take(stream(alone, Texts(positive=3)), 1)[0].matched is not None


def test_what_can_not_be_read_is_no_mismatch(samples: list[Sample]) -> None:
    class Holes(SampleList):
        def sample(self, index: int) -> Sample:
            if index % 3:
                raise SampleError("gone")
            return super().sample(index)

    owner = {caption: number for number, sample in enumerate(samples) for caption in sample.captions}
    for seed in range(30):
        texts, _ = draw_texts(samples[0], Holes(samples), Texts(negative=2), np.random.default_rng(seed))
        assert all(owner[text] % 3 == 0 and owner[text] for text in texts[1:])


def test_a_coin_decides_for_each_text(samples: list[Sample]) -> None:
    options = Texts(positive=2, negative=2, coin=True)
    flags = []
    for batch in take(stream(samples, options), 60):
        for identity, texts, matched in rows(batch, 4):
            own = next(sample for sample in samples if sample.id == identity).captions
            assert [text in own for text in texts] == [bool(flag) for flag in matched]
            drawn = [text for text, flag in zip(texts, matched, strict=True) if flag]
            assert len(set(drawn)) == min(len(drawn), len(own))
            flags.append(matched)
    found = np.array(flags)
    assert np.abs(found.mean(axis=0) - 0.5).max() < 0.08
    assert len({tuple(row) for row in flags}) == 16


def test_a_coin_needs_two_texts() -> None:
    with pytest.raises(ValueError, match="coin: one text per image"):
        Texts(coin=True)
    assert Texts(positive=2, coin=True).per_image == 2


def test_matched_texts_that_say_left_or_right_keep_the_image_as_it_is(samples: list[Sample]) -> None:
    assert DrawnTexts(["a cat", "a dog on the LEFT"], [True, True]).names_a_side
    assert not DrawnTexts(["a cat", "a dog on the left"], [True, False]).names_a_side
    still = data_with(FOUR, crop_scale=(1, 1), crop_ratio=(1, 1), randaugment=None)
    sides, plain = ("a leftmost dog", "a dog"), ("a cat", "a bright copyright")
    for own, other, looks in [(sides, plain, 1), (plain, sides, 2)]:
        pair = [replace(samples[3], captions=own), replace(samples[4], captions=other)]
        batches = take(stream(pair, data=still, global_batch=2, micro_batch=2), 30)
        seen = {batch.images[batch.sample_ids.index(samples[3].id)].numpy().tobytes() for batch in batches}
        assert len(seen) == looks


def test_ranks_workers_and_resuming_change_nothing(samples: list[Sample]) -> None:
    broken = [Sample("broken", Path("nowhere.png"), ("a dog",)), *samples]
    options = Texts(positive=2, negative=1, coin=True)
    straight = take(stream(broken, options, micro_batch=4), 12)
    matched = [batch.matched for batch in straight]
    together = take(stream(broken, options, micro_batch=4, workers=2), 12)
    later = take(stream(broken, options, micro_batch=4, start_step=2), 8)
    halves = [take(stream(broken, options, micro_batch=4, rank=rank, world=2), 6) for rank in (0, 1)]
    pairs = [batch for pair in zip(*halves, strict=True) for batch in pair]
    for found, expected, flags in [
        (together, straight, matched),
        (later, straight[4:], matched[4:]),
        (pairs, straight, matched),
    ]:
        assert_equal(found, expected)
        assert all(torch.equal(a.matched, b) for a, b in zip(found, flags, strict=True))  # type: ignore[arg-type]


def test_shards_give_the_texts_of_the_jsonl_they_were_made_of(tmp_path: Path) -> None:
    jsonl = make(tmp_path / "jsonl", 30, size=16)
    corpora = [training_split(read_data(Data(path=str(p)))) for p in (jsonl, shard(jsonl, tmp_path / "shards"))]
    listed, stored = (take(stream(corpus), 6) for corpus in corpora)
    assert_equal(listed, stored, but=("image_ids",))
    assert len({text for batch in stored for text in batch.texts}) > 20


def test_evaluation_has_no_texts(samples: list[Sample]) -> None:
    (batch,) = evaluation_batches(samples[:5], data_with(FOUR), 8)
    assert (batch.input_ids.shape, batch.matched) == ((5, 0), None)
    assert ids([batch]) == [sample.id for sample in samples[:5]]
