"""SIGKILL at the command line, and again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_launch import eventually
from tests.e2e.small import SMALL, kill, logged_steps, render_small, settings
from tests.engine.conftest import rows
from vlscale.distributed import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_small(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture
def start(scenes: Path, tmp_path: Path) -> Iterator[Start]:
    """Start `vlscale pretrain` at two ranks; stderr goes to files by the given name."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: value for name, value in os.environ.items() if name not in launched}
    small = {**SMALL["albef_tiny"], "train.max_steps": "60", "checkpoint.every": "5"}
    words = ["pretrain", "albef_tiny", "--data", str(scenes), "--ds-config", "zero2_cpu", "--threads", "1"]
    started: list[subprocess.Popen[str]] = []

    def begin(name: str, *more: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vlscale.cli", *words, *settings(small), *more]
        with (tmp_path / name).open("w") as error:
            environment = {**plain, **environment}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error, text=True)
        started.append(process)
        return process

    yield begin
    kill(started)


def rank_1(launcher: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


def test_a_killed_rank_ends_the_run_and_the_run_goes_on(start: Start, tmp_path: Path) -> None:
    straight = start("straight", "--nproc", "2", "--out", str(tmp_path / "undisturbed"))
    assert straight.wait(600) == 0, (tmp_path / "straight").read_text()
    run = ("--nproc", "2", "--out", str(tmp_path / "run"))
    launcher = start("killed", *run)
    assert eventually(lambda: logged_steps(tmp_path / "run") > 7, 300), (tmp_path / "killed").read_text()
    os.kill(rank_1(launcher.pid), signal.SIGKILL)
    assert launcher.wait(30) == 128 + signal.SIGKILL
    told = "vlscale: rank 1 of 2 was ended by SIGKILL (did memory run out?); ending the others\n"
    assert (tmp_path / "killed").read_text() == told

    # The same ranks, started by something that leaves the others alone: plain variables, as srun sets its own.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    again = ("--out", str(tmp_path / "run"), "--resume", "auto")
    first, second = (start(f"rank-{rank}", *again, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1))
    before = logged_steps(tmp_path / "run")
    assert eventually(lambda: logged_steps(tmp_path / "run") > before + 3, 300), (tmp_path / "rank-0").read_text()
    second.kill()
    assert first.wait(60) == 1
    (line,) = (tmp_path / "rank-0").read_text().splitlines()
    assert line.startswith("vlscale: error: rank 0: another rank is gone (Connection ")
    assert line.endswith("), its own output says why; go on with --resume auto")

    last = start("last", *run, "--resume", "auto")
    assert last.wait(600) == 0, (tmp_path / "last").read_text()
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")


def test_twenty_kills_at_random_moments_change_no_loss(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.kills_main", "--kills", "20", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "20 kills, 60 steps: the same to the bit"
    kills: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == 20
    assert {len(kill["ranks"]) for kill in kills} == {1, 2}
