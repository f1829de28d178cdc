"""CB-ViLA's codebook: codes learned by gradient, assigned by squared L2 (paper, eq. 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale.codebooks.nearest import nearest_codes
from vlscale.codebooks.protocol import CodebookUsage
from vlscale.codebooks.upkeep import Upkeep
from vlscale.config import CodebookOptions
from vlscale.nn.precision import full_precision
from vlscale.nn.writer import ParameterWriter


class Sampled(NamedTuple):
    """Gumbel-softmax sample of codes."""

    codes: Tensor
    """[n, d] float32: C[argmax(ℓ + g)], with the gradient of softmax(ℓ + g) · C."""
    indices: Tensor
    """[n] int64."""


class Quantizer(nn.Module):
    """K codes of width d as one parameter `codes`."""

    def __init__(self, options: CodebookOptions, width: int) -> None:
        super().__init__()
        self.options = options
        self.codes = nn.Parameter(torch.randn(options.size, width))
        self.upkeep = Upkeep(options)
        self.tracker = self.upkeep.tracker

    def assign(self, features: Tensor) -> Tensor:
        """Nearest code by squared L2, eq. 1; features [..., d] → [...] int64, in fp32."""
        return nearest_codes(features, self.codes)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index, fp32, with gradient to the codebook; [...] → [..., d]."""
        return nn.functional.embedding(indices, self.codes.float())

    def sample(self, features: Tensor, tau: float, noise: Tensor) -> Sampled:
        """One-hot of argmax(ℓ + g), ℓ = −‖v − c‖² / τ; backward through softmax(ℓ + g); times C.

        Args:
            features: [n, d].
            tau: temperature in units of the squared L2 distance.
            noise: [n, K] Gumbel noise, added after the division, so that it fades as τ falls.
        """
        with full_precision(features):
            features, codes = features.float(), self.codes.float()
            squared = features.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * features @ codes.T  # [n, K]
            perturbed = noise - squared / tau
            indices = perturbed.argmax(1)
            soft = perturbed.softmax(1)
            # (one-hot + soft − sg[soft]) C, with the one-hot product as a lookup: its value is exactly a code.
            return Sampled(self.lookup(indices) + (soft - soft.detach()) @ codes, indices)

    def tau(self, fraction: float) -> float:
        """Gumbel temperature after this share of the run: geometric from start to end, then constant."""
        options = self.options
        done = min(1.0, fraction / options.tau_until)
        return options.tau_start * (options.tau_end / options.tau_start) ** done

    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Remember what a training forward saw, until `after_step`; features [n, d], indices [n]."""
        self.upkeep.observe(features, indices)

    def after_step(self, step: int, fraction: float, writer: ParameterWriter) -> None:
        """Usage, k-means start and revival, the same on every rank; `step` counts the step just taken."""
        self.upkeep.after_step(self.codes, step, fraction, writer)

    def usage(self) -> CodebookUsage:
        """Recent usage in training."""
        return self.tracker.summary()
