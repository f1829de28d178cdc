"""The house's own rules: layers, file sizes, and a command line that starts at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for room in ("vlscale", "cli") for path in sorted((ROOT / room).rglob("*.py"))]
LONGEST_FILE = 400
HEAVY = ("torch", "deepspeed", "timm", "transformers", "pydantic", "numpy", "rich", "matplotlib")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def test_layers_hold() -> None:
    result = run(str(Path(sys.executable).parent / "lint-imports"))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_system_is_named_outside_the_registry() -> None:
    compared = r"""(system|name)\s*==\s*["'](albef|cb_vila|codis|soho|mvptr)["']"""
    naming = re.compile(rf"{compared}|isinstance\([^)]*(Albef|CbVila|Codis|Soho|Mvptr)\b")
    allowed = {ROOT / "vlscale" / "systems" / "registry.py"}
    found = [path for path in SOURCES if path not in allowed and naming.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, vlscale.cli.main; print(*sorted(m for m in sys.modules if '.' not in m))"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert not set(HEAVY) & set(result.stdout.split())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_answers_at_once(option: str) -> None:
    command = [str(Path(sys.executable).parent / "vlscale"), option]
    assert run(*command).returncode == 0
    best = min(_cpu_seconds(command) for _ in range(3))
    assert best < 0.4, f"vlscale {option} took {best:.2f} s of processor time"


def _cpu_seconds(command: list[str]) -> float:
    """Processor time of a child: the machine that runs the tests may be busy with other things."""
    before = os.times()
    start = time.perf_counter()
    run(*command)
    wall = time.perf_counter() - start
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return min(used, wall)


def test_every_package_is_installed() -> None:
    """The list in pyproject.toml is written by hand, because of `cli` and `ds_configs`."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vlscale").rglob("__init__.py")}
    assert set(declared) == folders | {"vlscale.cli", "vlscale.ds_configs"}
