"""`vlscale ablate`: stopped and gone on with at any time, wrong rows before the first run, failures in one line."""

from __future__ import annotations

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

from tests.e2e.conftest import Here
from tests.e2e.small import SMALL, assert_one_line, settings
from vlscale.cli import ablate

ROWS = """
title: Small
metrics: [itc_rsum, rsum]
rows:
  - {name: "No MIM", set: [weights.mim=0]}
  - {name: all}
"""
# Trains and evaluates in no time: a learning rate of 7 takes for ever, 8 is bad input, 9 a crash; results are the seed.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
from vlscale.config import load_recipe, write_recipe
words = sys.argv[1:]
values = dict(zip(words, words[1:]))
if words[0] == "pretrain":
    folder = Path(values["--out"])
    recipe = load_recipe(words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / "recipe.yaml")
    with (folder / "began").open("a") as stream:
        stream.write(f"{time.monotonic()} {os.getpid()}\\n")
    if recipe.train.lr == 7:
        time.sleep(600)
    if recipe.train.lr == 8:
        print("vlscale: error: train.lr: 8 is too much", file=sys.stderr)
        sys.exit(2)
    if recipe.train.lr == 9:
        raise RuntimeError("a bug")
    time.sleep(0.5)
    (folder / "checkpoints" / "step-00000001" / "COMPLETE").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "images_per_s": 1.0}\\n')
    (folder / "ended").write_text(f"{time.monotonic()}")
else:
    folder = Path(values["--from"])
    (folder / "eval").mkdir(exist_ok=True)
    metrics = {"itc_rsum": 1.0, "rsum": float(load_recipe(str(folder / "recipe.yaml")).train.seed)}
    result = {"metrics": metrics, "protocol": {"step": 1}}
    (folder / "eval" / "retrieval.json").write_text(json.dumps(result))
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(ablate, "PROGRAM", (sys.executable, str(program)))
    return program


