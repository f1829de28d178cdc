"""One of N ranks: gathering rows and lists of which every rank has another number, or none."""

from __future__ import annotations

import json
import sys

import torch

from vlscale import distributed


def check(counts: list[int]) -> None:
    rank = distributed.rank()
    expected = [10.0 * r + i for r, count in enumerate(counts) for i in range(count)]
    own = 10.0 * rank + torch.arange(counts[rank])
    rows = distributed.gather_rows(own[:, None].expand(-1, 2).requires_grad_())
    assert rows.shape == (len(expected), 2)
    assert rows[:, 1].tolist() == expected
    assert not rows.requires_grad
    assert distributed.gather_rows(own.long()).tolist() == expected
    assert distributed.gather_list([f"{value}" for value in own.tolist()]) == [f"{value}" for value in expected]


if __name__ == "__main__":
    distributed.init_from_environment()
    for counts in json.loads(sys.argv[1]):
        check(counts)
    distributed.shutdown()
