"""How codes are started and kept alive; every codebook has these keys."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from vlscale.config.section import Section, Share


class Upkeep(Section):
    """Start and revival of a codebook's codes."""

    init: Literal["kmeans", "random"] = "random"
    init_step: PositiveInt = 100
    """Step after which k-means of its batch's features replaces the random codes."""
    revive_after: NonNegativeInt = 0
    """A code unused for so many steps is re-seeded from a feature of the batch; 0 switches revival off."""
    revive_until: Share = 0.7
    """Share of the steps after which no code is revived any more: revival moves what codes mean."""
