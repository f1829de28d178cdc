"""A second view of each image: another crop of the same pixels, and nothing else changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.data.corpus import assert_equal, make_samples, make_tokenizer, take
from vlscale.config import Aspect, Augmentation, Data, Tokenizer
from vlscale.data import stream as stream_module
from vlscale.data.images import load_image, train_transform
from vlscale.data.order import generator, number_of
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import Stream, evaluation_batches

COUNT = 11
ONE = Data(image_size=16, tokenizer=Tokenizer(max_tokens=7))
TWO = ONE.model_copy(update={"second_view": True})


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("images"), COUNT)


def stream(samples: list[Sample], data: Data = TWO, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": 4, "micro_batch": 4, **options}
    return Stream(samples, data, make_tokenizer(samples, max_tokens=7), **settings)


def second(batch: Batch) -> torch.Tensor:
    assert batch.second_images is not None
    return batch.second_images


def test_the_first_view_is_what_it_is_alone_and_the_second_another(samples: list[Sample]) -> None:
    alone, both = take(stream(samples, ONE), 9), take(stream(samples), 9)
    assert_equal(alone, both)
    assert all(batch.second_images is None for batch in alone)
    for batch in both:
        assert (second(batch).shape, second(batch).dtype) == ((4, 3, 16, 16), torch.uint8)
        assert all(not torch.equal(a, b) for a, b in zip(batch.images, second(batch), strict=True))


def test_the_second_view_is_a_training_crop_of_the_same_image(samples: list[Sample]) -> None:
    by_id = {sample.id: sample for sample in samples}
    for epoch, batch in enumerate(take(stream(samples, global_batch=COUNT, micro_batch=COUNT), 3)):
        for view, identity, text in zip(second(batch), batch.sample_ids, batch.texts, strict=True):
            drawn = generator(5, epoch, number_of(identity), 1)
            crop = train_transform(TWO, drawn, allow_flip="left" not in text)(load_image(by_id[identity].image))
            assert torch.equal(view, crop)


def test_second_views_change_with_the_epoch_and_are_not_flipped_where_a_text_says_left(samples: list[Sample]) -> None:
    still = TWO.model_copy(update={"augment": Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), randaugment=None)})

    def looks(text: str, data: Data) -> tuple[int, float]:
        one = [Sample("x", samples[3].image, (text,))]
        batches = take(stream(one, data, global_batch=1, micro_batch=1), 40)
        equal = sum(torch.equal(batch.images, second(batch)) for batch in batches) / 40
        return len({second(batch).numpy().tobytes() for batch in batches}), equal

    assert looks("a dog on the left", still) == (1, 1.0)
    count, equal = looks("a dog", still)
    assert count == 2
    assert 0.2 < equal < 0.8  # the two are flipped independently
    assert looks("a dog", TWO)[0] > 35


def test_an_image_is_decoded_once(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def counting(file: Any) -> Any:
        opened.append(file)
        return load_image(file)

    monkeypatch.setattr(stream_module, "load_image", counting)
    take(stream(samples), 3)
    assert len(opened) == 12


def test_workers_ranks_and_resuming_change_nothing(samples: list[Sample]) -> None:
    straight = take(stream(samples, micro_batch=2), 12)
    halves = [take(stream(samples, micro_batch=2, rank=rank, world=2), 6) for rank in (0, 1)]
    for found, expected in [
        (take(stream(samples, micro_batch=2, workers=2), 12), straight),
        (take(stream(samples, micro_batch=2, start_step=3), 6), straight[6:]),
        ([batch for pair in zip(*halves, strict=True) for batch in pair], straight),
    ]:
        assert_equal(found, expected)
        assert all(torch.equal(second(a), second(b)) for a, b in zip(found, expected, strict=True))


def test_with_aspect_both_views_are_padded_alike(samples: list[Sample]) -> None:
    wide = TWO.model_copy(update={"aspect": Aspect(short=20, long=50, multiple=16)})
    for batch in take(stream(samples, wide), 3):
        assert batch.image_sizes is not None
        assert second(batch).shape == batch.images.shape
        for view, (height, width) in zip(second(batch), batch.image_sizes.tolist(), strict=True):
            assert view[:, :height, :width].any()
            assert not view[:, height:].any()
            assert not view[:, :, width:].any()


def test_evaluation_has_one_view(samples: list[Sample]) -> None:
    (batch,) = evaluation_batches(samples, TWO, COUNT)
    assert batch.second_images is None
