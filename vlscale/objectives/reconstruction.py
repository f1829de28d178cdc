"""Predicting masked patches: as pixels (CB-ViLA, eq. 3, first term) and as codes (CB-ViLA, eq. 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH_EPS = 1e-6
"""Added to a patch's variance, as in MAE."""


class NormalizedPatches(NamedTuple):
    """Patches of zero mean and unit deviation, and how to undo that."""

    values: Tensor
    """[B, N, P]."""
    mean: Tensor
    """[B, N, 1]."""
    deviation: Tensor
    """[B, N, 1]."""


def normalize_patches(patches: Tensor) -> NormalizedPatches:
    """Each patch by its own mean and (unbiased) variance, as in MAE section 3; [B, N, P] float32."""
    mean = patches.mean(-1, keepdim=True)
    deviation = (patches.var(-1, keepdim=True) + PATCH_EPS).sqrt()
    return NormalizedPatches((patches - mean) / deviation, mean, deviation)


def pixel_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """−log p(x | z_q, l) of eq. 3 as the mean squared error over masked patches and their values.

    predicted, target: [B, M, P], the masked cells only.
    """
    return (predicted.float() - target.detach().float()).square().mean()


def mim_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """CB-ViLA, eq. 4: mean over masked cells of −log p(q(V) | l(T), z_q(V̂)).

    logits: [B, M, K]; codes: [B, M] int64, the detached nearest codes of the same forward.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def code_accuracy(logits: Tensor, codes: Tensor) -> Tensor:
    """Share of the masked cells whose most likely code is right; arguments as in `mim_loss`."""
    return (logits.detach().argmax(-1) == codes).float().mean()


def gumbel_noise(rows: int, codes: int, generator: torch.Generator | None = None) -> Tensor:
    """[rows, codes] float32 of −log(−log U) on the CPU (Jang et al. 2017, section 2.1)."""
    uniform = torch.rand(rows, codes, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    return uniform.log_().neg_().log_().neg_()
