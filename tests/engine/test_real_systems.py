"""The systems through the engine: a few steps, and exact resume of everything that they carry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

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


# Shapes that are sorted and padded, four texts an image, SGD for a backbone that wakes at step 5, k-means at step 6.
SOHO: dict[str, Any] = {
    "system": {
        "name": "soho",
        "backbone": {
            "model": "resnet18",
            "overrides": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "output_stride": 8},
            "frozen_stages": 1,
            "freeze_epochs": 1.6,
        },
        "neck": {"kind": "gated"},
        "dictionary": {"size": 12, "init": "kmeans", "init_step": 6, "revive_after": 2, "revive_until": 1.0},
        "text": {"width": 32, "heads": 2, "intermediate": 64, "layers": 1, "max_positions": 32, "dropout": 0.1},
    },
    "data__aspect": {"short": 32, "long": 64, "multiple": 16, "window": 16},
    "data__texts": {"positive": 2, "negative": 2},
    "train__backbone": {"lr": 0.1, "warmup_steps": 2, "schedule": "steps", "milestones": [3]},
}


# Phrases made of the captions, masked words, phrases and tags, and a schedule in shares of the run.
MVPTR: dict[str, Any] = {
    "system": {
        "name": "mvptr",
        "text": {"width": 32, "heads": 2, "intermediate": 64, "layers": 3, "max_positions": 32, "dropout": 0.1},
        "mcr": {"tags": 0.5, "phrases": 0.5},
        "mlm_probability": 0.3,
    },
    "data__concepts": {
        "phrases": "auto",
        "min_count": 2,
        "max_words": 12,
        "max_tags": 6,
        "max_regions": 4,
        "region_width": 48,
        "pixels": 4,
    },
    "train__schedule": "linear",
    "train__warmup_share": 0.2,
}
WHOLE: dict[str, dict[str, Any]] = {"soho": SOHO, "mvptr": MVPTR}


def small_recipe(folder: Path, name: str) -> Recipe:
    data = write_data(folder / "data")
    for path in sorted(data.parent.glob("*.png"))[::3]:
        with Image.open(path) as image:
            image.resize((12, 8)).save(path)
    changes = {"data__image_size": 32, "train__max_steps": 12, "checkpoint__every": 4}
    changes |= WHOLE[name] if name in WHOLE else {"system": {**SMALL, **SYSTEMS[name]}}
    return toy_recipe(data, **changes)


@pytest.mark.parametrize("cut", [4, 7])
@pytest.mark.parametrize("name", [*SYSTEMS, *WHOLE])
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
    last = rows(tmp_path / "parts")[-1]
    assert last["skipped_steps"] == 0
    assert ("lr_backbone" in last) is (name == "soho")
    loaded = load_run(tmp_path / "parts", "cpu")
    assert loaded.step == 12
