"""What happens to a run from outside, and what it does then.

Damaged checkpoints and kills in a single rank's save: test_checkpoint.py. Signals: test_signals.py. Broken data:
tests/data/test_stream*.py.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_stream_shards import make, shard, stream, take
from tests.engine.conftest import rows
from tests.engine.ranks import ROOT
from tests.engine.test_checkpoint import same_tensors
from tests.engine.test_real_systems import small_recipe
from tests.engine.toy import toy_recipe, write_data
from vlscale import distributed
from vlscale.config import Data, Recipe, write_recipe
from vlscale.data.open import read_data
from vlscale.data.shards import open_shards
from vlscale.engine import build, checkpoint, faults, loop, watchdog
from vlscale.engine.watchdog import Watchdog
from vlscale.errors import RunBroken, UserError
from vlscale.interop import layout

Pretrain = Callable[..., loop.RunResult]
Ended = list[tuple[int | None, str]]
"""Exit code and output of every rank; None where it had to be killed."""
GONE = "another rank is gone (Connection "
RUN = {
    "kill": (7, 1),
    "bug": (7, 1),
    "hang": (7, 1),
    "loader": (7, 1),
    "slow save": (10, 0),
    "no space": (10, 1),
    "in a shard": (10, 1),
    "after deepspeed": (10, 0),
    "at the marker": (10, 0),
    "at latest": (10, 0),
    "in pruning": (20, 0),
}
"""Fault: step and rank."""
CHANGES: dict[str, Any] = {
    "loader": {"changes": {"data__workers": 1}},
    "hang": {"environment": {"VLSCALE_HANG_SECONDS": "2"}},
    "slow save": {"environment": {"VLSCALE_HANG_SECONDS": "2"}},
}


def live(folder: Path, lives: list[dict[str, Any]]) -> list[Ended]:
    report = folder / "report.json"
    command = [sys.executable, "-m", "tests.engine.faults_main", json.dumps({"report": str(report), "lives": lives})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1800)
    return [[tuple(rank) for rank in ended] for ended in json.loads(report.read_text())]  # type: ignore[misc]


def errors(ended: Ended) -> list[list[str]]:
    """What each rank said besides its progress."""
    return [[line for line in text.splitlines() if line.startswith("vlscale: ")] for _, text in ended]


class Toys:
    """Toy runs at two ranks, each with a fault, and gone on with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = str(write_data(folder / "data"))
        lives: list[dict[str, Any]] = [{"out": str(folder / "undisturbed"), "data": data}]
        for kind, (step, rank) in RUN.items():
            life = {"out": str(folder / kind), "data": data, **CHANGES.get(kind, {})}
            lives += [{**life, "fault": {"kind": kind, "step": step, "rank": rank}}, {**life, "resume": "auto"}]
        first, *pairs = live(folder, lives)
        assert [code for code, _ in first] == [0, 0], first
        self.first = dict(zip(RUN, pairs[::2], strict=True))
        self.again = dict(zip(RUN, pairs[1::2], strict=True))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUN)
