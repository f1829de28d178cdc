"""From a pre-trained run to answers: `finetune` and `eval` of a task on a handful of scenes, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Vlscale
from tests.e2e.small import SMALL, assert_one_line, settings
from vlscale.data.scenes import render_scenes

pytestmark = pytest.mark.slow
TASKS = {
    "vqa": {"task": {"name": "vqa", "min_count": 1, "candidates": 4, "decoder_layers": 1}},
    "nlvr2": {"task": {"name": "nlvr2", "mode": "passes"}},
    "snli-ve": {"task": {"name": "snli-ve"}},
}


@pytest.fixture(scope="module")
def albef(vlscale: Vlscale, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, on scenes with a validation split."""
    out = tmp_path_factory.mktemp("runs") / "albef"
    scenes = render_scenes(out.parent / "scenes", train=24, test=4, val=8, seed=0, workers=1)
    sizes = settings({**SMALL["albef_tiny"], "train.max_steps": "2"})
    result = vlscale("pretrain", "albef_tiny", "--data", scenes, "--out", out, *sizes)
    assert result.returncode == 0, result.stderr
    return out


def recipe_file(folder: Path, task: str) -> Path:
    train = {"max_steps": 3, "global_batch": 8, "warmup_steps": 1}
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps({**TASKS[task], "train": train}))  # JSON is YAML
    return path


@pytest.mark.parametrize(("task", "ranks"), [("vqa", 1), ("nlvr2", 2), ("snli-ve", 1)])
def test_from_a_run_to_answers(task: str, ranks: int, vlscale: Vlscale, albef: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / task, recipe_file(tmp_path, task)
    command = ["finetune", task, "--from", albef, "--recipe", recipe, "--out", out, "--nproc", ranks]
    result = vlscale(*command, "--set", "eval.validation=9")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every epoch is judged by 9 examples of the validation split" in result.stdout
    best = json.loads((out / "best.json").read_text())["best"]

    result = vlscale("eval", task, "--from", out, "--split", "val", "--first", "9")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((out / "eval" / f"{task}.json").read_text())
    assert found["metrics"]["accuracy"] == pytest.approx(best["accuracy"])
    assert found["protocol"]["tuned_on"]["from"] == str(albef / "checkpoints" / "step-00000002")
    assert (out / "eval" / task / "index.html").is_file()

    again = vlscale(*command, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "after step 3" in again.stdout


def test_what_it_would_be_and_what_is_missing(vlscale: Vlscale, albef: Path, tmp_path: Path) -> None:
    start = ["finetune", "vqa", "--from", albef]
    dry = vlscale(*start, "--recipe", recipe_file(tmp_path, "vqa"), "--out", tmp_path / "none", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "training examples" in dry.stdout
    assert "name: albef_tiny-vqa" in dry.stdout
    assert not (tmp_path / "none").exists()
    assert_one_line(vlscale("eval", "vqa", "--from", albef).stderr, f"vlscale finetune vqa --from {albef}")
