"""Ratios that a noisy machine leaves standing: one process, one thread, interleaved, medians of CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on a single thread, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of every piece of work, taken in turn after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    with one_thread():
        for turn in range(repeats + 1):
            for name, call in work.items():
                start = time.process_time()
                call()
                if turn:
                    taken[name].append(1e3 * (time.process_time() - start))
    return taken


def ratio(taken: Mapping[str, list[float]], peer: str, ours: str) -> float:
    """Median over the turns of the peer's time over ours; prints both with their spread (`pytest -s`)."""
    for name in (peer, ours):
        low, middle, high = min(taken[name]), statistics.median(taken[name]), max(taken[name])
        print(f"\n{name}: {middle:.1f} ms ({low:.1f} to {high:.1f})", end="")
    value = statistics.median(a / b for a, b in zip(taken[peer], taken[ours], strict=True))
    print(f"\n{peer} / {ours} = {value:.2f}", end="")
    return value
