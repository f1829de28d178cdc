"""The stream over shards and joined sources: the order of jsonl, exactly once on any world, damage named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.corpus import assert_equal, ids, make_tokenizer, picture, take, write_jsonl
from vlscale.config import Data, Tokenizer
from vlscale.data.corpus import Corpus
from vlscale.data.open import read_data, training_split
from vlscale.data.order import ShuffledOrder
from vlscale.data.sample import Sample
from vlscale.data.shard_plan import plan_shards
from vlscale.data.shard_writer import write_shards
from vlscale.data.shards import open_shards
from vlscale.data.stream import Stream, evaluation_batches
from vlscale.errors import UserError

COUNT = 150
DATA = Data(image_size=16, tokenizer=Tokenizer(max_tokens=7))


def make(folder: Path, count: int = COUNT, name: str = "", size: int = 70) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for number in range(count):
        noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    records = [
        {"image": f"{number}.png", "id": f"{name}{number}", "captions": [f"a dog {number}", "two red cats"]}
        for number in range(count)
    ]
    return write_jsonl(folder / "captions.jsonl", records)


def shard(source: Path, out: Path, max_size: int = 1 << 17) -> Path:
    plan, _, missing = plan_shards([str(source)], max_size, None)
    write_shards(plan, out, missing, 2)
    return out


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("jsonl"))


@pytest.fixture(scope="module")
def shards(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard(jsonl, tmp_path_factory.mktemp("out") / "shards")


def corpus_of(path: Path) -> Corpus:
    return training_split(read_data(Data(path=str(path))))


def stream(corpus: Any, window: int = 65536, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": 8, "micro_batch": 8, **options}
    tokenizer = make_tokenizer([Sample("t", Path("t"), ("a dog two red cats 0123456789",))], max_tokens=7)
    return Stream(corpus, DATA.model_copy(update={"window": window}), tokenizer, **settings)


def test_shards_train_as_the_jsonl_they_were_made_of(jsonl: Path, shards: Path) -> None:
    assert len(list(shards.glob("*.tar"))) > 10
    assert_equal(take(stream(corpus_of(jsonl)), 30), take(stream(corpus_of(shards)), 30), but=("image_ids",))


@pytest.mark.parametrize("window", [10, 40, 65536])
def test_exactly_once_on_one_and_two_ranks_and_from_one_to_two(shards: Path, window: int) -> None:
    corpus = corpus_of(shards)
    steps = 2 * COUNT // 8 + 1
    whole = take(stream(corpus, window), steps)
    seen = ids(whole)
    assert [Counter(seen[epoch * COUNT : (epoch + 1) * COUNT]).most_common(1)[0][1] for epoch in (0, 1)] == [1, 1]

    def on_two(first: int, last: int) -> list[str]:
        """Ids step by step of two ranks that start at step `first`."""
        options = {"world": 2, "micro_batch": 4, "start_step": first}
        ranks = [take(stream(corpus, window, rank=rank, **options), last - first) for rank in (0, 1)]
        return [identity for pair in zip(*ranks, strict=True) for batch in pair for identity in batch.sample_ids]

    assert on_two(0, steps) == seen
    # Stopped after step 7 on one rank, gone on with on two, and back on one after step 20.
    resumed = ids(whole[:7]) + on_two(7, 20) + ids(take(stream(corpus, window, start_step=20), steps - 20))
    assert resumed == seen


def test_fewer_shards_than_ranks_times_workers(jsonl: Path, tmp_path: Path) -> None:
    corpus = corpus_of(shard(jsonl, tmp_path / "one", max_size=1 << 30))
    assert len(list((tmp_path / "one").glob("*.tar"))) == 1
    whole = take(stream(corpus), 6)
    sources = [stream(corpus, rank=rank, world=4, micro_batch=2, workers=2) for rank in range(4)]
    ranks = [take(source, 6) for source in sources]
    assert [ids([rank[step] for rank in ranks]) for step in range(6)] == [batch.sample_ids for batch in whole]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)


def test_workers_change_nothing_over_shards_and_lists(jsonl: Path, shards: Path) -> None:
    for corpus in (corpus_of(shards), corpus_of(jsonl)):
        assert_equal(take(stream(corpus, 40), 8), take(stream(corpus, 40, workers=2), 8))


def test_a_shard_damaged_while_training(shards: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    for path in shards.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    corpus = open_shards(place)
    expected = take(stream(corpus), 19)  # a whole epoch
    victim = sorted(place.glob("*.tar"))[3]
    lost = {sample.id for sample in corpus if str(sample.image).startswith(f"{victim}:")}
    with victim.open("r+b") as file:
        file.truncate(1024)
    batches = take(stream(corpus), 19)
    assert all(len(batch) == 8 for batch in batches)
    assert not lost & set(ids(batches))
    skipped = [line for batch in batches for line in batch.skipped]
    assert {line.split(":")[0].split(",")[0] for line in skipped} == {str(victim)}
    met = [identity for identity in ids(expected) if identity in lost]
    # Each lost sample is met in its own place; runs of them are met by more than one place.
    assert len(skipped) >= len(met) > 3
    kept = [(a, b) for a, b in zip(ids(expected), ids(batches), strict=True) if a not in lost]
    assert all(a == b for a, b in kept), "samples that can be read keep their place"


def test_a_wrecked_image_inside_a_shard(shards: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    for path in shards.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    corpus = open_shards(place)
    image: Any = corpus[60].image
    content = bytearray(Path(image.tar).read_bytes())
    content[image.offset + 100 : image.offset + image.length - 100] = b"\0" * (image.length - 200)
    Path(image.tar).write_bytes(bytes(content))
    batches = take(stream(corpus), 19)
    skipped = {line for batch in batches for line in batch.skipped}
    assert len(skipped) == 1
    assert skipped.pop().startswith(corpus.where(60))
    shown = list(evaluation_batches(corpus, DATA, 50))
    assert sum(len(batch) for batch in shown) == COUNT - 1
    assert next(line for batch in shown for line in batch.skipped).startswith(corpus.where(60))


def test_a_caption_of_5000_words(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    caption = " ".join(f"dog{number}" for number in range(5000))
    source = write_jsonl(tmp_path / "captions.jsonl", [{"image": "a.png", "captions": [caption]}])
    for path in (source, shard(source, tmp_path / "shards")):
        (batch,) = take(stream(corpus_of(path), global_batch=1, micro_batch=1), 1)
        assert batch.input_ids.shape == (1, 7)
        assert batch.attention_mask.sum() == 7
        assert batch.texts == [caption]


@pytest.fixture
def joined(tmp_path: Path, shards: Path) -> Path:
    make(tmp_path / "small", 20, "small ")
    make(tmp_path / "half", 31, "half ")
    (tmp_path / "shards").symlink_to(shards)
    recipe = tmp_path / "corpus.yaml"
    recipe.write_text(
        "sources:\n  - shards\n  - {path: small/captions.jsonl, weight: 2}\n  - jsonl:half/captions.jsonl,weight=0.5\n"
    )
    return recipe


def test_joined_sources_come_by_their_weights(joined: Path) -> None:
    corpus = corpus_of(joined)
    size = COUNT + 40 + 16
    source = stream(corpus, window=50)
    assert (corpus.per_epoch(), source.steps_per_epoch) == (size, size / 8)
    seen = ids(take(source, 2 * size // 8 + 1))
    for epoch in range(2):
        counts = Counter(seen[epoch * size : (epoch + 1) * size])
        assert sum(counts[str(number)] == 1 for number in range(COUNT)) == COUNT
        assert sum(counts[f"small {number}"] == 2 for number in range(20)) == 20
        assert sum(counts[f"half {number}"] for number in range(31)) == 16
    assert sum(Counter(seen[: 2 * size])[f"half {number}"] == 1 for number in range(31)) >= 30
    # Both times of a sample in one epoch show other crops.
    batches = take(stream(corpus), size // 8)
    crops = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert len(crops) == len(batches) * 8


def test_joined_sources_on_other_worlds_and_workers(joined: Path) -> None:
    corpus = corpus_of(joined)
    whole = take(stream(corpus, window=50), 12)
    ranks = [take(stream(corpus, 50, rank=rank, world=2, micro_batch=4, workers=1), 12) for rank in (0, 1)]
    assert [ids([rank[step] for rank in ranks]) for step in range(12)] == [batch.sample_ids for batch in whole]


def test_the_same_photograph_has_one_image_id(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    records = [
        {"image": "a.png", "captions": ["x"], "id": "coco", "aliases": ["flickr:1", "coco:5"]},
        {"image": "b.png", "captions": ["x"], "id": "vg", "aliases": ["vg:7", "coco:5"]},
        {"image": "b.png", "captions": ["x"], "id": "other", "aliases": ["vg:8"]},
    ]
    corpus = corpus_of(write_jsonl(tmp_path / "c.jsonl", records))
    (batch,) = take(stream(corpus, global_batch=3, micro_batch=3), 1)
    numbers = dict(zip(batch.sample_ids, batch.image_ids.tolist(), strict=True))
    assert numbers["coco"] == numbers["vg"] != numbers["other"]
    assert all(number >= 0 for number in numbers.values())


def test_an_order_of_four_million_costs_little() -> None:
    from vlscale.data.order import Part

    order = ShuffledOrder([Part(np.full(800, 5000, dtype=np.int64))], seed=0, window=65536)
    positions = [step * 512 + rank for step in range(7000, 7010) for rank in range(512)]
    assert len({order.at(position) for position in positions}) == len(positions)
    held = sum(array.nbytes for pair in order._windows.values() for array in pair)
    assert held < 4 << 20


def test_nothing_to_train_on(shards: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        stream(open_shards(shards).select(["val"]))
