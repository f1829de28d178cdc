"""The numbers of one optimizer step, summed on the device and copied to the host once."""

from __future__ import annotations

import math
import signal

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.data.sample import Batch
from vlscale.engine import signals


class Tally:
    """Means over micro-batches and ranks of losses and metrics; counts and names of skipped images; sample ids."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._losses: list[str] = []
        self._micros = 0
        self._skipped: list[str] = []
        self._samples: list[str] = []
        self.skipped_images = 0
        """Of all ranks, once reduced."""
        self.stop: signal.Signals | None = None
        """Signal to end by, once reduced: the same on every rank, whichever of them it came to."""

    def add(self, batch: Batch, total: Tensor, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        """Take in one micro-batch; no host sync."""
        self._micros += 1
        self._losses = list(losses)
        self._skipped += batch.skipped
        self._samples += batch.sample_ids
        for name, value in {"loss": total, **losses, **metrics}.items():
            scalar = torch.as_tensor(value, device=self._device).detach().float()
            self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar

    def reduce(self) -> dict[str, float]:
        """Means by name, the same on every rank; the step's only copy to the host. Collective."""
        counts = torch.tensor([len(self._skipped), *signals.received()], dtype=torch.float32, device=self._device)
        sums = distributed.all_reduce_sum(torch.cat([counts, torch.stack(list(self._sums.values()))])).tolist()
        (skipped, *came), values = sums[: len(counts)], sums[len(counts) :]
        self.skipped_images = round(skipped)
        self.stop = signals.chosen([ranks > 0 for ranks in came])
        parts = self._micros * distributed.world_size()
        return {name: value / parts for name, value in zip(self._sums, values, strict=True)}

    def non_finite(self, row: dict[str, float | int]) -> str:
        """Names and values of the losses that are not finite; empty when all are."""
        names = [name for name in self._losses if not math.isfinite(row[name])]
        return ", ".join(f"{name} {row[name]}" for name in names)

    def gather_skipped(self) -> list[str]:
        """Skipped images of every rank. Collective."""
        return distributed.gather_list(self._skipped)

    def gather_samples(self) -> list[str]:
        """Sample ids of the step on every rank. Collective."""
        return distributed.gather_list(self._samples)
