"""`vlscale bench inference`: the table, the file, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.small import assert_one_line
from vlscale.cli.main import main


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def vlscale(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["vlscale", "bench", "inference", *arguments])
    return main()


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "times.json"
    assert vlscale(monkeypatch, "codis_tiny", "--repeats", "2", "--tokens", "5", "--out", str(out)) == 0
    shown = capfd.readouterr().out
    for expected in ("vision", "text", "fusion", "total", "64 × 64, asked for 600 × 1000", "random", str(out)):
        assert expected in shown
    written = json.loads(out.read_text())
    assert (written["seen_size"], written["text_tokens"], written["repeats"]) == ([64, 64], 5, 2)
    assert f"{written['total']['median']:.2f}" in shown


MISTAKES = {
    "nothing to time": ([], "RUN_OR_RECIPE"),
    "unknown recipe": (["no_such"], "no_such: no such run folder or checkpoint, and no recipe"),
    "missing file": (["no_such.yaml"], "no_such.yaml: no such recipe file"),
    "a folder without a run": (["."], "no recipe.yaml"),
    "no repeats": (["albef_tiny", "--repeats", "0"], "--repeats 0"),
    "negative height": (["albef_tiny", "--height", "-1"], "--height -1"),
    "too many tokens": (["albef_tiny", "--tokens", "100"], "--tokens 100: albef_tiny has positions for 64"),
    "no number": (["albef_tiny", "--batch", "many"], "--batch"),
    "no threads": (["albef_tiny", "--threads", "0"], "--threads 0"),
    "no folder": (["albef_tiny", "--out", "none/times.json"], "there is no folder none"),
}


@pytest.mark.parametrize(("arguments", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(
    arguments: list[str],
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert vlscale(monkeypatch, *arguments) == 2
    assert_one_line(capfd.readouterr().err, hint)
    assert not list(tmp_path.iterdir())
