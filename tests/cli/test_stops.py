"""SIGUSR1 and SIGTERM at the command line, as whoever started it sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.test_launch import eventually
from tests.e2e.small import SMALL, kill, logged_steps, render_small, settings

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `vlscale pretrain` for many steps, with output in files `stdout` and `stderr`."""
    data = render_small(tmp_path / "scenes")
    small = {**SMALL["albef_tiny"], "data.workers": "1", "train.max_steps": "100000", "checkpoint.every": "100000"}
    words = ["pretrain", "albef_tiny", "--data", str(data), "--out", str(tmp_path / "run"), *settings(small)]
    words += ["--ds-config", "zero2_cpu", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    started: list[subprocess.Popen[str]] = []

    def begin(*more: str) -> subprocess.Popen[str]:
        with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as error:
            command = [sys.executable, "-m", "vlscale.cli", *words, *more]
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=error, text=True))
        return started[-1]

    yield begin
    kill(started)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_while_training_it_saves(start: Start, tmp_path: Path, number: signal.Signals, code: int, ranks: str) -> None:
    process, run = start("--nproc", ranks), tmp_path / "run"
    assert eventually(lambda: logged_steps(run) > 2, 240), (tmp_path / "stderr").read_text()
    process.send_signal(number)
    assert process.wait(60) == code
    step, told = logged_steps(run), (tmp_path / "stdout").read_text().splitlines()[-1]
    assert told == f"{run}: ended by {number.name}, saved at step {step}; go on with --resume auto"
    assert (run / "checkpoints" / f"step-{step:08d}" / "COMPLETE").is_file()
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert "ending the others" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_while_importing_there_is_nothing_to_save(start: Start, tmp_path: Path, ranks: str) -> None:
    process = start("--nproc", ranks)

    def importing() -> bool:
        ids = [process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]
        return sum("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in ids) == int(ranks)

    assert eventually(importing, 60)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 85
    told = "vlscale: ended by SIGUSR1 with nothing to save: go on with --resume auto\n"
    assert (tmp_path / "stderr").read_text() == told
    assert not (tmp_path / "run").exists()
