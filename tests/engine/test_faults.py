"""What happens to a run from outside, and what it does then.

Steps that are not finite: test_skipped_steps.py; files that go: test_vanished_files.py. Damaged checkpoints and kills
in a single rank's save: test_checkpoint.py. Signals: test_signals.py. Broken data: tests/data/test_stream*.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import rows
from tests.engine.ranks import ROOT
from tests.engine.test_checkpoint import same_tensors
from tests.engine.toy import write_data
from vlscale import distributed
from vlscale.config import Recipe
from vlscale.engine import checkpoint, faults, loop, watchdog
from vlscale.engine.watchdog import Watchdog
from vlscale.errors import UserError
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
