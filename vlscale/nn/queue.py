"""A ring of past features that serve as negatives (MoCo; ALBEF, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EMPTY = -100
"""Id of a column that no image has filled yet; images have ids from 0 on."""


class FeatureQueue:
    """The last `size` features, fp32, [d, size]; random unit vectors at the start.

    Not an `nn.Module`: its owner carries `state()` and calls `place(device)`. The pointer lives on the host, where it
    is known without asking the device. Ranks stay equal by pushing the same gathered features.
    """

    def __init__(self, dim: int, size: int, seed: int) -> None:
        """`seed` makes the start equal on every rank, and different from that of another queue."""
        self.features = _random_unit_columns(dim, size, seed)
        self.pointer = 0

    @property
    def size(self) -> int:
        return self.features.shape[1]

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Write features [n, d] over the oldest ones, in place, wrapping around. Call it after the backward pass."""
        if self.size == 0:
            return
        kept, columns = _newest(features, self.pointer, self.size)
        self.features.index_copy_(1, columns, kept.T.to(self.features.dtype))
        self.pointer = (self.pointer + features.shape[0]) % self.size

    def place(self, device: torch.device) -> None:
        """Move the features to `device`."""
        self.features = self.features.to(device)

    def state(self) -> dict[str, Tensor]:
        """`features` [d, size] fp32 (not a copy) and `pointer` [1] int64."""
        return {"features": self.features, "pointer": torch.tensor([self.pointer])}

    def load_state(self, features: Tensor, pointer: Tensor) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: the shape differs, or the pointer is outside.
        """
        if features.shape != self.features.shape:
            raise ValueError(f"queue: expected {tuple(self.features.shape)}, found {tuple(features.shape)}")
        position = int(pointer)
        if not 0 <= position < self.size:
            raise ValueError(f"queue: the pointer {position} is outside of its {self.size} columns")
        self.features.copy_(features)
        self.pointer = position


class IdQueue:
    """Image ids of the columns of a `FeatureQueue`, so that a past caption of the same image is a right answer.

    ALBEF's retrieval fine-tuning. Empty at the start, also where the features are not: nobody knows whose they are. It
    is pushed when the features are, so one pointer serves both; like them it is carried by its owner.
    """

    def __init__(self, size: int) -> None:
        self.ids = torch.full((size,), EMPTY)
        """[Q] int64."""
        self.pointer = 0

    @torch.no_grad()
    def push(self, ids: Tensor) -> None:
        """Write ids [n] int64 over the oldest ones, in place, wrapping around."""
        if len(self.ids) == 0:
            return
        kept, columns = _newest(ids, self.pointer, len(self.ids))
        self.ids.index_copy_(0, columns, kept)
        self.pointer = (self.pointer + len(ids)) % len(self.ids)

    def place(self, device: torch.device) -> None:
        """Move the ids to `device`."""
        self.ids = self.ids.to(device)

    def state(self) -> dict[str, Tensor]:
        """`ids` [Q] int64 (not a copy) and `pointer` [1] int64."""
        return {"ids": self.ids, "pointer": torch.tensor([self.pointer])}

    def load_state(self, ids: Tensor, pointer: Tensor) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: the shape differs, or the pointer is outside.
        """
        if ids.shape != self.ids.shape:
            raise ValueError(f"ids of a queue: expected {tuple(self.ids.shape)}, found {tuple(ids.shape)}")
        position = int(pointer)
        if not 0 <= position < len(self.ids):
            raise ValueError(f"ids of a queue: the pointer {position} is outside of its {len(self.ids)} columns")
        self.ids.copy_(ids)
        self.pointer = position


def _newest(rows: Tensor, pointer: int, size: int) -> tuple[Tensor, Tensor]:
    """The last `size` of the rows, and the column of the ring that each is written to."""
    skipped = max(0, rows.shape[0] - size)  # they would be overwritten at once
    kept = rows[skipped:]
    return kept, (pointer + skipped + torch.arange(kept.shape[0], device=rows.device)) % size


def _random_unit_columns(dim: int, size: int, seed: int) -> Tensor:
    if torch.get_default_device().type == "meta":  # a dry run builds nothing big
        return torch.empty(dim, size)
    return F.normalize(torch.randn(dim, size, generator=torch.Generator().manual_seed(seed)), dim=0)
