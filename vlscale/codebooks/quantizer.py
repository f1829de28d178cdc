"""CB-ViLA's codebook: codes learned by gradient, assigned by squared L2 (paper, eq. 1).

k-means start and revival of unused codes are needed both: from random codes without revival nearly all die.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.codebooks.health import UsageTracker, count_codes, kmeans
from vlscale.codebooks.protocol import CodebookUsage
from vlscale.config import CodebookOptions
from vlscale.nn.precision import full_precision
from vlscale.nn.writer import ParameterWriter

CHUNK = 8192
"""Rows whose distances are held at once in `assign`."""
REVIVE_EVERY = 10
"""Steps between two looks for dead codes."""
DEAD_AFTER = 100
"""Steps without use that count as dead in the log where revival is off."""
KMEANS_POINTS = 16
"""Features per code that k-means sees at most."""


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
        # Plain object: registered buffers would be cast by native fp16 (see `System.carried_state`).
        self.tracker = UsageTracker(options.size, options.revive_after or DEAD_AFTER)
        self._counts: Tensor | None = None
        self._candidates: Tensor | None = None

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Nearest code by squared L2, eq. 1; features [..., d] → [...] int64, in fp32."""
        with full_precision(features):
            codes = self.codes.float()
            bias = codes.square().sum(1)  # [K]; the features' own norm does not move the argmin
            flat = features.float().flatten(0, -2)
            nearest = [torch.addmm(bias, rows, codes.T, alpha=-2).argmin(1) for rows in flat.split(CHUNK)]
        return torch.cat(nearest).view(features.shape[:-1])

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

    @torch.no_grad()
    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Remember what a training forward saw, until `after_step`; features [n, d], indices [n]."""
        counts = count_codes(indices, self.options.size)
        self._counts = counts if self._counts is None else self._counts + counts
        self._candidates = features.detach().float()

    @torch.no_grad()
    def after_step(self, step: int, fraction: float, writer: ParameterWriter) -> None:
        """Usage, k-means start and revival, the same on every rank; `step` counts the step just taken."""
        if self._counts is None or self._candidates is None:
            return
        self.tracker.update(distributed.all_reduce_sum(self._counts), step)
        options = self.options
        if options.init == "kmeans" and step == options.init_step:
            writer.write(self.codes, self._centres(step))
            every = torch.ones(options.size, dtype=torch.bool, device=self.codes.device)
            writer.reset_moments(self.codes, every)
            self.tracker.forget(step)
        elif self._revival_due(step, fraction):
            self._revive(step, writer)
        self._counts = self._candidates = None

    def usage(self) -> CodebookUsage:
        """Recent usage in training."""
        return self.tracker.summary()

    def _centres(self, step: int) -> Tensor:
        points = self._spread(KMEANS_POINTS * self.options.size, step)
        return distributed.broadcast(kmeans(points, self.options.size, seed=step))

    def _revival_due(self, step: int, fraction: float) -> bool:
        options = self.options
        started = options.init != "kmeans" or step > options.init_step
        return bool(options.revive_after) and started and step % REVIVE_EVERY == 0 and fraction < options.revive_until

    def _revive(self, step: int, writer: ParameterWriter) -> None:
        """Every dead code becomes a random feature of the batch, the same one on every rank."""
        dead = self.tracker.dead(step)
        candidates = self._spread(self.options.size, step)
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(candidates), (self.options.size,), generator=generator).to(dead.device)
        codes = writer.read(self.codes)
        writer.write(self.codes, torch.where(dead[:, None], candidates[picks], codes))
        writer.reset_moments(self.codes, dead)
        self.tracker.last_used.masked_fill_(dead, step)

    def _spread(self, count: int, step: int) -> Tensor:
        """At most `count` features of the last micro-batches of all ranks, equal on every rank; [n, d]."""
        assert self._candidates is not None
        local = self._candidates
        share = min(len(local), max(1, count // distributed.world_size()))
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(local), generator=generator)[:share].to(local.device)
        return distributed.gather(local[rows])
