"""How a codebook is used and kept alive: usage, perplexity, dead codes, k-means."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from vlscale.codebooks.protocol import CodebookUsage

KMEANS_ITERATIONS = 10


def entropy(counts: Tensor) -> Tensor:
    """Entropy of the code frequencies in nats; counts [K] → scalar. No codes counted: 0."""
    shares = counts.float() / counts.sum().clamp(min=1e-9)
    return -(shares * shares.clamp(min=1e-12).log()).sum()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy): how many codes an even use of them would take; counts [K] → scalar."""
    return entropy(counts).exp()


def count_codes(indices: Tensor, size: int) -> Tensor:
    """How often each code occurs, without asking the device; any shape of indices → [K] float32."""
    flat = indices.flatten()
    ones = torch.ones(flat.shape, dtype=torch.float32, device=flat.device)
    return torch.zeros(size, dtype=torch.float32, device=flat.device).scatter_add_(0, flat, ones)


def kmeans(features: Tensor, size: int, seed: int) -> Tensor:
    """Centres of `size` clusters by scipy's Lloyd iterations from random points.

    Args:
        features: [n, d] float32; fewer features than clusters are repeated with a little noise.
        seed: fixes the starting points.

    Returns:
        [size, d] float32 on the device of the features.
    """
    rng = np.random.default_rng(seed)
    points = features.detach().float().cpu().numpy()
    if len(points) < size:
        points = points[rng.integers(len(points), size=size)]
        points = points + 1e-3 * points.std() * rng.standard_normal(points.shape).astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # it stays where it is: on a feature
        centres, _ = kmeans2(points, size, iter=KMEANS_ITERATIONS, minit="points", missing="warn", rng=rng)
    return torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32)).to(features.device)


class UsageTracker:
    """Moving counts and the step of the last use of every code; equal on every rank, carried over restarts.

    Not a module: its state goes with the system's `carried_state`.
    """

    DECAY = 0.99
    """Of the moving counts, per step."""

    def __init__(self, size: int, dead_after: int) -> None:
        self.dead_after = dead_after
        self.counts = torch.zeros(size, dtype=torch.float32)
        """[K], moving average of uses per step."""
        self.last_used = torch.zeros(size, dtype=torch.int64)
        """[K], step of the last use; 0 at the start, so that no code counts as dead before `dead_after` steps."""

    def update(self, counts: Tensor, step: int) -> None:
        """Take in one step's counts [K], summed over ranks and micro-batches."""
        self.counts.mul_(self.DECAY).add_(counts, alpha=1 - self.DECAY)
        self.last_used.masked_fill_(counts > 0, step)

    def forget(self, step: int) -> None:
        """Start anew, as after all codes were replaced."""
        self.counts.zero_()
        self.last_used.fill_(step)

    def dead(self, step: int) -> Tensor:
        """[K] bool: not used in the last `dead_after` steps."""
        return (step - self.last_used) >= self.dead_after

    def metrics(self, step: int) -> dict[str, Tensor]:
        """Scalars to log, on the device."""
        return {
            "codebook_perplexity": perplexity(self.counts),
            "codebook_entropy": entropy(self.counts),
            "codebook_dead": self.dead(step).float().mean(),
        }

    def summary(self) -> CodebookUsage:
        """Usage as numbers on the host."""
        dead = (self.counts < 1e-6).float().mean().item()
        return CodebookUsage(self.counts.clone(), perplexity(self.counts).item(), dead)

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "last_used": self.last_used}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])
        self.last_used.copy_(state["last_used"])

    def place(self, device: torch.device) -> None:
        self.counts, self.last_used = self.counts.to(device), self.last_used.to(device)
