"""A tiny ALBEF whose vision and text differ in width, a batch for it, and a writer without an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.config import AlbefSystem, Teacher, Text, Vision
from vlscale.data.sample import Batch, Vocabulary
from vlscale.systems.albef import Albef
from vlscale.systems.protocol import Progress

VOCABULARY = Vocabulary(size=40, pad=0, cls=1, sep=2, mask=3)
IMAGE_SIZE = 32


class DirectWriter:
    """Parameters are written where they lie."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().float()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def reset_moments(self, parameter: nn.Parameter, rows: Tensor) -> None:
        raise AssertionError("ALBEF has no rows to reset")


def tiny_config(**changes: object) -> AlbefSystem:
    overrides = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    text = Text(width=16, heads=2, intermediate=32, text_layers=2, fusion_layers=2, max_positions=12, dropout=0.0)
    config = AlbefSystem(
        vision=Vision(model="vit_tiny_patch16_224", overrides=overrides),
        text=text,
        embed_dim=8,
        teacher=Teacher(queue_size=10, momentum=0.9),
    )
    return config.model_copy(update=changes)


def tiny_albef(seed: int = 0, **changes: object) -> Albef:
    torch.manual_seed(seed)
    return Albef(tiny_config(**changes), IMAGE_SIZE, VOCABULARY)


def tiny_batch(size: int = 4, length: int = 9, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY.size, (size, length), generator=generator)
    ids[:, 0] = VOCABULARY.cls
    mask = torch.ones_like(ids)
    for row in range(size):  # padding of different lengths
        mask[row, length - row % 4 :] = 0
    ids = torch.where(mask == 1, ids, VOCABULARY.pad)
    images = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Batch(images, ids, mask, torch.arange(size))


def progress(step: int = 1, seed: int = 0) -> Progress:
    """One step an epoch: α is 0 at step 0 and at its full height from step 1 on."""
    return Progress(step, total_steps=10, steps_per_epoch=1.0, generator=torch.Generator().manual_seed(seed))
