"""Writing to parameters outside autograd: codes revived, codebooks initialised.

ZeRO-1/2 overwrites a parameter from its fp32 master at the next step, so a write goes to both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class EngineWriter:
    """`ParameterWriter` under DeepSpeed's ZeRO-1/2: every rank makes the same calls in the same order."""

    @torch.no_grad()
    def read(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 master, put together from the ranks' parts; a frozen parameter's own value."""
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        return parameter.detach().float().clone() if value is None else value

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace the parameter and its fp32 master."""
        from deepspeed.utils import safe_set_full_fp32_param

        value = value.detach().to(parameter.device, torch.float32)
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)

    @torch.no_grad()
    def reset_moments(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Zero Adam's moments of the rows where `rows` ([parameter.shape[0]] bool) is true; after the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        keep = (~rows).to(parameter.device, torch.float32).view(-1, *[1] * (parameter.ndim - 1))
        for key in _MOMENTS:
            moment = safe_get_full_optimizer_state(parameter, key)
            safe_set_full_optimizer_state(parameter, moment * keep, key)


class PlainWriter:
    """`ParameterWriter` for a plain torch optimizer, or none."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().float().clone()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    @torch.no_grad()
    def reset_moments(self, parameter: nn.Parameter, rows: Tensor) -> None:
        state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
        for key in _MOMENTS:
            if key in state:
                state[key][rows] = 0
