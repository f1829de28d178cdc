"""The order: every sample as often as its weight says, a function of (seed, epoch), near each other in storage."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from vlscale.data.order import Part, ShuffledOrder


def ones(size: int) -> np.ndarray:
    return np.ones(size, dtype=np.int64)


def blocks(*sizes: int) -> np.ndarray:
    return np.array(sizes, dtype=np.int64)


def epoch_of(order: ShuffledOrder, epoch: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(epoch * len(order), (epoch + 1) * len(order))]


RAGGED = blocks(7, 1, 0, 23, 5, 5, 12, 9, 3, 31, 4, 18, 2, 2, 40)
SIZE = int(RAGGED.sum())


@pytest.mark.parametrize("window", [1, 5, 16, 50, SIZE - 1, SIZE, 10 * SIZE])
def test_every_epoch_has_every_sample_once(window: int) -> None:
    order = ShuffledOrder([Part(RAGGED)], seed=3, window=window)
    assert len(order) == SIZE
    epochs = [epoch_of(order, epoch) for epoch in range(4)]
    for epoch, seen in enumerate(epochs):
        assert sorted(index for _, index in seen) == list(range(SIZE))
        assert {walk for walk, _ in seen} == {epoch}
    assert len({tuple(index for _, index in seen) for seen in epochs}) == 4


def test_a_position_needs_no_history() -> None:
    parts = [Part(RAGGED, 0.7), Part(ones(50), 2.5)]
    straight = ShuffledOrder(parts, seed=1, window=20)
    expected = [straight.at(position) for position in range(3 * len(straight))]
    jumping = ShuffledOrder(parts, seed=1, window=20)
    for position in np.random.default_rng(0).permutation(len(expected)):
        assert jumping.at(int(position)) == expected[position]
    assert ShuffledOrder(parts, seed=1, window=20).at(2 * len(straight) + 5) == expected[2 * len(straight) + 5]


def test_what_fits_into_one_window_is_shuffled_as_a_whole_however_it_is_stored() -> None:
    stored = ShuffledOrder([Part(RAGGED)], seed=7, window=SIZE)
    loose = ShuffledOrder([Part(ones(SIZE))], seed=7, window=1000)
    assert epoch_of(stored, 2) == epoch_of(loose, 2)
    # As runs before there were windows: a permutation of all samples drawn from (seed, epoch).
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2]))).permutation(SIZE)
    assert [index for _, index in epoch_of(loose, 2)] == drawn.tolist()


def test_reading_stays_in_a_few_blocks() -> None:
    sizes = blocks(*[100] * 200)
    order = ShuffledOrder([Part(sizes)], seed=0, window=1000)
    found = [index // 100 for _, index in epoch_of(order, 0)]
    for start in range(0, len(found), 1000):
        assert len(set(found[start : start + 1000])) == 10
    # … while the blocks themselves come in no order, and their samples are mixed.
    assert Counter(np.diff(found[:1000]) == 0)[True] < 200
    neighbours = [set(found[start : start + 1000]) for start in range(0, len(found), 1000)]
    assert np.mean([max(group) - min(group) for group in neighbours]) > 100


@pytest.mark.parametrize("window", [10, 10_000])
def test_weights(window: int) -> None:
    half, whole, double, odd = blocks(4, 6, 10), ones(10), blocks(3, 5), blocks(7)
    order = ShuffledOrder([Part(half, 0.5), Part(whole), Part(double, 2), Part(odd, 1.5)], seed=5, window=window)
    assert len(order) == 10 + 10 + 16 + 10  # 10.5 rounds to even
    epochs = [epoch_of(order, epoch) for epoch in range(14)]
    seen = [Counter(index for _, index in epoch) for epoch in epochs]
    # Half of the first part each time, all of it every other time.
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert sum(first[index] for index in range(20)) == 10
        assert all(first[index] + second[index] == 1 for index in range(20))
    for counts in seen:
        assert all(counts[index] == 1 for index in range(20, 30))
        assert all(counts[index] == 2 for index in range(30, 38))
    total = sum(seen, Counter())
    assert {total[index] for index in range(38, 45)} == {20}
    # Nothing comes twice in the same pass: captions and crops are drawn from it.
    assert max(Counter(itertools.chain(*epochs)).values()) == 1


def test_seeds() -> None:
    orders = {
        tuple(ShuffledOrder([Part(RAGGED)], seed, 20).at(position) for position in range(30))
        for seed in (0, 1, -1, 2**70)
    }
    assert len(orders) == 4


def test_empty_parts_are_nothing() -> None:
    order = ShuffledOrder([Part(blocks()), Part(blocks(0)), Part(blocks(3))], seed=0, window=2)
    assert sorted(index for _, index in epoch_of(order, 0)) == [0, 1, 2]
