"""How learned codes are started, watched and revived: k-means once, usage every step, dead codes now and then.

Whatever the codes mean, each is a row of one parameter. k-means start and revival of unused codes are needed both for
codes that features are quantised to: from random codes without revival nearly all die.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.codebooks.health import UsageTracker, count_codes, kmeans
from vlscale.nn.writer import ParameterWriter

REVIVE_EVERY = 10
"""Steps between two looks for dead codes."""
DEAD_AFTER = 100
"""Steps without use that count as dead in the log where revival is off."""
KMEANS_POINTS = 16
"""Features per code that k-means sees at most."""


class UpkeepOptions(Protocol):
    """What the options of a codebook say of its upkeep; see `CodebookOptions`."""

    size: int
    init: Literal["kmeans", "random"]
    init_step: int
    revive_after: int
    revive_until: float


class Upkeep:
    """Of one parameter of codes [K, d]. Equal on every rank; its statistics go with the system's `carried_state`.

    Plain object: registered buffers would be cast by native fp16.
    """

    def __init__(self, options: UpkeepOptions) -> None:
        self.options = options
        self.tracker = UsageTracker(options.size, options.revive_after or DEAD_AFTER)
        self._counts: Tensor | None = None
        self._candidates: Tensor | None = None

    @torch.no_grad()
    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Remember what a training forward saw, until `after_step`; features [n, d], indices [n]."""
        counts = count_codes(indices, self.options.size)
        self._counts = counts if self._counts is None else self._counts + counts
        self.offer(features)

    def offer(self, features: Tensor) -> None:
        """Features [n, d] that codes may start from, until `refresh`; the last ones offered count."""
        self._candidates = features.detach().float()

    @torch.no_grad()
    def after_step(self, codes: nn.Parameter, step: int, fraction: float, writer: ParameterWriter) -> None:
        """Usage, k-means start and revival, the same on every rank; `step` counts the step just taken."""
        if self._counts is None or self._candidates is None:
            return
        self.tracker.update(distributed.all_reduce_sum(self._counts), step)
        self._counts = None
        self.refresh(codes, step, fraction, writer)

    @torch.no_grad()
    def refresh(self, codes: Tensor, step: int, fraction: float, writer: ParameterWriter) -> None:
        """k-means start and revival of `codes`, a parameter or whatever the writer writes to."""
        options = self.options
        if options.init == "kmeans" and step == options.init_step:
            parameter = cast(nn.Parameter, codes)
            writer.write(parameter, self._centres(step))
            every = torch.ones(options.size, dtype=torch.bool, device=codes.device)
            writer.reset_moments(parameter, every)
            self.tracker.forget(step)
        elif self._revival_due(step, fraction):
            self._revive(cast(nn.Parameter, codes), step, writer)
        self._candidates = None

    def _centres(self, step: int) -> Tensor:
        points = self._spread(KMEANS_POINTS * self.options.size, step)
        return distributed.broadcast(kmeans(points, self.options.size, seed=step))

    def _revival_due(self, step: int, fraction: float) -> bool:
        options = self.options
        started = options.init != "kmeans" or step > options.init_step
        return bool(options.revive_after) and started and step % REVIVE_EVERY == 0 and fraction < options.revive_until

    def _revive(self, codes: nn.Parameter, step: int, writer: ParameterWriter) -> None:
        """Every dead code becomes a random feature of the batch, the same one on every rank."""
        dead = self.tracker.dead(step)
        candidates = self._spread(self.options.size, step)
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(candidates), (self.options.size,), generator=generator).to(dead.device)
        current = writer.read(codes)
        writer.write(codes, torch.where(dead[:, None], candidates[picks], current))
        writer.reset_moments(codes, dead)
        self.tracker.last_used.masked_fill_(dead, step)

    def _spread(self, count: int, step: int) -> Tensor:
        """At most `count` features of the last micro-batches of all ranks, equal on every rank; [n, d]."""
        assert self._candidates is not None
        local = self._candidates
        share = min(len(local), max(1, count // distributed.world_size()))
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(local), generator=generator)[:share].to(local.device)
        return distributed.gather(local[rows])
