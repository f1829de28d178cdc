"""Statistics of BatchNorm over several ranks."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlscale import distributed


def average_statistics(module: nn.Module) -> None:
    """Let all ranks have the same running statistics, the mean of theirs, of every BatchNorm that takes some just now.

    Collective, once per optimizer step: a checkpoint keeps the first rank's only.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    distributed.average([buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()])
