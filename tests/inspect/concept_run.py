"""An untrained run of a system that reads concepts, on pictures of two boxes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlscale.config import Recipe, write_recipe
from vlscale.data.concepts import load_phrases, with_phrases
from vlscale.data.open import read_data
from vlscale.data.phrases import frequent_phrases
from vlscale.data.text import build_tokenizer
from vlscale.interop import layout
from vlscale.interop.export import module_tensors, write_tensors
from vlscale.systems.registry import build_system

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "white": (240, 240, 240)}
SHAPES = ("box", "ball", "dog")
BOXES = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.25, 1.0, 1.0))
PLAIN = "there <and> $here$ $now$"
"""A caption without phrases, in sample id-2."""


def make_data(folder: Path, count: int = 12) -> Path:
    """PNGs with two coloured boxes, what they are called, and captions about both; returns the jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        pixels = np.full((24, 32, 3), 128, np.uint8)
        names = []
        for number, (x1, y1, x2, y2) in enumerate(BOXES):
            colour = list(COLOURS)[(index + number) % len(COLOURS)]
            pixels[round(24 * y1) : round(24 * y2), round(32 * x1) : round(32 * x2)] = COLOURS[colour]
            names.append(f"{colour} {SHAPES[(index + 2 * number) % len(SHAPES)]}")
        Image.fromarray(pixels).save(folder / f"{index}.png")
        captions = [f"a {names[0]} on a {names[1]}", f"the {names[1]} and the {names[0]}"]
        if index == 2:
            captions = [PLAIN]
        record = {"image": f"{index}.png", "id": f"id-{index}", "split": "test", "captions": captions}
        lines.append(record | {"boxes": BOXES, "tags": names})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_recipe(data: Path, phrases: Path | None, **system: Any) -> Recipe:
    """Two layers of two heads, 16 wide; regions of 2 × 2 pixels."""
    text = {"width": 16, "heads": 2, "intermediate": 32, "layers": 2, "max_positions": 24, "norm": "pre"}
    concepts: dict[str, Any] = {"max_words": 16, "max_phrases": 4, "max_tags": 10, "max_regions": 4}
    concepts |= {"phrases": None if phrases is None else str(phrases), "region_width": 12, "pixels": 2}
    section = {"path": str(data), "image_size": 32, "workers": 0, "tokenizer": {"vocab_size": 200}}
    tree = {"name": "mvptr", "text": text, "wpg": {"layer": 1}, **system}
    return Recipe.model_validate({"name": "small", "system": tree, "data": section | {"concepts": concepts}})


def make_run(folder: Path, phrases: bool = True, **system: Any) -> Path:
    """A run folder with one complete checkpoint; attention in it differs from the mean.

    Args:
        phrases: give it those of its captions.
        system: keys of the recipe.
    """
    data, run = make_data(folder / "data"), folder / "run"
    checkpoint = run / layout.CHECKPOINTS / layout.checkpoint_name(3)
    checkpoint.mkdir(parents=True)
    samples = read_data(make_recipe(data, None).data)
    vocabulary = run / layout.PHRASES[0]
    if phrases:
        frequent_phrases(samples, 1).save(vocabulary)
    recipe = make_recipe(data, vocabulary if phrases else None, **system)
    assert recipe.data.concepts is not None
    tokenizer = build_tokenizer(recipe.data.tokenizer, (c for sample in samples for c in sample.captions))
    torch.manual_seed(0)
    built = build_system(recipe, with_phrases(tokenizer, load_phrases(recipe.data.concepts))).eval()
    for name, parameter in built.named_parameters():
        if ".self." in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    write_recipe(recipe, run / layout.RECIPE)
    tokenizer.save(run / layout.TOKENIZER)
    write_tensors(checkpoint / layout.MODEL, module_tensors(built))
    write_tensors(checkpoint / layout.CARRIED, built.carried_state())  # type: ignore[operator]
    (checkpoint / layout.COMPLETE).touch()
    return run
