"""A system's parameters and buffers on a GPU that is not there."""

from __future__ import annotations

import torch
from torch import nn


def put_on_fake_gpu(module: nn.Module) -> None:
    """Replace parameters and buffers by stand-ins; called under FakeTensorMode."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cuda")
                one._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty_like(buffer, device="cuda")
