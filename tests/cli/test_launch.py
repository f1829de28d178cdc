"""Finding the rank that a launcher gave, sharing the machine out, and starting ranks where no launcher did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlscale.cli import launch
from vlscale.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what a test's code sets is undone too
        monkeypatch.delenv(name)


def test_nothing_launched_this_process() -> None:
    assert not launch.joined()
    assert launch.rank() == 0
    assert launch.world_size(3) == 3


def test_a_launcher_is_joined_and_may_not_be_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.joined()
    assert launch.rank() == 1
    assert launch.world_size(None) == launch.world_size(4) == 4
    with pytest.raises(UserError, match="already started 4 ranks"):
        launch.world_size(2)


def test_a_task_of_srun_is_a_rank_but_the_batch_script_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not launch.joined()
    launch.settle(1)
    assert os.environ["WORLD_SIZE"] == "1"
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert launch.joined()
    assert launch.rank() == 5
    assert launch.world_size(None) == 8
    assert launch.local_world_size(8) == 4


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1), ("0,1,2", 3), ("1,-1,2", 1), ("-1", 0)])
def test_gpus_that_cuda_would_see(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.count_gpus() == count


def test_one_rank_per_gpu_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch.world_size(None) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.world_size(None) == 1


def test_threads_are_what_was_asked_for_else_the_cores_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_cores", lambda: 8)
    assert launch.set_threads(None, 2) == 4
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert launch.set_threads(3, 2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert launch.set_threads(None, 1) == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert launch.set_threads(None, 1) == 5
    for wrong in (lambda: launch.set_threads(0, 1), lambda: launch.world_size(0)):
        with pytest.raises(UserError):
            wrong()


RANK_PROGRAM = """
import os, sys, time
rank, world = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
meeting = f"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"
open(f"{sys.argv[2]}/{rank}", "w").write(f"{world} {meeting} {os.getpid()}")
if sys.argv[1] == "one-fails":
    sys.exit(7) if rank == 1 else time.sleep(60)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


@pytest.fixture
def ranks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let `start_ranks` start RANK_PROGRAM in place of the command line; the folder where ranks leave a note."""
    program = tmp_path / "python"
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    program.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{tmp_path}/program.py" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    notes = tmp_path / "notes"
    notes.mkdir()
    return notes


def test_ranks_are_started_with_one_meeting_point(ranks_run: Path) -> None:
    assert launch.start_ranks(["fine", str(ranks_run)], 3) == 0
    notes = {path.name: path.read_text() for path in ranks_run.iterdir()}
    assert sorted(notes) == ["0", "1", "2"]
    assert len({note.rsplit(" ", 1)[0] for note in notes.values()}) == 1
    assert notes["0"].startswith("3 127.0.0.1 ")


def test_a_failing_rank_ends_the_others_and_is_named(ranks_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert launch.start_ranks(["one-fails", str(ranks_run)], 2) == 7
    assert time.monotonic() - start < 30
    assert capfd.readouterr().err == "vlscale: rank 1 of 2 failed with exit code 7; ending the others\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(ranks_run: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from vlscale.cli import launch; sys.executable = sys.argv[1]; "
        "sys.exit(launch.start_ranks(['wait', sys.argv[2]], 2))"
    )
    python = Path(sys.prefix) / "bin" / "python"
    launcher = subprocess.Popen([python, "-c", code, str(tmp_path / "python"), str(ranks_run)])
    assert eventually(lambda: len([note for note in ranks_run.iterdir() if note.stat().st_size]) == 2)
    pids = [int(note.read_text().split()[-1]) for note in ranks_run.iterdir()]
    launcher.send_signal(number)
    assert launcher.wait(20) != 0
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("task", ["grounding", "objectives"])
def test_what_runs_on_one_rank_refuses_company(task: str) -> None:
    command = [sys.executable, "-m", "vlscale.cli", "eval", task, "--from", "runs/none"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"vlscale: error: eval {task}: runs on one rank, the launcher started 2: start it once\n"
