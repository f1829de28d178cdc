"""A system of the smallest kind on images of many shapes: a cell's feature is its mean colour, a code is a colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.small_run import make_recipe
from vlscale.codebooks.protocol import Codebook, CodebookUsage
from vlscale.config import Aspect, Recipe
from vlscale.data.open import read_data
from vlscale.data.sample import Batch
from vlscale.data.text import build_tokenizer
from vlscale.interop.run import Run
from vlscale.systems.protocol import Cells

STRIDE = 16
"""Pixels of a cell's side."""
SHAPES = ((64, 40), (40, 64), (48, 48), (96, 40), (40, 90), (80, 60), (56, 40), (40, 40), (70, 50))
"""Width and height of the images."""
COLOURS = (
    *((40, 90, 200), (110, 160, 235), (30, 120, 40), (90, 170, 60), (200, 60, 40), (240, 200, 50), (120, 80, 50)),
    *((250, 250, 250), (10, 10, 10), (160, 160, 160)),
)


class Colours:
    """A codebook of colours in the range of normalised images."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes
        """[K, 3] float32."""

    def assign(self, features: Tensor) -> Tensor:
        return torch.cdist(features.float(), self.codes.expand(len(features), -1, -1)).argmin(-1)

    def usage(self) -> CodebookUsage:
        return CodebookUsage(torch.zeros(len(self.codes)), 1.0, 1.0)


class MeanColours(nn.Module):
    """Answers what inspection asks of a system; a cell is valid where its upper left pixel is."""

    def __init__(self, codes: Tensor, generous: bool = False) -> None:
        super().__init__()
        self.book = Colours(codes)
        self.generous = generous
        """Call every cell valid."""

    def codebooks(self) -> dict[str, Codebook]:
        return {"dictionary": self.book}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        return {"dictionary": F.avg_pool2d(batch.images, STRIDE).flatten(2).transpose(1, 2)}

    def cells(self, batch: Batch) -> Cells:
        height, width = batch.images.shape[2:]
        sizes = batch.image_sizes
        if sizes is None or self.generous:
            sizes = torch.tensor([[height, width]]).expand(len(batch.images), 2)
        down = torch.arange(0, height, STRIDE) < sizes[:, :1]  # [B, rows]
        right = torch.arange(0, width, STRIDE) < sizes[:, 1:]  # [B, columns]
        return Cells(height // STRIDE, width // STRIDE, (down[:, :, None] & right[:, None]).flatten(1))


def make_aspect_data(folder: Path) -> Path:
    """Landscapes of `SHAPES` with a house, one of them without a caption; returns the jsonl file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for index, (width, height) in enumerate(SHAPES):
        pixels = np.empty((height, width, 3))
        pixels[: height // 2], pixels[height // 2 :] = COLOURS[index % 2], COLOURS[2 + index % 2]
        x, y = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        pixels[y : y + height // 2, x : x + width // 3] = COLOURS[4 + index % 3]
        noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.png")
        box = [x / width, y / height, (x + width // 3) / width, (y + height // 2) / height]
        record = {"image": f"{index}.png", "split": "test", "boxes": [box], "tags": ["house"]}
        captions = [f'<i>house</i> & "garden" {index}'] if index else []
        lines.append(record | {"captions": captions})
    path = folder / "images.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def aspect_recipe(data: Path) -> Recipe:
    """Shorter side 56, longer at most 120, padded to multiples of 32."""
    recipe = make_recipe(data)
    section = recipe.data.model_copy(update={"aspect": Aspect(short=56, long=120, multiple=32)})
    return recipe.model_copy(update={"data": section})


def make_aspect_run(folder: Path, **options: Any) -> Run:
    """The system ready to be looked at; options of `MeanColours` beside its codes."""
    recipe = aspect_recipe(make_aspect_data(folder / "data"))
    captions = [caption for sample in read_data(recipe.data) for caption in sample.captions]
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    colours = (torch.tensor(COLOURS) / 255 - mean) / std
    codes = torch.cat([colours, 50 + torch.arange(9.0).view(3, 3)])  # the last three are far from all
    system = MeanColours(options.pop("codes", codes), **options).eval()
    tokenizer = build_tokenizer(recipe.data.tokenizer, captions)
    return Run(folder / "run", folder / "run" / "step-7", 7, recipe, tokenizer, system, torch.device("cpu"))
