"""One small run that the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.small import SMALL, render_small, settings
from vlscale.cli.main import main

Vlscale = Callable[..., subprocess.CompletedProcess[str]]
Here = Callable[..., int]
STEPS = 6


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache, empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def vlscale(cache: Path) -> Vlscale:
    """Run the installed command in a process of its own, as a user does, one thread per rank."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "VLSCALE_CACHE": str(cache)}
    command = str(Path(sys.executable).parent / "vlscale")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = [command, *map(str, arguments)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Here:
    """Run the command line in this process and get its exit code: torch need not be imported again."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what a command sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLSCALE_CACHE", str(cache))

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["vlscale", *map(str, arguments)])
        return main()

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `vlscale data scenes` makes it."""
    return render_small(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def first_run(vlscale: Vlscale, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | Path], str]:
    """The whole path as `make pretrain` walks it, small: run folder, command and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "first-run"
    sizes = {**SMALL["cb_vila_tiny"], "data.scenes": "{train: 24, test: 8}", "train.max_steps": str(STEPS)}
    command: list[str | Path] = ["first-run", "--out", out, *settings(sizes)]
    result = vlscale(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, command, result.stdout


@pytest.fixture(scope="session")
def trained(first_run: tuple[Path, list[str | Path], str]) -> Path:
    """The folder of a finished run of the default recipe, made small, on the embedded scenes."""
    return first_run[0]
