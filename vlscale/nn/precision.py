"""Where autocast must not reach: similarities, softmaxes over the queue and losses run in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """Context in which operations on `like`'s device run in the precision of their inputs.

    Inputs that autocast already made half must still be cast by the caller: `x.float()`.
    """
    return torch.autocast(like.device.type, enabled=False)
