"""Inputs that keep their aspect ratio: sizes, padding, the order of similar shapes, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.corpus import assert_equal, ids, make_tokenizer, picture, take, write_jsonl
from tests.data.test_stream_shards import shard
from vlscale.config import Aspect, Augmentation, Data, Tokenizer
from vlscale.data import aspect as aspect_module
from vlscale.data.aspect import AspectOrder, aspect_ratios, padded
from vlscale.data.corpus import Joined, SampleList
from vlscale.data.images import (
    ImageError,
    evaluation_image,
    fitted_shape,
    load_image,
    normalize,
    normalize_batch,
    upright_size,
)
from vlscale.data.open import read_data
from vlscale.data.order import Order, Part, ShuffledOrder
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import Stream, evaluation_batches

COUNT = 53
GROUP = 8
ASPECT = Aspect(short=24, long=40, multiple=16, window=26)
DATA = Data(aspect=ASPECT, augment=Augmentation(randaugment=None), tokenizer=Tokenizer(max_tokens=7))
SHAPES = [(40, 30), (30, 40), (60, 20), (20, 60), (33, 33), (50, 31), (90, 9)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Pictures of many shapes, some of which lie on their side in the file."""
    folder = tmp_path_factory.mktemp("shapes")
    made = []
    for number in range(COUNT):
        width, height = SHAPES[number % len(SHAPES)]
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 5 == 0 else 1
        path = folder / f"{number}.jpg"
        picture(number, width + number % 3, height).save(path, exif=exif, quality=95)
        made.append(Sample(f"sample-{number}", path, (f"a dog number {number}", "a dog on the left")))
    return made


