"""SOHO's visual dictionary: codes that follow the features by moving averages, without gradient (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.codebooks.nearest import nearest_codes
from vlscale.codebooks.protocol import CodebookUsage
from vlscale.codebooks.upkeep import Upkeep
from vlscale.config import Dictionary
from vlscale.errors import UserError
from vlscale.nn.precision import full_precision

LAPLACE = 1e-5
"""Added to every moving count of `update: release`."""
ZERO_NORM = 1e-3
"""A code whose length is at most this share of the longest code's counts as zero."""


class Quantised(NamedTuple):
    """Features replaced by their codes."""

    values: Tensor
    """[M, N, D] float32: exactly the codes, with the features' gradient (eq. 5)."""
    indices: Tensor
    """[M, N] int64, of the codes as they were before this forward."""


class VisualDictionary(nn.Module):
    """K codes of width D in the buffer `codes`, fp32, N(0, 1) at the start; no gradient reaches them.

    `update: paper` reads the codes in a training forward, adds up what it saw, and moves the codes in `after_step`
    (eq. 4): so many forwards with one `after_step` are one update from all their features. `update: release` moves the
    codes inside every training forward. Nothing moves in evaluation mode.

    A step that is skipped has no `after_step`: call `begin(step)` with the number of the step before every forward, and
    what was added up in a step with another number is dropped. The forwards of one step share it.

    Buffers of `release` alone: `moving_counts` [K], `moving_sums` [K, D], `total_counts` [K], all zero at the start.
    """

    codes: Tensor
    moving_counts: Tensor
    moving_sums: Tensor
    total_counts: Tensor

    def __init__(self, options: Dictionary, width: int) -> None:
        """
        Raises:
            UserError: a momentum of 1, with which no code ever moves.
        """
        super().__init__()
        self.options = options
        self.decay = options.decay
        _check_momentum(options)
        self.register_buffer("codes", torch.randn(options.size, width))
        if options.update == "release":
            self.register_buffer("moving_counts", torch.zeros(options.size))
            self.register_buffer("moving_sums", torch.zeros(options.size, width))
            self.register_buffer("total_counts", torch.zeros(options.size))
        self.upkeep = Upkeep(options)
        self.tracker = self.upkeep.tracker
        """Goes with the system's `carried_state`."""
        self._pending: Tensor | None = None
        self._step: int | None = None

    def forward(self, features: Tensor, valid: Tensor) -> Quantised:
        """Nearest codes, eq. 2, 3 and 5; in training also what the update needs (see the class).

        Args:
            features: [M, N, D], any floating type.
            valid: [M, N] bool, false where a cell is padding: that moves no code, except with `update: release`.
        """
        indices = self.assign(features)
        with full_precision(features):
            features = features.float()
            if self.training:
                self._observe(features.detach(), indices, valid)
            # Zero with a gradient of one: the value stays exactly the code.
            values = F.embedding(indices, self.codes) + (features - features.detach())
        return Quantised(values, indices)

    def assign(self, features: Tensor) -> Tensor:
        """Nearest code, eq. 2; features [..., D] → [...] int64, in fp32."""
        return nearest_codes(features, self.codes)

    def begin(self, step: int) -> None:
        """Before every training forward of step `step`: drops what a step of another number left, as a skipped one."""
        if step != self._step:
            self.discard()
        self._step = step

    def discard(self) -> None:
        """Forget what the forwards since the last `after_step` added up."""
        self._pending = None

    @torch.no_grad()
    def after_step(self, step: int, fraction: float = 0.0) -> None:
        """Eq. 4 with `update: paper`, and the usage; once per optimizer step, the same on every rank.

        Args:
            step: number of the step just taken.
            fraction: share of the run done before it; revival ends with `revive_until`.
        """
        pending, self._pending = self._pending, None
        if pending is None:  # no training forward has quantised, on any rank: fine-tuning takes the features
            return
        if self.options.update == "paper":
            pending = distributed.all_reduce_sum(pending)
            self._move_used_codes(pending)
        self.tracker.update(pending[:, -1], step)
        if self.options.update == "paper":
            self.upkeep.refresh(self.codes, step, fraction, _InPlace())

    def metrics(self, step: int) -> dict[str, Tensor]:
        """Scalars to log, on the device: the tracker's, and `codebook_zero`, the share of codes of (almost) no length.

        Such codes come from `update: release`, which starts its sums at zero: a code that no feature of the first
        forward is nearest to becomes the zero vector.
        """
        lengths = self.codes.norm(dim=1)
        zero = (lengths <= ZERO_NORM * lengths.max()).float().mean()
        return {**self.tracker.metrics(step), "codebook_zero": zero}

    def usage(self) -> CodebookUsage:
        """Recent usage in training."""
        return self.tracker.summary()

    @torch.no_grad()
    def _observe(self, features: Tensor, indices: Tensor, valid: Tensor) -> None:
        if self.options.update == "release":
            totals = self._totals(features, indices, torch.ones_like(valid))
            totals = distributed.all_reduce_sum(totals)
            self._move_all_codes(totals)
            totals = totals[:, -1:]  # all that the tracker needs
        else:
            totals = self._totals(features, indices, valid)
            self.upkeep.offer(_valid_rows(features, valid))
        self._pending = totals if self._pending is None else self._pending + totals

    def _totals(self, features: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
        """Per code the sum of its features and, in the last column, their number; [K, D + 1], one tensor to reduce."""
        size = len(self.codes)
        rows = torch.where(valid, indices, size).flatten()  # padding goes to a row that is cut off, whatever it holds
        counted = F.pad(features.flatten(0, 1), (0, 1), value=1.0)  # [n, D + 1]
        return counted.new_zeros(size + 1, counted.shape[1]).index_add_(0, rows, counted)[:size]

    def _move_used_codes(self, totals: Tensor) -> None:
        """Eq. 4, for codes that have features."""
        sums, counts = totals[:, :-1], totals[:, -1:]
        gamma = self.options.gamma
        moved = gamma * self.codes + (1 - gamma) * sums / counts.clamp(min=1)
        self.codes.copy_(torch.where(counts > 0, moved, self.codes))

    def _move_all_codes(self, totals: Tensor) -> None:
        """The release's update: moving sums over moving counts, smoothed, for every code."""
        sums, counts = totals[:, :-1], totals[:, -1]
        self.total_counts.add_(counts)
        self.moving_counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.moving_sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        everything = self.moving_counts.sum()
        shares = (self.moving_counts + LAPLACE) / (everything + len(self.codes) * LAPLACE)
        self.codes.copy_(self.moving_sums / (shares * everything)[:, None])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device, stay in fp32: native half precision would round a small step of eq. 4 away."""

        def moved_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(moved_only, recurse)


class _InPlace:
    """`ParameterWriter` for a buffer: no optimizer knows it."""

    def read(self, codes: Tensor) -> Tensor:
        return codes.clone()

    def write(self, codes: Tensor, value: Tensor) -> None:
        codes.copy_(value)

    def reset_moments(self, codes: Tensor, rows: Tensor) -> None:
        pass


def _valid_rows(features: Tensor, valid: Tensor) -> Tensor:
    """[M, N, D] → [M · N, D] without the padding, in whose place valid rows are repeated: a shape known beforehand."""
    flat, wanted = features.flatten(0, 1), valid.flatten()
    order = torch.argsort(~wanted, stable=True)
    rows = torch.arange(len(flat), device=flat.device) % wanted.sum().clamp(min=1)
    return flat[order[rows]]


def _check_momentum(options: Dictionary) -> None:
    key = "gamma" if options.update == "paper" else "decay"
    if getattr(options, key) == 1:
        raise UserError(f"system.dictionary.{key}: 1 leaves every code as it started: use less than 1")
