"""Fine-tuning through the engine: from a pre-trained checkpoint, exactly resumed, the best epoch kept and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.engine.conftest import rows
from tests.engine.test_real_systems import MVPTR, SMALL, SOHO, SYSTEMS
from tests.engine.toy import toy_recipe
from vlscale.config import Recipe
from vlscale.config.tuning import tuning_recipe
from vlscale.engine import loop
from vlscale.interop.export import read_tensors
from vlscale.interop.run import load_run
from vlscale.systems.tuned import Tuned

STEPS, CUT = 8, 5
DISTILL = {"momentum": 0.5, "alpha": 0.4}
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "answers as words": ("albef", "vqa", {"task": {"min_count": 2, "decoder_layers": 1, "distill": DISTILL}}),
    "two images in pairs": (
        "codis",
        "nlvr2",
        {"task": {"mode": "paired", "assignment_steps": 3, "distill": DISTILL}, "data": {"image_size": 48}},
    ),
    "entailment": (
        "cb_vila",
        "snli-ve",
        {"task": {"head_lr": 3.0, "layer_decay": 0.8}, "data": {"image_size": 48}},
    ),
    "two images in turn": (
        "soho",
        "nlvr2",
        {
            "task": {"mode": "passes"},
            "system": {"backbone": {"freeze_epochs": 0.5}},
            "train": {"backbone": {"lr": 0.1, "warmup_steps": 2}},
        },
    ),
    "answers as classes": ("mvptr", "vqa", {"task": {"mode": "classify", "head": "words", "min_count": 2}}),
    "phrases and regions": ("mvptr", "grounding", {"task": {"layer": 1}}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes, rendered once."""
    return tmp_path_factory.mktemp("cache")


def base_recipe(name: str) -> Recipe:
    changes: dict[str, Any] = {
        "name": "base",
        "data__path": None,
        "data__scenes": {"train": 8, "test": 1, "val": 1},
        "data__image_size": 32,
        "data__tokenizer": {"vocab_size": 300, "max_tokens": 16},
        "train__max_steps": 1,
    }
    changes |= {"soho": SOHO, "mvptr": MVPTR}.get(name) or {"system": {**SMALL, **SYSTEMS[name]}}
    return toy_recipe(Path("unused"), **changes)


def tuned_recipe(base: Recipe, task: str, changes: dict[str, Any], folder: Path) -> Recipe:
    train = {"max_steps": STEPS, "epochs": None, "global_batch": 8, "lr": 1e-2, "warmup_steps": 2, "clip": 1.0}
    path = folder / "changes.yaml"
    path.write_text(
        yaml.safe_dump(
            {**changes, "train": {**train, **changes.get("train", {})}, "checkpoint": {"every": 3, "keep": 1}}
        )
    )
    return tuning_recipe(base, task, str(path))


@pytest.mark.parametrize("case", TASKS)
def test_tuned_runs(group: None, case: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(cache))
    name, task, changes = TASKS[case]
    threads, base = torch.get_num_threads(), base_recipe(name)
    common: dict[str, Any] = {"ds_config": "zero2_cpu", "threads": threads}
    weights = loop.pretrain(base, out=tmp_path / "base", **common).checkpoint
    assert weights is not None
    recipe = tuned_recipe(base, task, changes, tmp_path)
    assert recipe.task is not None
    best, judged = recipe.task.best, []

    def judge(run: loop.Run) -> dict[str, float]:
        assert not run.system.training
        judged.append(run.state.step)
        return {best: -float(run.state.step)}

    def run(out: str, **options: Any) -> loop.RunResult:
        return loop.pretrain(recipe, out=tmp_path / out, weights=weights, on_epoch=judge, **common, **options)

    run("straight")
    first = judged[0]
    run("parts", stop_after=CUT)
    run("parts", resume="auto")
    assert rows(tmp_path / "parts") == rows(tmp_path / "straight")
    for file in ("model.safetensors", "carried.safetensors"):
        ours, theirs = (
            read_tensors(tmp_path / out / f"checkpoints/step-{STEPS:08d}" / file) for out in ("parts", "straight")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    last = rows(tmp_path / "parts")[-1]
    assert last["skipped_steps"] == 0
    assert last[task] > 0
    assert ("lr_backbone" in last) is (name == "soho")
    assert json.loads((tmp_path / "parts" / "best.json").read_text())["best"]["step"] == first
    loaded = load_run(tmp_path / "parts", "cpu")
    assert loaded.step == first
    assert isinstance(loaded.system, Tuned)
    check_start(loaded.system, weights, tmp_path / "parts")


def check_start(system: Tuned, weights: Path, run: Path) -> None:
    """What the task doesn't read is the pre-trained run's to the bit; what it reads has moved."""
    given, now = (
        read_tensors(weights / "model.safetensors"),
        read_tensors(run / f"checkpoints/step-{STEPS:08d}/model.safetensors"),
    )
    parameters = dict(system.system.named_parameters())
    for name, value in given.items():
        own = now[f"system.{name}"]
        if name not in parameters or own.shape != value.shape:
            continue
        if not parameters[name].requires_grad:
            assert torch.equal(own, value), name
        elif not name.endswith(
            (".key.bias", ".bn1.weight")
        ):  # a softmax feels no bias, a branch that starts at 0 comes late
            assert not torch.equal(own, value), name
    assert all(name.startswith(("system.", "head.")) for name in now)
