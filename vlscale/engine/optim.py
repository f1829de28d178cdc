"""AdamW with two named groups: weights decay; biases, norms, tables of positions and codes don't."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlscale.config import Train

_SPARED = {"cls_token", "mask_token", "pos_embed", "position_embeddings", "temperature", "codebook"}
"""A parameter with one of these in its dotted name is not decayed."""


def parameter_groups(system: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in groups `decay` and `no_decay`; an empty group is left out (ZeRO refuses one)."""
    spared_by_system = system.no_weight_decay()  # type: ignore[operator]
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in system.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name in spared_by_system or not _SPARED.isdisjoint(name.split("."))
        groups["no_decay" if spared else "decay"].append(parameter)
    decay = {"decay": weight_decay, "no_decay": 0.0}
    return [
        {"name": name, "params": members, "weight_decay": decay[name]} for name, members in groups.items() if members
    ]


def build_optimizer(system: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW of torch, fused: DeepSpeed's own compiles kernels for 90 s, and foreach is slower on a CPU."""
    groups = parameter_groups(system, train.weight_decay)
    return torch.optim.AdamW(groups, lr=train.warmup_lr, betas=train.betas, eps=train.eps, fused=True)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