def test_the_run_goes_on_as_if_nothing_had_been(toys: Toys, kind: str) -> None:
    assert [code for code, _ in toys.again[kind]] == [0, 0], toys.again[kind]
    assert rows(toys.folder / kind) == rows(toys.folder / "undisturbed")
    assert len(layout.complete_checkpoints(toys.folder / kind)) == 3
    last = "checkpoints/step-00000020"
    for name in (layout.MODEL, layout.CARRIED):
        assert same_tensors(*(toys.folder / run / last / name for run in (kind, "undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "in a shard", "after deepspeed", "at the marker", "at latest", "in pruning"])
def test_a_killed_rank_ends_the_other_in_one_line(toys: Toys, kind: str) -> None:
    """Nobody but the network tells the survivor."""
    killed = RUN[kind][1]
    survivor = 1 - killed
    assert [code for code, _ in toys.first[kind]] == ([-9, 1] if killed == 0 else [1, -9])
    (line,) = errors(toys.first[kind])[survivor]
    assert line.startswith(f"vlscale: error: rank {survivor}: {GONE}")
    assert line.endswith("its own output says why; go on with --resume auto")
    assert "Traceback" not in toys.first[kind][survivor][1]


@pytest.mark.slow
def test_a_bug_on_one_rank_keeps_its_traceback_there_alone(toys: Toys) -> None:
    (code, first), (other, second) = toys.first["bug"]
    assert (code, other) == (1, 1)
    assert GONE in first
    assert "Traceback" not in first
    assert "ValueError: a bug on one rank" in second


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_and_each_says_where_it_stands(toys: Toys) -> None:
    assert [code for code, _ in toys.first["hang"]] == [watchdog.HUNG] * 2
    for rank, ((line,), place) in enumerate(zip(errors(toys.first["hang"]), ("all_gather", "<lambda>"), strict=True)):
        stacks = toys.folder / "hang" / f"hang-rank-{rank}.txt"
        assert f"rank {rank}: no progress for 2 s (VLSCALE_HANG_SECONDS), it stands in " in line
        assert f" {place}; stacks of all threads: {stacks}; go on with --resume auto" in line
        text = stacks.read_text()
        assert "loop.py" in text
        assert text.count("hread 0x") > 1
    assert "faults_main.py" in errors(toys.first["hang"])[1][0]


@pytest.mark.slow
def test_a_slow_save_is_no_hang(toys: Toys) -> None:
    assert [code for code, _ in toys.first["slow save"]] == [0, 0], toys.first["slow save"]


@pytest.mark.slow
def test_a_killed_loader_process_is_named(toys: Toys) -> None:
    """As Linux does when memory runs out."""
    assert [code for code, _ in toys.first["loader"]] == [1, 1]
    (first,), (second,) = errors(toys.first["loader"])
    assert GONE in first
    assert "rank 1: a process of the data loader was killed, most often because memory ran out" in second


@pytest.mark.slow
def test_a_rank_that_can_t_write_ends_all_and_the_half_checkpoint_goes(toys: Toys) -> None:
    ended = toys.first["no space"]
    assert [code for code, _ in ended] == [2, 2], ended
    (line,) = errors(ended)[0]
    assert "step-00000010: rank 1 can't write zero_pp_rank_1_mp_rank_00_optim_states.pt: [enforce fail" in line
    assert "the last good checkpoint is step-00000005" in line
    assert "going on from" in toys.again["no space"][0][1]


# --- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB that may be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk(disk: Path, tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "data"))
    life = {"out": str(disk / "run"), "data": data}
    filled = {"fault": {"kind": "full in a save", "step": 10, "rank": 0}}
    seldom = {**life, "out": str(disk / "seldom"), "changes": {"checkpoint__every": 1000}}
    first, full, again, unsaved, straight = live(
        tmp_path,
        [
            {**life, **filled},
            {**life, "resume": "auto"},
            {**life, "resume": "auto", "remove": str(disk / "filler")},
            {**seldom, "fault": {"kind": "full", "step": 1, "rank": 0}},
            {**life, "out": str(tmp_path / "straight")},
        ],
    )
    assert [code for code, _ in first] == [2, 2], first
    (line,) = errors(first)[0]
    assert f"{disk}/run/checkpoints/step-00000010: rank 0 can't write " in line
    assert "; a checkpoint takes " in line
    assert " KiB are free; the last good checkpoint is step-00000005; make room (checkpoint.keep " in line
    assert line.endswith("then go on with --resume auto")

    # Still full: no room even for what a start writes.
    assert full[0][0] == 2, full
    (line,) = errors(full)[0]
    assert "No space left on device" in line
    assert "the last good checkpoint is step-00000005" in line

    assert [code for code, _ in again] == [0, 0], again
    assert "going on from" in again[0][1]
    assert [code for code, _ in straight] == [0, 0]
    assert rows(disk / "run") == rows(tmp_path / "straight")

    # Between two saves the metrics are the first that find no room.
    assert unsaved[0][0] == 2, unsaved
    (line,) = errors(unsaved)[0]
    assert "seldom: No space left on device; 0 KiB are free; there is no checkpoint yet" in line
    assert not any("Traceback" in text for ended in (first, full, unsaved) for _, text in ended)


def test_the_size_of_a_checkpoint_is_known_before(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    known: list[int] = []
    finish = faults.Writes.finish

    def note(self: faults.Writes, needed: int) -> None:
        known.append(needed)
        finish(self, needed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults.Writes, "finish", note)
        pretrain(recipe, tmp_path / "run", stop_after=1)
    files = (tmp_path / "run/checkpoints/step-00000001").iterdir()
    written = sum(path.stat().st_size for path in files if path.suffix in (".pt", ".safetensors"))
    # What grows with the system; the toy is so small that headers and pickles count.
    assert 0.3 * written < known[0] < written


# --- steps that are not finite


CARRIED = {
    "albef": ("carried/image_queue.", "carried/text_queue.", "carried/teacher."),
    "codis": ("carried/image_queue.", "carried/teacher.", "carried/codebook.", "module/codebook."),
    "cb_vila": ("carried/codebook.", "module/codebook.codes"),
    "soho": ("carried/dictionary.", "module/neck.dictionary.codes", "module/backbone.net.layer2.0.bn1.running_mean"),
}
"""What must have moved in the steps that were applied."""
FP16 = ("cb_vila", "codis", "albef")
"""The CPU has no BatchNorm of fp16."""


class Systems:
    """Real systems at two ranks: what each step changed."""

    NAN, STEPS = 8, 12

    def __init__(self, folder: Path) -> None:
        self.folder, lives = folder, []
        for name in CARRIED:
            recipe = small_recipe(folder / name, name)
            train = recipe.train.model_copy(update={"max_bad_steps": 30})
            write_recipe(recipe.model_copy(update={"train": train}), folder / name / "recipe.yaml")
            life = {"recipe": str(folder / name / "recipe.yaml"), "watch": True}
            nan = {"kind": "nan", "step": self.NAN, "rank": 1}
            lives += [{**life, "out": str(folder / name / "nan"), "fault": nan}]
            if name in FP16:
                lives += [{**life, "out": str(folder / name / "fp16"), "fp16": True}]
        self.ended = dict(zip([Path(life["out"]) for life in lives], live(folder, lives), strict=True))

    def steps(self, name: str, run: str) -> list[dict[str, Any]]:
        """The same on both ranks."""
        logs = [(self.folder / name / f"{run}.watched-{rank}").read_text() for rank in (0, 1)]
        assert logs[0] == logs[1]
        return [json.loads(line) for line in logs[0].splitlines()]


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Systems:
    return Systems(tmp_path_factory.mktemp("systems"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [*((name, "nan") for name in CARRIED), *((name, "fp16") for name in FP16)])
def test_a_skipped_step_moves_nothing(systems: Systems, name: str, run: str) -> None:
    """NaN on one rank alone; overflows of native fp16: no weight, moment, teacher, queue or code, on no rank."""
    ended = systems.ended[systems.folder / name / run]
    assert [code for code, _ in ended] == [0, 0], ended
    steps = systems.steps(name, run)
    skipped = [step["step"] for step in steps if not step["applied"]]
    assert len(steps) == Systems.STEPS
    assert skipped == [Systems.NAN] if run == "nan" else 0 < len(skipped) < Systems.STEPS
    assert rows(systems.folder / name / run)[-1]["skipped_steps"] == len(skipped)
    for step in steps:
        if step["applied"]:
            assert any(changed.startswith("master/") for changed in step["changed"])
        else:
            assert step["changed"] == [], step
    moved = {changed for step in steps for changed in step["changed"]}
    for prefix in CARRIED[name]:
        assert any(changed.startswith(prefix) for changed in moved), (prefix, sorted(moved))


def pretend_fp16(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> str:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(build.Machine, "here", staticmethod(lambda: build.Machine(cuda=True, bf16=False)))
    config = folder / "fp16.json"
    config.write_text(json.dumps({"fp16": {"enabled": True, "hysteresis": 1, **settings}}))
    return str(config)


def test_a_loss_scale_at_its_floor_is_an_alarm_and_no_end(
    pretrain: Pretrain, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed itself would raise at the first overflow there."""
    config = pretend_fp16(monkeypatch, tmp_path, initial_scale_power=2, min_loss_scale=2)
    recipe = toy_recipe(data, train__max_bad_steps=4, train__max_steps=12)
    bad = dict.fromkeys((3, 4, 5), float("nan"))
    result = pretrain(recipe, tmp_path / "run", {"poison": bad}, ds_config=config)
    assert result.finished
    assert result.metrics["skipped_steps"] == 3
    assert [row["loss_scale"] for row in rows(tmp_path / "run")][2:6] == [4.0, 2.0, 2.0, 2.0]
    alarm = "in a row; the loss scale is at its floor 2: lower train.lr, or use bfloat16"
    assert capsys.readouterr().out.count(alarm) == 3
    with pytest.raises(UserError, match="4 steps in a row were not finite"):
        pretrain(recipe, tmp_path / "worse", {"poison": dict.fromkeys(range(3, 9), float("nan"))}, ds_config=config)


# --- files


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


# --- who is told what


def test_only_what_says_that_the_other_side_is_gone_means_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [::1]:3: Connection reset by peer. GLHF")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.lost_rank(gloo) is None, "alone there is nobody to lose"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.lost_rank(gloo) == "Connection reset by peer"
    assert distributed.lost_rank(RuntimeError("[gloo] op.preamble.length <= op.nbytes. 64 vs 32")) is None
    network = torch.distributed.DistNetworkError("failed to recv, got 0 bytes")
    assert distributed.lost_rank(network) == "the network failed"


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), FileNotFoundError(2, "no such file"), UserError("mine")):
        with pytest.raises(type(error)) as caught, faults.told(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(("text", "seconds"), [("", 1800.0), ("0", 0.0), ("2.5", 2.5)])
def test_how_long_a_rank_may_stand_still(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("VLSCALE_HANG_SECONDS", text)
    assert distributed.hang_seconds() == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_no_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("VLSCALE_HANG_SECONDS", text)
    with pytest.raises(UserError, match=rf"VLSCALE_HANG_SECONDS={text}: expected a number of seconds, or 0"):
        distributed.hang_seconds()


def test_the_watchdog_sleeps_in_a_validation_and_wakes_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLSCALE_HANG_SECONDS", "0.2")
    barked: list[float] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, run: barked.append(time.monotonic()))
    dog = Watchdog()
    with dog.watching(tmp_path):
        for _ in range(8):
            time.sleep(0.1)
            dog.beat()
        with dog.resting():
            time.sleep(0.8)
        assert not barked
        deadline = time.monotonic() + 30
        while not barked and time.monotonic() < deadline:
            time.sleep(0.05)
    assert barked
    number = len(barked)
    time.sleep(0.5)
    assert len(barked) == number, "nobody watches any more"


def test_a_failed_write_is_told_with_what_there_is_room_for(tmp_path: Path, joined: None) -> None:
    folder = tmp_path / "checkpoints/step-00000010"
    folder.mkdir(parents=True)
    writes = faults.Writes(folder)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    writes.attempt("model.safetensors", fail)
    with pytest.raises(UserError) as caught:
        writes.finish(1 << 60)
    message = str(caught.value)
    assert "rank 0 can't write model.safetensors: [Errno 28] No space left on device; a checkpoint takes " in message
    assert "there is no checkpoint yet; make room" in message
    assert not folder.exists()
    with pytest.raises(ValueError, match="a bug"):
        writes.attempt("x", lambda: int("a bug"))
    assert checkpoint.newest_sound(tmp_path) is None
