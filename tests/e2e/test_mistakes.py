"""What a user gets wrong is answered with one line that helps, exit code 2 and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Here, Vlscale
from tests.e2e.small import SMALL, assert_one_line, settings

MISTAKES = {
    "unknown recipe": (["pretrain", "no_such"], "cb_vila_tiny"),
    "missing recipe file": (["pretrain", "no_such.yaml"], "no_such.yaml"),
    "unknown key": (["pretrain", "--set", "system.codebok.size=8"], "system.codebok"),
    "wrong value": (["pretrain", "--set", "train.lr=fast"], "train.lr"),
    "no value": (["pretrain", "--set", "train.lr"], "KEY=VALUE"),
    "unknown loss": (["pretrain", "--set", "weights.mmi=1"], "mmi"),
    "missing data": (["pretrain", "--data", "no_such.jsonl"], "no_such.jsonl"),
    "missing image root": (["pretrain", "--image-root", "no_such"], "no_such"),
    "unknown DeepSpeed config": (["pretrain", "--dry-run", "--ds-config", "zero9"], "zero2_cpu"),
    "no ranks": (["pretrain", "--nproc", "0"], "--nproc 0"),
    "no threads": (["pretrain", "--threads", "0"], "--threads 0"),
    "unknown option": (["pretrain", "--recipe", "x"], "--recipe"),
    "unknown command": (["train"], "train"),
    "no run to evaluate": (["eval", "retrieval"], "--from"),
    "missing run to evaluate": (["eval", "retrieval", "--from", "no_such_run"], "no_such_run"),
    "missing run to ground": (["eval", "grounding", "--zero-shot", "--from", "no_such_run"], "no_such_run"),
    "missing run to probe": (["eval", "objectives", "--from", "no_such_run"], "no_such_run"),
    "missing run to look at": (["codebook-inspect", "no_such_run", "--show-patches"], "no_such_run"),
    "missing run to draw": (["inspect", "reconstructions", "no_such_run"], "no_such_run"),
    "missing run to map": (["inspect", "gradcam", "no_such_run"], "no_such_run"),
    "unknown format": (["pretrain", "--data", "cocoo:captions.json"], "cocoo"),
    "corpus without a place": (["pretrain", "--data", "albef_4m"], "VLSCALE_DATA"),
    "missing tars": (["pretrain", "--data", "{00000..00002}.tar"], "00000.tar"),
    "shards of nothing": (["data", "shards", "no_such.json", "--out", "out"], "no_such.json"),
    "size of nothing": (["data", "shards", "no_such.json", "--out", "out", "--max-size", "big"], "--max-size big"),
    "sheet of nothing": (["data", "show", "no_such.json"], "no_such.json"),
    "answers of nothing": (["data", "answers", "no_such.json", "--out", "a.json"], "no_such.json"),
    "bench of nothing": (["bench", "data", "--data", "no_such.json"], "no_such.json"),
    "missing data to validate": (["data", "validate", "no_such.jsonl"], "no_such.jsonl"),
}


@pytest.mark.parametrize(("arguments", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(
    arguments: list[str],
    hint: str,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here(*arguments) == 2
    assert_one_line(capfd.readouterr().err, hint)
    assert not list(tmp_path.iterdir())


def test_a_broken_line_of_data_is_named(vlscale: Vlscale, tmp_path: Path) -> None:
    data = tmp_path / "captions.jsonl"
    data.write_text('{"image": "a.jpg", "captions": ["a dog"]}\n{"image": \n')
    result = vlscale("pretrain", "--data", data, "--out", tmp_path / "run", *settings(SMALL["cb_vila_tiny"]))
    assert result.returncode == 2, result.stderr
    assert_one_line(result.stderr, "captions.jsonl")
