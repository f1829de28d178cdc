"""Files that vanish while a run reads them, processes of the loader that are killed, and clocks that are wrong."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_stream_shards import make, shard, stream, take
from tests.engine.conftest import rows
from tests.engine.test_faults import Pretrain
from vlscale.config import Data, Recipe
from vlscale.data.open import read_data
from vlscale.data.shards import open_shards
from vlscale.engine import loop
from vlscale.errors import RunBroken, UserError
from vlscale.interop import layout


def test_an_image_that_vanishes_gives_way_to_the_next_one(
    pretrain: Pretrain, recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = loop.train_step

    def lose(run: loop.Run, batches: Any) -> Any:
        if run.state.step == 6:
            (data.parent / "007.png").unlink()
        return train(run, batches)

    monkeypatch.setattr(loop, "train_step", lose)
    assert pretrain(recipe, tmp_path / "run").finished
    counts = [row["skipped_images"] for row in rows(tmp_path / "run")]
    named = (tmp_path / "run" / layout.SKIPPED_IMAGES).read_text().splitlines()
    assert counts[5] == 0
    assert counts[-1] == len(named) >= 3
    assert all("007.png: no such file" in line for line in named)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_vanish(tmp_path: Path, workers: int) -> None:
    """What a process has opened it goes on reading, and that takes the place of the rest."""
    shards = shard(make(tmp_path / "jsonl"), tmp_path / "shards")
    source = stream(open_shards(shards), window=1, workers=workers)
    batches = iter(source)
    next(batches)
    for tar in shards.glob("*.tar"):
        tar.unlink()
    found = [next(batches) for _ in range(25)]
    source.close()
    assert all(len(batch) == 8 for batch in found)
    skipped = [line for batch in found for line in batch.skipped]
    assert skipped
    assert all(line.startswith(f"{shards}/") and "No such file" in line for line in skipped)


def test_all_shards_vanish_before_a_worker_reads_one(tmp_path: Path) -> None:
    shards = shard(make(tmp_path / "jsonl"), tmp_path / "shards")
    corpus = open_shards(shards)
    for tar in shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UserError, match=r"none of 150 samples in a row can be read, the last one is .*No such file"):
        take(stream(corpus, workers=1), 1)


def test_a_killed_worker_is_told_and_a_bug_in_one_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = read_data(Data(path=str(make(tmp_path / "jsonl", 20))))
    source = stream(corpus, workers=1)
    batches = iter(source)
    next(batches)
    for worker in torch.multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(RunBroken, match=r"a process of the data loader was killed.*lower data\.workers"):
        list(itertools.islice(batches, 50))
    wrong = stream(corpus, workers=1)
    monkeypatch.setattr(wrong._dataset, "_seed", "no seed")
    with pytest.raises(Exception, match="Traceback") as caught:
        take(wrong, 1)
    assert not isinstance(caught.value, RunBroken)


def test_which_checkpoint_is_newest_is_no_matter_of_clocks(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pretrain(recipe, out, stop_after=15)
    for step, days in ((5, 400), (10, -400), (15, -800)):  # of the future, and in the wrong order
        folder = out / "checkpoints" / layout.checkpoint_name(step)
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (time.time() + days * 86400,) * 2)
    (out / layout.METRICS_JSONL).touch()
    os.utime(out / layout.METRICS_JSONL, (0, 0))
    assert pretrain(recipe, out, resume="auto").finished
    assert "step-00000015, after step 15" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == list(range(1, 21))
    assert [path.name[-2:] for path in layout.complete_checkpoints(out)] == ["10", "15", "20"]
