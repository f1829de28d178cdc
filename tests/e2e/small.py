"""Recipes shrunk until a step takes milliseconds, and a handful of scenes to train them on."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from vlscale.data.scenes import render_scenes

_SIZES = {
    "system.vision.model": "vit_tiny_patch16_224",
    "system.vision.overrides": "{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    "system.vision.init": "random",
    "system.text.init": "random",
    "system.text.width": "32",
    "system.text.heads": "2",
    "system.text.intermediate": "64",
    "system.text.text_layers": "1",
    "system.text.fusion_layers": "1",
    "system.text.max_positions": "64",
    "system.embed_dim": "16",
    "data.image_size": "32",
    "data.workers": "0",
    "data.tokenizer": "{vocab_size: 300}",
    "train.global_batch": "8",
    "train.micro_batch": "null",
    "train.warmup_steps": "2",
    "checkpoint.every": "2",
    "eval.rerank": "4",
}
SMALL = {
    "cb_vila_tiny": {
        **_SIZES,
        "system.codebook": "{size: 16, init_step: 2, revive_after: 2}",
        "system.warmup_steps": "2",
    },
    "albef_tiny": {**_SIZES, "system.teacher": "{queue_size: 32}"},
}
"""Overrides per recipe."""


def settings(overrides: dict[str, str]) -> list[str]:
    """`--set KEY=VALUE` for every override."""
    return list(itertools.chain.from_iterable(("--set", f"{key}={value}") for key, value in overrides.items()))


def render_small(out: Path) -> Path:
    """Scenes for a run of a few steps."""
    return render_scenes(out, train=24, test=8, seed=0, workers=1)


def logged_steps(run: Path) -> int:
    """Steps in a run's metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill(processes: Iterable[subprocess.Popen[str]]) -> None:
    """End what a test may have left running."""
    for process in processes:
        process.kill()
        process.wait()


def assert_one_line(error: str, hint: str) -> None:
    """What a user's mistake leaves on stderr: one line that helps."""
    assert hint in error
    assert error.startswith("vlscale: error: ")
    assert error.count("\n") == 1, error
