"""The transformer that every system has, with BERT's sizes."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from vlscale.config.section import Section, Share


class Bert(Section):
    """Width, depth apart, and start of BERT-compatible layers."""

    width: PositiveInt = 768
    heads: PositiveInt = 12
    intermediate: PositiveInt = 3072
    """Width of the feed-forward layers."""
    max_positions: PositiveInt = 512
    """Rows of the position table."""
    dropout: Share = 0.1
    """Hidden and attention dropout."""
    norm: Literal["post", "pre"] = "post"
    """`post` is BERT's; `pre` learns faster from scratch."""
    init: str = "random"
    """`random`, or a Hugging Face BERT name or local folder: its first layers and its last ones."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Bert:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one of them")
        return self
