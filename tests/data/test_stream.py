"""The order of samples: exactly once, for any number of ranks and workers, resumed anywhere."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.corpus import assert_equal, ids, make_samples, make_tokenizer, take
from vlscale.config import Augmentation, Data, Tokenizer
from vlscale.data.order import Part, ShuffledOrder, number_of
from vlscale.data.sample import Sample
from vlscale.data.stream import Stream, evaluation_batches
from vlscale.errors import UserError

COUNT = 23
DATA = Data(image_size=16, tokenizer=Tokenizer(max_tokens=7))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("images"), COUNT)


def stream(samples: list[Sample], data: Data = DATA, **options: Any) -> Stream:
    settings: dict[str, Any] = {"seed": 5, "global_batch": 8, "micro_batch": 8, **options}
    return Stream(samples, data, make_tokenizer(samples, max_tokens=data.tokenizer.max_tokens), **settings)


def test_a_batch(samples: list[Sample]) -> None:
    (batch,) = take(stream(samples), 1)
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 16, 16), torch.uint8)
    assert batch.input_ids.shape == batch.attention_mask.shape == (8, 7)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.image_ids.dtype == torch.int64
    by_id = {sample.id: sample for sample in samples}
    for identity, text, image_id in zip(batch.sample_ids, batch.texts, batch.image_ids.tolist(), strict=True):
        assert text in by_id[identity].captions
        assert image_id == number_of(str(by_id[identity].image)) >> 1
    assert batch.skipped == []


def test_every_epoch_has_every_sample_once(samples: list[Sample]) -> None:
    source = stream(samples)
    assert source.steps_per_epoch == COUNT / 8
    seen = ids(take(source, 3 * COUNT))[: 3 * 8 * COUNT]
    epochs = [seen[start : start + COUNT] for start in range(0, len(seen), COUNT)]
    assert all(len(set(epoch)) == COUNT for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_other_seeds_order_otherwise(samples: list[Sample]) -> None:
    orders = {tuple(ids(take(stream(samples, seed=seed), 3))) for seed in (0, 1, -1, 2**70)}
    assert len(orders) == 4


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_slice_the_same_order(samples: list[Sample], world: int, micro: int) -> None:
    whole = take(stream(samples), 5)
    per_step = 8 // (world * micro)
    ranks = [take(stream(samples, micro_batch=micro, rank=rank, world=world), 5 * per_step) for rank in range(world)]
    for step, expected in enumerate(whole):
        parts = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
        assert ids(parts) == expected.sample_ids
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert [text for part in parts for text in part.texts] == expected.texts


@pytest.mark.parametrize("step", [1, 2, 3, 11])
def test_resuming_needs_the_step_only(samples: list[Sample], step: int) -> None:
    straight = take(stream(samples, micro_batch=4), 2 * 13)
    assert_equal(straight[2 * step :], take(stream(samples, micro_batch=4, start_step=step), 2 * (13 - step)))


def test_workers_change_nothing(samples: list[Sample]) -> None:
    broken = [Sample("broken", Path("nowhere.png"), ("a dog",)), *samples]
    alone = take(stream(broken), 7)
    before = torch.get_rng_state()
    source = stream(broken, workers=2)
    together = list(itertools.islice(source, 7))
    assert torch.equal(torch.get_rng_state(), before), "the loader drew from the global generator"
    assert_equal(alone, together)
    assert [batch.skipped for batch in alone] == [batch.skipped for batch in together]
    # Iterating again starts at the beginning, and closing ends the processes.
    assert_equal(alone[:2], list(itertools.islice(source, 2)))
    children = torch.multiprocessing.active_children()
    assert len(children) == 2
    source.close()
    for child in children:
        child.join(10)
        assert not child.is_alive()


def test_captions_crops_and_flips_change_with_the_epoch(samples: list[Sample]) -> None:
    alone = [Sample("same", samples[0].image, tuple(f"caption {n}" for n in range(50)))]
    batches = take(stream(alone, global_batch=1, micro_batch=1), 12)
    assert len({batch.texts[0] for batch in batches}) > 6
    assert len({batch.images.numpy().tobytes() for batch in batches}) > 10


@pytest.mark.parametrize("caption", ["a dog on the left", "A dog, RIGHT of a cat", "leftmost dog", "a right-hand turn"])
def test_captions_that_say_left_or_right_are_not_flipped(samples: list[Sample], caption: str) -> None:
    data = DATA.model_copy(update={"augment": Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), randaugment=None)})
    (plain,) = evaluation_batches(samples[3:4], data, 1)

    def flipped(text: str) -> int:
        batches = take(stream([Sample("x", samples[3].image, (text,))], data, global_batch=1, micro_batch=1), 40)
        # The crop keeps the shorter side only: compare with the mirrored self, not with the whole image.
        return len({batch.images.numpy().tobytes() for batch in batches})

    assert plain.images.shape == (1, 3, 16, 16)
    assert flipped(caption) == 1
    assert flipped("a bright dog and copyright") == 2


def test_equal_images_have_equal_ids(samples: list[Sample]) -> None:
    twice = [*samples[:4], *(Sample(f"again-{s.id}", s.image, s.captions) for s in samples[:4])]
    (batch,) = take(stream(twice), 1)
    found = dict(zip(batch.sample_ids, batch.image_ids.tolist(), strict=True))
    assert all(found[f"again-{s.id}"] == found[s.id] for s in samples[:4])
    assert len(set(found.values())) == 4


def test_an_unreadable_image_gives_way_to_the_next_one(samples: list[Sample], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(samples[7].image.read_bytes()[:60])
    damaged = [Sample(s.id, bad, s.captions) if s.id == "sample-7" else s for s in samples]
    good, with_bad = take(stream(samples), 3), take(stream(damaged), 3)
    order = ids(good)
    position = order.index("sample-7")
    expected = [*order[:position], order[position + 1], *order[position + 1 :]]
    assert ids(with_bad) == expected
    assert [len(batch.skipped) for batch in with_bad] == [int(position // 8 == step) for step in range(3)]
    named = with_bad[position // 8].skipped[0]
    assert named.startswith(f"{bad}: ")
    # Only the rank that met it says so, and every rank still gets as many samples.
    halves = [take(stream(damaged, micro_batch=4, rank=rank, world=2), 3) for rank in (0, 1)]
    assert sum(len(batch.skipped) for half in halves for batch in half) == 1
    assert all(len(batch) == 4 for half in halves for batch in half)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error_not_a_loop(samples: list[Sample], workers: int) -> None:
    lost = [Sample(s.id, Path("/nowhere") / s.image.name, s.captions) for s in samples]
    with pytest.raises(UserError, match=f"none of {COUNT} samples in a row can be read.*no such file") as caught:
        take(stream(lost, workers=workers), 1)
    assert "\n" not in str(caught.value)


def test_settings_that_can_not_work(samples: list[Sample]) -> None:
    with pytest.raises(UserError, match="8 is no multiple of micro_batch × ranks = 3 × 1"):
        stream(samples, micro_batch=3)
    with pytest.raises(UserError, match="no samples"):
        Stream([], DATA, make_tokenizer(samples), seed=0, global_batch=8, micro_batch=8)
    with pytest.raises(UserError, match="sample empty has no caption"):
        stream([*samples, Sample("empty", samples[0].image, ())])


def test_an_order_of_ones_own(samples: list[Sample]) -> None:
    class Backwards:
        def __len__(self) -> int:
            return COUNT

        def at(self, position: int) -> tuple[int, int]:
            return position // COUNT, COUNT - 1 - position % COUNT

    (batch,) = take(stream(samples, order=Backwards()), 1)
    assert batch.sample_ids == [f"sample-{COUNT - 1 - k}" for k in range(8)]


def test_the_order_goes_back_and_forth() -> None:
    order = ShuffledOrder([Part(np.ones(10, dtype=np.int64))], seed=1, window=10)
    first = [order.at(position) for position in range(40)]
    assert [order.at(position) for position in reversed(range(40))] == first[::-1]
    assert [epoch for epoch, _ in first] == [position // 10 for position in range(40)]


def test_evaluation_gives_every_image_in_order(samples: list[Sample]) -> None:
    batches = list(evaluation_batches(samples, DATA, 10))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert ids(batches) == [sample.id for sample in samples]
    assert torch.cat([batch.image_ids for batch in batches]).tolist() == list(range(COUNT))


def test_evaluation_leaves_unreadable_images_out_and_names_them(samples: list[Sample]) -> None:
    lost = Sample("lost", Path("nowhere.png"), ("a dog",))
    first, second, third = evaluation_batches([samples[0], lost, lost, lost, samples[1]], DATA, 2)
    assert (first.image_ids.tolist(), first.skipped) == ([0], ["nowhere.png: no such file"])
    assert (len(second), second.images.shape, len(second.skipped)) == (0, (0, 3, 16, 16), 2)
    assert third.image_ids.tolist() == [4]


def test_workers_outlive_warnings_but_not_the_training(tmp_path: Path) -> None:
    code = """
import itertools, sys, time
from pathlib import Path
import torch
from tests.data.corpus import assert_equal, ids, take, make_samples
from tests.data.test_stream import stream
if __name__ == "__main__":
    source = stream(make_samples(Path(sys.argv[1]), 3), workers=1)
    batches = iter(source)
    next(batches)
    print(*(child.pid for child in torch.multiprocessing.active_children()), flush=True)
    for line in sys.stdin:
        print(len(list(itertools.islice(batches, 9))), flush=True)
"""
    script = tmp_path / "train.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], **pipes) as training:
        assert training.stdin is not None
        assert training.stdout is not None
        worker = int(training.stdout.readline())
        server = int(Path(f"/proc/{worker}/stat").read_text().split()[3])
        for process in (worker, server):
            os.kill(process, signal.SIGUSR1)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        training.stdin.write("go on\n")
        training.stdin.flush()
        assert training.stdout.readline() == "9\n"
        training.kill()
    deadline = time.monotonic() + 30
    while _running(worker) or _running(server):
        assert time.monotonic() < deadline, "a loader process outlives the training"
        time.sleep(0.05)


def _running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
