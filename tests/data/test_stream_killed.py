"""The stream alone, in real processes: killed in the middle of an epoch on one rank, gone on with on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_stream_shards import COUNT, make, shard

BATCH = 8
STEPS = 2 * COUNT // BATCH + 1  # two epochs and a bit


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    return shard(make(folder / "jsonl"), folder / "shards")


def start(shards: Path, rank: int, world: int, first: int, steps: int, workers: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.stream_main", str(shards)]
    command += map(str, (BATCH, rank, world, first, steps, workers))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def rows(process: subprocess.Popen[str], kill_after: int | None = None) -> list[dict[str, Any]]:
    """What the process printed; SIGKILL after so many lines."""
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(json.loads(line))
        if len(found) == kill_after:
            process.kill()
            break
    process.stdout.close()
    assert process.wait(60) == (0 if kill_after is None else -9)
    return found


def test_killed_on_one_rank_and_gone_on_with_on_two(shards: Path) -> None:
    straight = rows(start(shards, 0, 1, 0, STEPS))
    assert [row["step"] for row in straight] == list(range(STEPS))
    expected = [identity for row in straight for identity in row["ids"]]
    assert [len(set(expected[at : at + COUNT])) for at in (0, COUNT)] == [COUNT, COUNT]

    killed = rows(start(shards, 0, 1, 0, STEPS), kill_after=11)
    done = killed[-1]["step"] + 1
    pair = [start(shards, rank, 2, done, STEPS - done) for rank in (0, 1)]
    halves = [rows(process) for process in pair]
    seen = [identity for row in killed for identity in row["ids"]]
    for left, right in zip(*halves, strict=True):
        assert left["step"] == right["step"]
        assert len(left["ids"]) == len(right["ids"]) == BATCH // 2
        seen += left["ids"] + right["ids"]
    assert seen == expected
    assert set(Counter(seen[:COUNT]).values()) == {1}