def stream(samples: list[Sample], data: Data = DATA, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": GROUP, "micro_batch": GROUP, **options}
    return Stream(samples, data, make_tokenizer(samples, max_tokens=data.tokenizer.max_tokens), **settings)


def shuffled(count: int, window: int = 65536) -> ShuffledOrder:
    return ShuffledOrder([Part(np.ones(count, dtype=np.int64))], seed=3, window=window)


def walk(order: Order, first: int, count: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(first, first + count)]


def padding(batches: list[Batch]) -> float:
    """Share of the pixels that are padding."""
    given = sum(batch.images.shape[0] * batch.images.shape[2] * batch.images.shape[3] for batch in batches)
    return 1 - sum(int(sizes(batch).prod(dim=1).sum()) for batch in batches) / given


def sizes(batch: Batch) -> torch.Tensor:
    assert batch.image_sizes is not None
    return batch.image_sizes


def cut(batch: Batch) -> list[torch.Tensor]:
    """The images without their padding, which is checked to be 0."""
    found = []
    for image, (height, width) in zip(batch.images, sizes(batch).tolist(), strict=True):
        found.append(image[:, :height, :width].clone())
        rest = image.clone()
        rest[:, :height, :width] = 0
        assert not rest.any()
    return found


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((800, 600), (600, 800)),
        ((500, 375), (600, 800)),
        ((375, 500), (800, 600)),
        ((640, 640), (600, 600)),
        ((1000, 600), (600, 1000)),
        ((3000, 600), (200, 1000)),
        ((600, 3000), (1000, 200)),
        ((1, 1), (600, 600)),
        ((50_000, 3), (1, 1000)),
    ],
)
def test_the_shorter_side_is_short_unless_the_longer_exceeds_long(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert fitted_shape(*size, Aspect()) == shape


def test_images_are_those_of_pillow_in_their_own_ratio(samples: list[Sample]) -> None:
    for sample in samples:
        upright = load_image(sample.image)
        height, width = fitted_shape(*upright.size, ASPECT)
        expected = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        ours = evaluation_image(sample.image, DATA).permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() <= 4
        assert max(ours.shape) <= ASPECT.long
        assert abs(width - height * upright.width / upright.height) < 1 + upright.width / upright.height


def test_a_batch_is_padded_right_and_below(samples: list[Sample]) -> None:
    for batch in take(stream(samples), 7):
        assert (batch.images.dtype, sizes(batch).dtype, sizes(batch).shape) == (torch.uint8, torch.int64, (GROUP, 2))
        for side, largest in zip(batch.images.shape[2:], sizes(batch).max(dim=0).values.tolist(), strict=True):
            assert side % ASPECT.multiple == 0
            assert side - ASPECT.multiple < largest <= side
        for image, identity, text in zip(cut(batch), batch.sample_ids, batch.texts, strict=True):
            plain = evaluation_image(samples[int(identity.removeprefix("sample-"))].image, DATA)
            mirrored = torch.equal(image, plain.flip(-1))
            assert torch.equal(image, plain) or (mirrored and "left" not in text)


def test_half_of_the_images_are_mirrored(samples: list[Sample]) -> None:
    alone = [Sample("x", samples[0].image, ("a dog",))]
    plain = evaluation_image(alone[0].image, DATA)
    seen = [cut(batch)[0] for batch in take(stream(alone, global_batch=1, micro_batch=1), 60)]
    assert 15 < sum(torch.equal(image, plain) for image in seen) < 45
    still = DATA.model_copy(update={"augment": Augmentation(randaugment=None, flip=False)})
    assert all(
        torch.equal(cut(batch)[0], plain) for batch in take(stream(alone, still, global_batch=1, micro_batch=1), 20)
    )


def test_padding_of_no_images_and_of_exact_ones() -> None:
    images, empty = padded([], 16)
    assert (images.shape, empty.shape) == ((0, 3, 16, 16), (0, 2))
    images, _ = padded([torch.ones(3, 32, 16, dtype=torch.uint8), torch.ones(3, 1, 33, dtype=torch.uint8)], 16)
    assert images.shape == (2, 3, 32, 48)


def test_evaluation_keeps_the_order_and_pads_each_batch(samples: list[Sample]) -> None:
    batches = list(evaluation_batches(samples, DATA, 7))
    assert ids(batches) == [sample.id for sample in samples]
    images = [image for batch in batches for image in cut(batch)]
    for sample, image in zip(samples, images, strict=True):
        assert torch.equal(image, evaluation_image(sample.image, DATA))
    lost = Sample("lost", Path("nowhere.png"), ("a dog",))
    first, second = evaluation_batches([lost, lost, samples[0]], DATA, 2)
    assert (first.images.shape, sizes(first).shape, len(first.skipped)) == ((0, 3, 16, 16), (0, 2), 2)
    assert second.image_ids.tolist() == [2]


@pytest.mark.parametrize("count", [5, 40, 200, 203])
@pytest.mark.parametrize(("window", "group"), [(1, 8), (64, 8), (100, 7), (1000, 16), (48, 1)])
def test_every_epoch_stays_a_permutation_and_a_position_needs_no_history(count: int, window: int, group: int) -> None:
    ratios = np.random.default_rng(0).uniform(0.3, 3, count).astype(np.float32)
    order = AspectOrder(shuffled(count), ratios, window, group, seed=3)
    assert len(order) == count
    straight = walk(order, 0, 4 * count)
    for epoch in range(4):
        seen = straight[epoch * count : (epoch + 1) * count]
        assert {number for number, _ in seen} == {epoch}
        assert sorted(index for _, index in seen) == list(range(count))
    jumping = AspectOrder(shuffled(count), ratios, window, group, seed=3)
    for position in np.random.default_rng(1).permutation(len(straight)).tolist():
        assert jumping.at(position) == straight[position]


def test_steps_are_slices_of_sorted_windows_and_come_in_no_order() -> None:
    count, window, group = 960, 240, 8  # four windows of an epoch, thirty steps each
    ratios = np.random.default_rng(0).permutation(count).astype(np.float32)
    base = shuffled(count)
    order = AspectOrder(base, ratios, window, group, seed=3)
    for epoch in range(2):
        begin = epoch * count
        for edge, end in [(0, 240), (240, 480), (480, 720), (720, 960)]:
            plain, ours = walk(base, begin + edge, end - edge), walk(order, begin + edge, end - edge)
            assert set(plain) == set(ours)
            ranks = np.argsort(np.argsort([ratios[index] for _, index in ours])).reshape(-1, group)
            assert np.array_equal(ranks, ranks[:, :1] + np.arange(group))  # each step sorted, and without a gap
            assert np.array_equal(np.sort(ranks[:, 0]), np.arange(0, end - edge, group))
            assert np.abs(np.corrcoef(ranks[:, 0], np.arange(len(ranks)))[0, 1]) < 0.5


def test_a_step_over_two_epochs_takes_the_middle_of_both() -> None:
    count, group = 100, 8
    ratios = np.random.default_rng(0).permutation(count).astype(np.float32)
    order = AspectOrder(shuffled(count), ratios, 1000, group, seed=3)
    step = walk(order, 96, group)
    assert {epoch for epoch, _ in step} == {0, 1}
    found = [float(ratios[index]) for _, index in step]
    assert min(found) >= 40
    assert max(found) <= 60


def test_equal_shapes_are_as_mixed_as_without_sorting() -> None:
    order = AspectOrder(shuffled(64), np.ones(64, np.float32), 64, 8, seed=3)
    steps = [
        {frozenset(index for _, index in walk(order, 8 * step, 8)) for step in range(8 * e, 8 * e + 8)} for e in (0, 1)
    ]
    assert not steps[0] & steps[1]


def test_ranks_slice_the_same_steps(samples: list[Sample]) -> None:
    whole = take(stream(samples, micro_batch=4), 14)
    halves = [take(stream(samples, micro_batch=4, rank=rank, world=2), 7) for rank in (0, 1)]
    assert_equal(whole, [batch for pair in zip(*halves, strict=True) for batch in pair])
    # Larger micro-batches are padded otherwise, but hold the same images.
    for batch, (left, right) in zip(take(stream(samples), 7), zip(*halves, strict=True), strict=True):
        assert batch.sample_ids == ids([left, right])
        assert all(torch.equal(a, b) for a, b in zip(cut(batch), [*cut(left), *cut(right)], strict=True))


def test_workers_and_resuming_change_nothing(samples: list[Sample]) -> None:
    broken = [*samples, Sample("broken", Path("nowhere.png"), ("a dog",))]
    straight = take(stream(broken), 14)
    assert_equal(straight, take(stream(broken, workers=2), 14))
    assert_equal(straight[9:], take(stream(broken, start_step=9), 5))
    assert sum(len(batch.skipped) for batch in straight) == 2
    epochs = [set(ids(straight)[: COUNT + 1]), set(ids(straight)[COUNT + 1 : 2 * COUNT + 2])]
    assert epochs == [{sample.id for sample in samples}] * 2


def test_batches_waste_less_than_in_the_plain_order(samples: list[Sample]) -> None:
    steps = 3 * COUNT // GROUP
    data = DATA.model_copy(update={"aspect": ASPECT.model_copy(update={"multiple": 4, "window": COUNT})})
    plain = take(stream(samples, data, order=shuffled(COUNT)), steps)
    ours = take(stream(samples, data), steps)
    assert padding(ours) < 0.5 * padding(plain)

    def spread(batches: list[Batch]) -> float:
        return float(np.mean([np.std(np.divide(*sizes(batch).T.numpy())) for batch in batches]))

    assert spread(ours) < 0.5 * spread(plain)


def test_ratios_are_of_the_upright_images_wherever_they_lie(samples: list[Sample], tmp_path: Path) -> None:
    expected = [load_image(sample.image).width / load_image(sample.image).height for sample in samples]
    listed = SampleList(samples)
    assert listed.aspects().dtype == np.float32
    np.testing.assert_allclose(listed.aspects(), expected, rtol=1e-6)
    np.testing.assert_allclose(SampleList(samples, np.array([3, 1])).aspects(), [expected[3], expected[1]], rtol=1e-6)
    np.testing.assert_allclose(Joined([listed, listed], [1, 2]).aspects(), [*expected, *expected], rtol=1e-6)
    empty = Sample("none", samples[0].image)
    files = SampleList.packed([*samples[:9], empty, *samples[9:]])
    stored = read_data(Data(path=str(shard(_jsonl(files, tmp_path / "jsonl"), tmp_path / "shards"))))
    assert len(stored) == COUNT + 1
    chosen = stored.select(["train"])
    assert len(chosen) == COUNT
    by_name = {sample.id: ratio for sample, ratio in zip(samples, expected, strict=True)}
    np.testing.assert_allclose(chosen.aspects(), [by_name[sample.id] for sample in chosen.readable()], rtol=1e-6)


def _jsonl(samples: SampleList, folder: Path) -> Path:
    folder.mkdir()
    rows = [{"id": s.id, "image": str(s.image), "captions": list(s.captions)} for s in samples.readable()]
    write_jsonl(folder / "captions.jsonl", rows)
    return folder


def test_headers_are_read_once_and_bad_ones_count_as_square(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def counting(file: Any) -> tuple[int, int]:
        opened.append(file)
        return upright_size(file)

    monkeypatch.setattr(aspect_module, "upright_size", counting)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = [Sample(name, tmp_path / name, ("a dog",)) for name in ("bad.jpg", "lost.jpg")]
    corpus = SampleList([*bad, *samples])
    assert corpus.aspects()[:2].tolist() == [1, 1]
    assert corpus.aspects()[2] == pytest.approx(30 / 40)
    assert len(opened) == COUNT + 2
    assert aspect_ratios(0, lambda index: samples[index].image).shape == (0,)


def test_a_size_needs_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(0, 70, 50).save(path)
    start = path.read_bytes()[:60]
    path.write_bytes(start)
    assert upright_size(path) == upright_size(start) == (70, 50)
    with pytest.raises(ImageError, match="no such file"):
        upright_size(tmp_path / "b.png")


def test_padding_is_zero_once_normalised(samples: list[Sample]) -> None:
    (batch,) = take(stream(samples, DATA.model_copy(update={"second_view": True})), 1)
    before = batch.images.clone()
    ready = normalize_batch(batch, DATA)
    assert torch.equal(batch.images, before)
    assert batch.second_images is not None
    assert ready.second_images is not None
    for given, made in [(batch.images, ready.images), (batch.second_images, ready.second_images)]:
        assert made.dtype == torch.float32
        plain = normalize(given, DATA.mean, DATA.std)
        for row, (height, width) in enumerate(sizes(batch).tolist()):
            assert torch.equal(made[row, :, :height, :width], plain[row, :, :height, :width])
            made[row, :, :height, :width] = 0
        assert not made.any()


def test_normalising_square_images_is_what_it_was_and_never_waits_for_the_device() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    text = torch.ones(2, 3, dtype=torch.int64)
    ready = normalize_batch(Batch(images, text, text, torch.arange(2)), DATA)
    assert torch.equal(ready.images, normalize(images, DATA.mean, DATA.std))
    assert ready.second_images is None
    given = Batch(images, text, text, torch.arange(2), torch.full((2, 2), 5), second_images=images).to("meta")
    assert normalize_batch(given, DATA).images.device.type == "meta"  # a copy to the host would raise