def write_rows(folder: Path, text: str = ROWS) -> Path:
    path = folder / "rows.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "ablation.json").read_text(encoding="utf-8"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(cache: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command in a process of its own; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str | Path, stand_in: Path | None = None) -> subprocess.Popen[str]:
        code = "import sys; from vlscale.cli import ablate, main; "
        code += f"ablate.PROGRAM = (sys.executable, {str(stand_in)!r}); " if stand_in else ""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLSCALE_CACHE": str(cache)}
        words = [sys.executable, "-c", code + "sys.exit(main.main())", "ablate", *map(str, arguments)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, env=environment, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def gone(folder: Path) -> bool:
    """Whether the stand-in that wrote this folder is dead."""
    number = int((folder / "began").read_text().split()[-1])
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_killed_after_the_first_run_it_goes_on(
    start: Callable[..., subprocess.Popen[str]], rows: Path, tmp_path: Path
) -> None:
    """With real training; all other tests use the stand-in, since each process costs seconds to import torch."""
    out = tmp_path / "out"
    sizes = {**SMALL["cb_vila_tiny"], "data.scenes": "{train: 24, test: 8}", "train.max_steps": "3"}
    command: list[str | Path] = ["cb_vila_tiny", "--rows", rows, "--only", "1", "--out", out, *settings(sizes)]
    first = out / "no-mim" / "seed-0"
    process = start(*command, "--seeds", "1")
    wait_for((first / "finished.json").is_file, process)
    process.kill()
    process.communicate()
    before = (first / "metrics.jsonl").stat().st_mtime_ns

    process = start(*command, "--seeds", "2", "--threads", "1")
    printed, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert "1 of 2 runs to do" in printed
    assert "row 1/2 'No MIM', seed 2/2: " in printed

    row, missing = summary_of(out)["rows"]
    results = [json.loads((out / "no-mim" / f"seed-{n}" / "eval" / "retrieval.json").read_text()) for n in (0, 1)]
    values = [result["metrics"]["rsum"] for result in results]
    assert [run["metrics"] for run in row["runs"]] == [result["metrics"] for result in results]
    assert row["mean"]["rsum"] == pytest.approx(sum(values) / 2)
    assert row["std"]["rsum"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [(run["train_seed"], run["steps"]) for run in row["runs"]] == [(0, 3), (1, 3)]
    assert missing["n"] == 0
    assert "all (0 of 2 seeds)" in printed


def test_two_rows_of_two_seeds_killed_and_gone_on_with(
    start: Callable[..., subprocess.Popen[str]], stand_in: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command: list[str | Path] = ["cb_vila_tiny", "--rows", rows, "--seeds", "2", "--out", out]
    process = start(*command, stand_in=stand_in)
    wait_for((out / "all" / "seed-0" / "began").is_file, process)
    process.kill()
    process.communicate()
    assert [row["n"] for row in summary_of(out)["rows"]] == [1, 0]
    process = start(*command, "--jobs", "2", stand_in=stand_in)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    assert "3 of 4 runs to do" in printed
    begun = {path.parent.parent.name + path.parent.name: path for path in out.rglob("began")}
    assert {name: len(path.read_text().splitlines()) for name, path in begun.items()} == {
        "no-mimseed-0": 1,
        "no-mimseed-1": 1,
        "allseed-0": 2,
        "allseed-1": 1,
    }
    for row in summary_of(out)["rows"]:
        assert (row["mean"]["rsum"], row["std"]["rsum"]) == (0.5, pytest.approx(0.5**0.5))
    assert "| No MIM | 1.0 ± 0.0 | 0.5 ± 0.7 |" in (out / "ablation.md").read_text()


def test_only_runs_a_row_and_shows_all(
    here: Here, stand_in: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["ablate", "cb_vila_tiny", "--rows", rows, "--seeds", "2", "--out", out, "--set", "train.seed=4"]
    assert here(*command, "--only", "2") == 0
    assert not (out / "no-mim").exists()
    assert "No MIM (0 of 2 seeds)" in capfd.readouterr().out
    assert here(*command, "--only", "1") == 0
    assert [row["mean"]["rsum"] for row in summary_of(out)["rows"]] == [4.5, 4.5]
    assert here(*command) == 0
    assert "0 of 4 runs to do" in capfd.readouterr().out
    assert len((out / "all" / "seed-0" / "began").read_text().splitlines()) == 1
    log = (out / "all" / "seed-1" / "log.txt").read_text()
    assert log.startswith("$ vlscale pretrain cb_vila_tiny --out ")
    assert "train.seed=5" in log
    assert here(*command, "--only", "1", "--set", "train.lr=0.5") == 2
    assert_one_line(capfd.readouterr().err, "no-mim/seed-0/recipe.yaml: the run was started with train.lr=0.001")


def test_two_run_at_a_time_with_the_cores_shared_out(
    here: Here, stand_in: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert here("ablate", "cb_vila_tiny", "--rows", rows, "--seeds", "1", "--out", out, "--jobs", "2") == 0
    times = []
    for folder in (out / "no-mim" / "seed-0", out / "all" / "seed-0"):
        times.append((float((folder / "began").read_text().split()[0]), float((folder / "ended").read_text())))
        assert (folder / "log.txt").read_text().count("--threads 3") == 2
    assert max(began for began, _ in times) < min(ended for _, ended in times)


@pytest.mark.parametrize(("rate", "code", "reason"), [(8, 2, "train.lr: 8 is too much"), (9, 1, "exit code 1")])
def test_a_failing_run_is_one_line_and_ends_the_others(
    rate: int,
    code: int,
    reason: str,
    here: Here,
    stand_in: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path, f"rows: [{{name: slow, set: [train.lr=7]}}, {{name: bad, set: [train.lr={rate}]}}]")
    out = tmp_path / "out"
    assert here("ablate", "cb_vila_tiny", "--rows", rows, "--out", out, "--jobs", "2") == code
    log = out / "bad" / "seed-0" / "log.txt"
    assert_one_line(capfd.readouterr().err, f"row 2/2 'bad', seed 1/3 failed: {reason}; see {log}")
    assert gone(out / "slow" / "seed-0")
    write_rows(
        tmp_path, "rows: [{name: bad, set: [train.lr=0.1]}]"
    )  # what failed had no checkpoint: corrected, it runs
    assert here("ablate", "cb_vila_tiny", "--rows", rows, "--out", out, "--seeds", "1") == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_it_leaves_no_process_behind(
    number: signal.Signals,
    code: int,
    start: Callable[..., subprocess.Popen[str]],
    stand_in: Path,
    tmp_path: Path,
) -> None:
    rows = write_rows(tmp_path, "rows: [{name: slow, set: [train.lr=7]}]")
    folder = tmp_path / "out" / "slow" / "seed-0"
    process = start("cb_vila_tiny", "--rows", rows, "--out", tmp_path / "out", stand_in=stand_in)
    wait_for(lambda: (folder / "began").is_file() and bool((folder / "began").read_text()), process)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == code, complaint
    assert complaint == ("vlscale: interrupted\n" if number == signal.SIGINT else "")
    time.sleep(0.2)
    assert gone(folder)


def test_a_typo_in_row_2_is_found_before_row_1_runs(
    here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path, "rows: [{name: a}, {name: b, set: [weights.mmi=0]}]")
    assert here("ablate", "cb_vila_tiny", "--rows", rows, "--only", "1", "--out", tmp_path / "out") == 2
    assert_one_line(capfd.readouterr().err, f"{rows}: row 2 'b': ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--jobs", "0"], "--jobs 0"),
        (["--seeds", "0"], "--seeds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--only", "3"], "rows 1 to 2"),
        (["--rows", "no_such"], "cb_vila_table4"),
        (["--set", "train.lrr=1"], "train.lrr"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], hint: str, here: Here, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here("ablate", "cb_vila_tiny", "--out", tmp_path / "out", "--rows", rows, *arguments) == 2
    assert_one_line(capfd.readouterr().err, hint)
    assert not (tmp_path / "out").exists()


def test_several_ranks_are_refused(
    here: Here, rows: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)  # how a rank with company leaves
    here("ablate", "cb_vila_tiny", "--rows", rows)
    assert ended == [2]
    assert_one_line(capfd.readouterr().err, "start one task")
