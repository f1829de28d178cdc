"""An untrained run of a few milliseconds' size on pictures of two colours: enough to evaluate and to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlscale.config import Recipe, write_recipe
from vlscale.data.open import read_data
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer, build_tokenizer
from vlscale.interop import layout
from vlscale.interop.export import module_tensors, write_tensors
from vlscale.systems.registry import build_system

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def make_data(folder: Path, count: int = 10) -> Path:
    """PNGs with a box of another colour on the left half, one to three captions each; returns the jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        pixels = np.broadcast_to(rng.integers(0, 256, 3), (32, 32, 3)).astype(np.uint8)
        pixels[:, :16] = rng.integers(0, 256, 3)
        pixels = (pixels // 2 + rng.integers(0, 120, pixels.shape)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        name = NUMBERS[index % len(NUMBERS)]
        captions = [f"picture {name} <b>& co", f"there is {name} again", f"{name} and {name}"][: 1 + index % 3]
        record = {"image": f"{index}.png", "id": f"id-{index}", "split": "test", "captions": captions}
        lines.append(record | {"boxes": [[0.0, 0.0, 0.5, 1.0]], "tags": [f"{'red' if index % 2 else 'blue'} box"]})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_recipe(data: Path, system: str = "cb_vila") -> Recipe:
    """16 patches of 8 pixels, everything 32 wide."""
    vision = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    text = {"width": 32, "heads": 2, "intermediate": 64, "text_layers": 1, "fusion_layers": 2, "max_positions": 32}
    tree = {
        "name": system,
        "vision": {"model": "vit_tiny_patch16_224", "overrides": vision},
        "text": text,
        "embed_dim": 16,
    }
    own: dict[str, Any] = {}
    if system != "albef":
        own["codebook"] = {"size": 24}
    if system != "cb_vila":
        own["teacher"] = {"queue_size": 16}
    section = {"path": str(data), "image_size": 32, "workers": 0, "tokenizer": {"vocab_size": 200}}
    return Recipe.model_validate(
        {"name": "small", "system": tree | own, "data": section, "eval": {"rerank": 4, "batch_size": 4}}
    )


def make_parts(
    folder: Path, system: str = "cb_vila", count: int = 10
) -> tuple[nn.Module, list[Sample], Recipe, TextTokenizer]:
    """An untrained system in evaluation mode and what to evaluate it with."""
    recipe = make_recipe(make_data(folder, count), system)
    samples = read_data(recipe.data)
    tokenizer = build_tokenizer(recipe.data.tokenizer, (c for sample in samples for c in sample.captions))
    torch.manual_seed(0)
    built = build_system(recipe, tokenizer.vocabulary).eval()
    if system == "cb_vila":
        # Fresh codes lie far from all features, so that one would win everywhere.
        nn.init.normal_(built.codebook.codes, std=1.0)
    return built, samples, recipe, tokenizer


def make_run(folder: Path, system: str = "cb_vila", count: int = 10) -> Path:
    """A run folder with one complete checkpoint, and `count` images to look at."""
    built, _, recipe, tokenizer = make_parts(folder / "data", system, count)
    run = folder / "run"
    checkpoint = run / layout.CHECKPOINTS / layout.checkpoint_name(3)
    checkpoint.mkdir(parents=True)
    write_recipe(recipe, run / layout.RECIPE)
    tokenizer.save(run / layout.TOKENIZER)
    write_tensors(checkpoint / layout.MODEL, module_tensors(built))
    write_tensors(checkpoint / layout.CARRIED, built.carried_state())
    (checkpoint / layout.COMPLETE).touch()
    return run
