"""What every codebook answers, whatever it is learned by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CodebookUsage:
    """How a codebook is used."""

    counts: Tensor
    """[K] float32, how often each code was chosen recently (an average over steps) or in a data set."""
    perplexity: float
    dead: float
    """Share of the codes that were never chosen."""


@runtime_checkable
class Codebook(Protocol):
    """Whatever it is learned by, a codebook answers these."""

    @property
    def codes(self) -> Tensor:
        """[K, d] float32."""
        ...

    def assign(self, features: Tensor) -> Tensor:
        """Index of the code of every feature; [..., d] → [...] int64."""
        ...

    def usage(self) -> CodebookUsage:
        """Recent usage in training."""
        ...
