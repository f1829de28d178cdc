"""Statistics of BatchNorm over several ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlscale import distributed


def moving_statistics(module: nn.Module) -> list[Tensor]:
    """Running statistics and counts, not copies, of every BatchNorm that takes some just now; a forward moves them."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    return [buffer for norm in norms for buffer in norm.buffers()]


def average_statistics(module: nn.Module) -> None:
    """Let all ranks have the same running statistics, the mean of theirs, of every BatchNorm that takes some just now.

    Collective, once per optimizer step: a checkpoint keeps the first rank's only.
    """
    distributed.average([buffer for buffer in moving_statistics(module) if buffer.is_floating_point()])
