"""How a system writes to its own parameters outside autograd."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class ParameterWriter(Protocol):
    """Writes to parameters outside autograd so that the optimizer's fp32 master follows (see `engine/build.py`).

    Every rank calls the same methods in the same order.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter in fp32."""
        ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace the whole parameter."""
        ...

    def reset_moments(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Zero the optimizer's moments of the rows where `rows` ([parameter.shape[0]] bool) is true."""
        ...
