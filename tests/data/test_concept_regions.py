"""MVPTR's regions and streams: cuts, the data's own boxes, what is missing or broken, determinism."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.concept_data import (
    CAPTION,
    NEW,
    WIDTH,
    assert_same,
    data_with,
    make,
    one,
    padded,
    some_regions,
    stored,
    stream,
    tokenizer_of,
    with_picture,
    write_vocabularies,
)
from tests.data.corpus import ids, take
from vlscale.config import Data
from vlscale.data.images import normalize, normalize_batch
from vlscale.data.regions import Regions, pack
from vlscale.data.sample import Batch
from vlscale.data.stream import Stream, evaluation_batches
from vlscale.data.text import build_tokenizer
from vlscale.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabularies(tmp_path_factory.mktemp("concepts"))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 60])
def test_regions_are_cut_and_padded(place: Path, tmp_path: Path, count: int) -> None:
    """The most confident ones stay, in whatever order the file has them."""
    regions = some_regions(3, count)
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = Regions(regions.features[mixed], regions.boxes[mixed], regions.confidences[mixed], regions.tags)
    sample = make(tmp_path, 0, regions=stored(tmp_path / "r", pack(shuffled)))
    batch = one(sample, data_with(place))
    kept = min(count, 4)
    assert batch.region_mask.tolist() == [padded([1] * kept, 4)]  # type: ignore[union-attr]
    assert torch.equal(batch.regions[0, :kept, :WIDTH], regions.features[:kept].float())  # type: ignore[index]
    assert torch.equal(batch.region_boxes[0, :kept], regions.boxes[:kept])  # type: ignore[index]
    assert not batch.regions[0, kept:].any()  # type: ignore[index]


# --- regions of the data's own boxes ----------------------------------------------------------------------------------


def test_pixels_of_the_datas_boxes(place: Path, tmp_path: Path) -> None:
    boxes = ((0.25, 0.0, 0.75, 1.0), (0.9, 0.9, 1.0001, 1.0), (0.5, 0.5, 0.5, 0.5))
    sample = with_picture(tmp_path, 0, boxes)
    data = data_with(place, pixels=4, region_width=48)
    batch = one(sample, data)
    assert batch.images.shape == (1, 3, 0, 0)
    assert batch.region_mask.tolist() == [[1, 1, 1, 1]]  # type: ignore[union-attr]
    whole = Image.open(sample.image).convert("RGB")
    for row, corners in enumerate([(10, 0, 30, 30), (36, 27, 40, 30), (20, 15, 21, 16), (0, 0, 40, 30)]):
        small = np.asarray(whole.crop(corners).resize((4, 4), Image.Resampling.BICUBIC)).copy()
        wanted = normalize(torch.from_numpy(small).permute(2, 0, 1)[None], data.mean, data.std).flatten()
        found = batch.regions[0, row, :48]  # type: ignore[index]
        assert (found - wanted).abs().max() < 2.1 / 255 / min(data.std)  # two grey levels, see images._resize
    assert batch.region_boxes[0, 1].tolist() == pytest.approx([0.9, 0.9, 1, 1])  # type: ignore[index]
    assert batch.region_boxes[0, 3].tolist() == [0, 0, 1, 1]  # type: ignore[index]


def test_the_whole_image_always_has_a_place(place: Path, tmp_path: Path) -> None:
    data = data_with(place, pixels=2, region_width=12)
    many = one(with_picture(tmp_path, 0, ((0.0, 0.0, 0.5, 0.5),) * 9), data)
    none = one(with_picture(tmp_path, 1, ()), data)
    assert many.region_boxes[0].tolist() == [[0, 0, 0.5, 0.5]] * 3 + [[0, 0, 1, 1]]  # type: ignore[index]
    assert none.region_mask.tolist() == [[1, 0, 0, 0]]  # type: ignore[union-attr]
    assert none.region_boxes[0, 0].tolist() == [0, 0, 1, 1]  # type: ignore[index]


def test_stored_regions_win_over_pixels(place: Path, tmp_path: Path) -> None:
    data = data_with(place, pixels=1, region_width=3)
    regions = some_regions(0, 2, width=3)
    batch = one(make(tmp_path, 0, regions=stored(tmp_path / "r", pack(regions)), boxes=((0, 0, 1, 1),)), data)
    assert torch.equal(batch.regions[0, :2, :3], regions.features.float())  # type: ignore[index]


# --- what is missing or broken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_no_regions_is_an_error(place: Path, tmp_path: Path, workers: int) -> None:
    good = [make(tmp_path, number) for number in range(3)]
    bare = replace(good[0], id="bare", regions=None)
    with pytest.raises(UserError, match=r"sample bare has no regions; .*`vlscale data regions`.*pixels") as caught:
        stream([bare, *good], data_with(place))
    assert "\n" not in str(caught.value)
    late = stream([*good, bare], data_with(place), workers=workers)
    with pytest.raises(UserError, match="sample bare has no regions"):
        take(late, 2)
    data = data_with(place)
    with pytest.raises(UserError, match="sample bare has no regions"):
        list(evaluation_batches([*good, bare], data, 8, tokenizer_of(data)))


def test_regions_of_another_width_are_an_error_where_all_are(place: Path, tmp_path: Path) -> None:
    samples = [make(tmp_path, number) for number in range(12)]
    broken = replace(samples[0], regions=stored(tmp_path / "b", b"garbage"))
    wanted = r"sample s1: regions: 6 numbers per region, data\.concepts\.region_width is 2048; set"
    data = data_with(place, region_width=2048)
    with pytest.raises(UserError, match=wanted) as caught:
        stream([broken, *samples[1:]], data)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=wanted):
        next(evaluation_batches([broken, *samples[1:]], data, 4, tokenizer_of(data)))


def _not_finite() -> bytes:
    regions = some_regions(0, 2)
    return pack(replace(regions, features=regions.features / 0))


BROKEN = {
    "another width": (pack(some_regions(0, 2, width=5)), "regions: 5 numbers per region"),
    "garbage": (b"garbage", "regions: not a file of regions"),
    "cut": (pack(some_regions(0, 2))[:-1], "regions: not a file of regions"),
    "not finite": (_not_finite(), "regions: features that are not finite"),
    "boxes outside": (pack(replace(some_regions(0, 2), boxes=torch.full((2, 4), 3.0))), "regions: expected boxes"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("number", [0, 5])
def test_broken_regions_give_way_to_the_next_sample(place: Path, tmp_path: Path, kind: str, number: int) -> None:
    content, why = BROKEN[kind]
    samples = [make(tmp_path, number) for number in range(9)]
    damaged = list(samples)
    damaged[number] = replace(samples[number], regions=stored(tmp_path / "bad", content))
    data = data_with(place)
    order = ids(take(stream(samples, data), 3))
    at = order.index(f"s{number}")
    batches = take(stream(damaged, data), 3)
    found = ids(batches)
    assert found[:9] == [*order[:at], order[at + 1], *order[at + 1 : 9]]
    (named, *_) = [line for batch in batches for line in batch.skipped]
    assert named.startswith(f"{samples[number].image}: {why}")
    evaluated = list(evaluation_batches(damaged, data, 5, tokenizer_of(data)))
    assert ids(evaluated) == [sample.id for sample in samples if sample.id != f"s{number}"]
    assert [line for batch in evaluated for line in batch.skipped] == [named]


def test_boxes_that_are_none_give_way_too(place: Path, tmp_path: Path) -> None:
    data = data_with(place, pixels=2, region_width=12)
    turned = with_picture(tmp_path, 0, ((0.8, 0.0, 0.2, 1.0),))
    lost = replace(with_picture(tmp_path, 1, ()), image=tmp_path / "nowhere.png")
    nothing = with_picture(tmp_path, 2, ((float("nan"), 0.0, 1.0, 1.0),))
    batches = list(
        evaluation_batches([turned, lost, nothing, with_picture(tmp_path, 3, ())], data, 4, tokenizer_of(data))
    )
    assert ids(batches) == ["p3"]
    assert [line.partition(": ")[2] for line in batches[0].skipped] == [
        "boxes: expected x1 <= x2 and y1 <= y2 (shares of the image)",
        "no such file",
        "boxes: expected x1 <= x2 and y1 <= y2 (shares of the image)",
    ]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_ranks_workers_and_resuming_change_nothing(place: Path, tmp_path: Path) -> None:
    samples = [make(tmp_path, number, count=number % 6) for number in range(7)]
    samples.append(replace(samples[0], id="bad", regions=stored(tmp_path / "bad", b"garbage")))
    data = data_with(place)
    straight = take(stream(samples, data, micro_batch=2), 12)
    assert len({batch.input_ids.numpy().tobytes() for batch in straight}) > 6
    assert_same(straight, take(stream(samples, data, micro_batch=2, workers=2), 12))
    assert_same(straight[4:], take(stream(samples, data, micro_batch=2, start_step=2), 8))
    halves = [take(stream(samples, data, micro_batch=2, rank=rank, world=2), 6) for rank in (0, 1)]
    assert_same(straight, [batch for pair in zip(*halves, strict=True) for batch in pair])


def test_evaluation(place: Path, tmp_path: Path) -> None:
    """Every image once, with what training gives of it, and no text."""
    samples = [make(tmp_path, number, count=number % 6) for number in range(7)]
    data = data_with(place)
    batches = list(evaluation_batches(samples, data, 3, tokenizer_of(data)))
    assert ids(batches) == [sample.id for sample in samples]
    assert torch.cat([batch.image_ids for batch in batches]).tolist() == list(range(7))
    (trained,) = take(stream(samples, data, global_batch=7, micro_batch=7), 1)
    for name in NEW:
        parts = [getattr(batch, name) for batch in batches]
        if name.startswith("phrase"):
            assert parts == [None] * 3
            continue
        rows = [trained.sample_ids.index(sample.id) for sample in samples]
        assert torch.equal(torch.cat(parts), getattr(trained, name)[rows])
    assert batches[0].input_ids.shape == (3, 0)
    assert batches[0].images.shape == (3, 3, 0, 0)
    with pytest.raises(ValueError, match="tokenizer"):
        next(evaluation_batches(samples, data, 3))


def test_batches_move_and_are_normalised(place: Path, tmp_path: Path) -> None:
    data = data_with(place)
    batch = one(make(tmp_path, 0), data)
    ready = normalize_batch(batch, data)
    assert (ready.images.shape, ready.images.dtype) == ((1, 3, 0, 0), torch.float32)
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in NEW)
    assert {field.name for field in fields(Batch)} >= set(NEW)


def test_other_systems_have_none_of_it(tmp_path: Path) -> None:
    sample = with_picture(tmp_path, 0, ())
    data = Data(image_size=8)
    tokenizer = build_tokenizer(data.tokenizer, [CAPTION])
    (batch,) = take(Stream([sample], data, tokenizer, seed=0, global_batch=1, micro_batch=1), 1)
    (evaluated,) = evaluation_batches([sample], data, 1)
    assert all(getattr(one_of, name) is None for one_of in (batch, evaluated) for name in NEW)
    assert batch.to("cpu").regions is None
