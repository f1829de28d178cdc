"""A toy system and a toy data set: everything the engine touches, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.config import Recipe, parse_recipe
from vlscale.data.sample import Batch, Vocabulary
from vlscale.distributed import gather_with_grad
from vlscale.nn.writer import ParameterWriter
from vlscale.systems.protocol import Choices, Progress, StepOutput

WIDTH = 16
LATE_FROM = 3
"""Step from which the third head is used: until then its parameters get no gradient, as in a warm-up."""


class ToySystem(nn.Module):
    """Two encoders, a contrastive loss over all ranks, a head that joins late, a codebook, an average and a queue.

    With a backbone, the pixels go through a layer that rests for the first `freeze_epochs`.
    """

    def __init__(self, vocabulary: Vocabulary, image_size: int = 8, backbone: bool = False) -> None:
        super().__init__()
        self.image = nn.Linear(3 * image_size * image_size, WIDTH)
        self.text = nn.Embedding(vocabulary.size, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.late = nn.Linear(WIDTH, WIDTH)
        self.codes = nn.Parameter(torch.randn(6, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.average = self.image.weight.detach().clone()
        self.pushed = torch.zeros(())
        self.dropout = 0.1
        self.noise = 0.01
        self.revive_rows: Tensor | None = None
        self.poison: dict[int, float] = {}
        """Value added to `itc` at a step (counted from 0)."""
        self.freeze_epochs = 0.0
        if backbone:
            self.backbone = nn.Linear(3 * image_size * image_size, 3 * image_size * image_size)

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        pixels = batch.images.flatten(1)
        pixels = self.backbone(pixels) if hasattr(self, "backbone") else pixels
        image = F.normalize(self.norm(F.dropout(self.image(pixels), self.dropout)).float(), dim=-1)
        words = self.text(batch.input_ids) * batch.attention_mask.unsqueeze(-1)
        text = F.normalize(words.sum(1).float(), dim=-1)
        noise = torch.randn(image.shape, generator=progress.generator).to(image) * self.noise
        logits = (image + noise) @ gather_with_grad(text).T / self.temperature
        own = torch.arange(len(batch), device=logits.device) + _first_row(len(batch))
        losses = {"itc": F.cross_entropy(logits, own) + self.poison.get(progress.step, 0.0)}
        nearest = torch.cdist(image, self.codes.float()).amin(1)
        losses["itm"] = nearest.square().mean()
        if progress.step >= LATE_FROM:
            losses["mlm"] = F.mse_loss(self.late(image).float(), text)
        else:
            losses["mlm"] = torch.zeros((), device=logits.device)
        self.seen += len(batch)
        return StepOutput(losses, {"accuracy": (logits.argmax(1) == own).float().mean().detach()})

    @torch.no_grad()
    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        self.average.lerp_(self.image.weight.float(), 0.1)
        self.pushed += 1
        if self.revive_rows is not None:
            codes = writer.read(self.codes)
            codes[self.revive_rows] = torch.randn(codes.shape, generator=progress.generator)[self.revive_rows]
            writer.write(self.codes, codes)
            writer.reset_moments(self.codes, self.revive_rows)

    def carried_state(self) -> dict[str, Tensor]:
        return {"average": self.average, "pushed": self.pushed}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        self.average, self.pushed = state["average"], state["pushed"]

    def place(self, device: torch.device) -> None:
        self.average, self.pushed = self.average.to(device), self.pushed.to(device)

    def no_weight_decay(self) -> set[str]:
        return {"codes"}

    def rest(self, progress: Progress) -> bool:
        resting = hasattr(self, "backbone") and progress.epoch < self.freeze_epochs
        if hasattr(self, "backbone"):
            self.backbone.requires_grad_(not resting)
        return resting


def _first_row(rows: int) -> int:
    from vlscale import distributed

    return distributed.rank() * rows


def build_toy(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    """Stands in for `registry.build_system`; a recipe of SOHO gives the toy a backbone."""
    backbone = getattr(recipe.system, "backbone", None)
    system = ToySystem(vocabulary, recipe.data.image_size, backbone is not None)
    if backbone is not None:
        system.freeze_epochs = backbone.freeze_epochs
    return system


def write_data(folder: Path, count: int = 24, broken: int | None = None) -> Path:
    """A jsonl of tiny coloured images; the one numbered `broken` is no image."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    lines = []
    for index in range(count):
        name = list(colours)[index % 3]
        path = folder / f"{index:03d}.png"
        shade = tuple(min(255, c + 2 * index) for c in colours[name])
        Image.new("RGB", (8, 8), shade).save(path)
        if index == broken:
            path.write_bytes(b"no image")
        captions = [f"a {name} square number {index}"]
        record = {"image": path.name, "id": f"s{index:03d}", "captions": captions, "tags": [name, "square"]}
        lines.append(json.dumps(record))
    data = folder / "captions.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data


def toy_recipe(data: Path, **changes: Any) -> Recipe:
    """Recipe for `build_toy`; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "name": "toy",
        "system": {"name": "albef"},
        "data": {
            "path": str(data),
            "image_size": 8,
            "workers": 0,
            "augment": {"randaugment": None},
            "tokenizer": {"vocab_size": 200, "max_tokens": 12},
        },
        "train": {"max_steps": 20, "global_batch": 8, "lr": 1e-2, "warmup_steps": 4, "clip": 1.0, "max_bad_steps": 3},
        "checkpoint": {"every": 5, "keep": 3},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_recipe(tree, "toy")
