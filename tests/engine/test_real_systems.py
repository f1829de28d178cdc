"""The systems through the engine: a few steps, and exact resume of everything that they carry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import rows
from tests.engine.toy import toy_recipe, write_data
from vlscale.config import Recipe
from vlscale.engine import loop
from vlscale.interop.export import read_tensors
from vlscale.interop.run import load_run

SMALL: dict[str, Any] = {
    "vision": {
        "model": "vit_tiny_patch16_224",
        "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "text": {
        "width": 32,
        "heads": 2,
        "intermediate": 64,
        "text_layers": 1,
        "fusion_layers": 1,
        "max_positions": 32,
        "dropout": 0.1,
    },
    "embed_dim": 16,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "albef": {"name": "albef", "teacher": {"queue_size": 32}},
    "codis": {
        "name": "codis",
        "teacher": {"queue_size": 32},
        "codebook": {"size": 12, "init": "kmeans", "init_step": 5, "revive_after": 2, "revive_until": 1.0},
    },
    # k-means at step 5, MIM and MLM from 3, revival of codes unused for 2 steps: all of it on both sides of the cut.
    "cb_vila": {
        "name": "cb_vila",
        "warmup_steps": 3,
        "codebook": {"size": 12, "init_step": 5, "revive_after": 2, "revive_until": 1.0},
    },
}


def small_recipe(folder: Path, name: str) -> Recipe:
    changes = {"data__image_size": 32, "train__max_steps": 12, "checkpoint__every": 4}
    return toy_recipe(write_data(folder / "data"), system={**SMALL, **SYSTEMS[name]}, **changes)


@pytest.mark.parametrize("cut", [4, 7])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_resume_is_exact(group: None, tmp_path: Path, name: str, cut: int) -> None:
    recipe, threads = small_recipe(tmp_path, name), torch.get_num_threads()
    run: Callable[..., Any] = lambda out, **options: loop.pretrain(  # noqa: E731
        recipe, out=tmp_path / out, ds_config="zero2_cpu", threads=threads, **options
    )
    run("straight")
    run("parts", stop_after=cut)
    run("parts", resume="auto")
    assert rows(tmp_path / "parts") == rows(tmp_path / "straight")
    for file in ("model.safetensors", "carried.safetensors"):
        ours, theirs = (
            read_tensors(tmp_path / out / "checkpoints/step-00000012" / file) for out in ("parts", "straight")
        )
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    assert rows(tmp_path / "parts")[-1]["skipped_steps"] == 0
    loaded = load_run(tmp_path / "parts", "cpu")
    assert loaded.step == 12
