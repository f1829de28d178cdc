"""`vlscale doctor` as a user calls it; and parts of it that hang, die or eat the memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.small import SMALL, settings
from tests.engine.toy import write_data
from vlscale.cli import doctor, launch
from vlscale.distributed import free_port
from vlscale.engine import checks_storage
from vlscale.engine.checks_finding import Finding

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Doctor = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def vlscale(tmp_path: Path) -> Doctor:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {"OMP_NUM_THREADS": "1", "VLSCALE_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        words = [str(Path(sys.executable).parent / "vlscale"), "doctor", *map(str, arguments)]
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False, "cwd": tmp_path}
        return subprocess.run(words, env={**environment, **more}, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """Run a program in place of the doctor's own process and give what is found then."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def run(program: str, timeout: float = 30) -> Finding:
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(doctor._Examination, "_command", lambda self, parts, ranks: command)
        examination = doctor._Examination(tmp_path, tmp_path / "shared", timeout, verbose=False)
        examination.run(["collective"])
        (finding,) = examination.findings()
        return finding

    return run


def test_a_part_that_hangs_is_given_up(examine: Callable[..., Finding]) -> None:
    start = time.monotonic()
    found = examine("import time; time.sleep(60)", timeout=1)
    assert time.monotonic() - start < 20
    assert (found.name, found.state, found.found) == ("collective", "failed", "no answer within 1 s")
    assert "MASTER_ADDR" in found.fix


def test_a_part_that_dies_says_why(examine: Callable[..., Finding]) -> None:
    found = examine("print('before'); raise ImportError('no libfabric'); print('after')")
    assert found.found == "ended with exit code 1: ImportError: no libfabric"


def test_a_part_that_is_killed(examine: Callable[..., Finding]) -> None:
    found = examine("import os; os.kill(os.getpid(), 9)")
    assert found.found.startswith("killed, mostly for want of memory")


def test_a_part_that_eats_the_memory_is_stopped(
    examine: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([20 << 30])
    monkeypatch.setattr(checks_storage, "free_memory", lambda: next(left, 1 << 29))
    found = examine("import time; time.sleep(60)")
    assert found.found == "stopped: 19.50 GiB of memory taken, 512 MiB left"
    assert "train.micro_batch" in found.fix


def test_part_limits_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examination = doctor._Examination(tmp_path, tmp_path, 10, verbose=False)
    monkeypatch.setattr(launch, "rank", lambda: 0)
    assert examination._limit(["collective", "step"], "collective") == 10
    assert examination._limit(["collective", "step"], "step") == 110
    monkeypatch.setattr(launch, "rank", lambda: 1)
    assert examination._limit(["collective", "step"], "collective") == 110


def test_a_mistake_in_the_recipe_is_wrong_usage(vlscale: Doctor) -> None:
    result = vlscale("cb_vila_tiny", "--set", "train.lrr=1")
    assert result.returncode == 2
    assert "train.lrr" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_machine_alone(vlscale: Doctor, tmp_path: Path) -> None:
    result = vlscale()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "✓ versions: python" in result.stdout
    assert "2 ranks on" in result.stdout
    assert "all 2 ranks see one another's files" in result.stdout
    assert "dry step" not in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_recipe_with_two_ranks(vlscale: Doctor, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    common = ("albef_tiny", *settings(SMALL["albef_tiny"]), "--data", data, "--out", tmp_path / "runs" / "new")
    before = set(tmp_path.rglob("*"))
    result = vlscale(*common, "--nproc", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        "✓ batch: 8 images per step = 4 per rank and pass × 2 ranks",
        "✓ samples: 24 of 24",
        "✓ dry step: 4 images a rank: loss ",
        "✓ gradients: reach ",
    ):
        assert line in result.stdout
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_broken_input_fails_the_checks_it_breaks_and_no_others(vlscale: Doctor, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    for image in data.parent.glob("*.png"):
        image.write_bytes(b"no image")
    result = vlscale("albef_tiny", *settings(SMALL["albef_tiny"]), "--data", data, "--nproc", "3")
    assert result.returncode == 1
    failed = {line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("✗")}
    assert failed == {"✗ --ds-config", "✗ batch", "✗ samples", "✗ dry step"}
    assert "take a multiple of 3, such as 6" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_ranks_of_a_launcher_make_one_report(vlscale: Doctor, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    data = write_data(tmp_path / "data")
    recipe = ("albef_tiny", *settings(SMALL["albef_tiny"]), "--data", data)
    command = [str(Path(sys.executable).parent / "vlscale"), "doctor", *map(str, recipe)]
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "RANK": "1", "LOCAL_RANK": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        result = vlscale(*recipe, RANK="0", LOCAL_RANK="0", **shared)
        said, _ = other.communicate(timeout=60)
    finally:
        other.kill()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "✓ dry step: 4 images a rank" in result.stdout
    assert (other.returncode, said) == (0, "")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_not_waited_for_for_ever(vlscale: Doctor) -> None:
    meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = vlscale("--timeout", "15", **meeting)
    assert result.returncode == 1
    assert "✗ collective: no answer within 15 s" in result.stdout
