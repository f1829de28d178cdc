"""What every section of the recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, docstrings under fields are their help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
