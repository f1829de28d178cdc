"""One small run that the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.small import SMALL, render_small, settings

Vlscale = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 6


@pytest.fixture(scope="session")
def vlscale() -> Vlscale:
    """Run the installed command in a process of its own, as a user does, one thread per rank."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment["OMP_NUM_THREADS"] = "1"
    command = str(Path(sys.executable).parent / "vlscale")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = [command, *map(str, arguments)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `vlscale data scenes` makes it."""
    return render_small(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def trained(vlscale: Vlscale, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the default recipe, made small."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    arguments = ["pretrain", "--data", scenes, "--out", out, *settings(SMALL["cb_vila_tiny"])]
    result = vlscale(*arguments, "--set", f"train.max_steps={STEPS}")
    assert result.returncode == 0, result.stdout + result.stderr
    return out
