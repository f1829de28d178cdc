"""The optimizer of a recipe: named groups of parameters, their rules, and their rates in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlscale.config import Sgd, Train
from vlscale.engine.mixed import MixedOptimizer
from vlscale.errors import UserError

_SPARED = {"cls_token", "mask_token", "pos_embed", "position_embeddings", "temperature", "codebook"}
"""A parameter with one of these in its dotted name is not decayed."""
_BACKBONE = "backbone"
"""Parameters under this name have groups of their own: they may rest, and be trained by SGD."""
_GROUPS = ("decay", "no_decay", f"{_BACKBONE}_decay", f"{_BACKBONE}_no_decay")


def parameter_groups(system: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups, each with its name, kind and numbers; ZeRO refuses an empty group.

    Weights decay; biases, norms, tables of positions and codes don't. `backbone_…` groups are of kind `sgd` where the
    recipe has `train.backbone`, all others of kind `adamw`.
    """
    spared_by_system = system.no_weight_decay()  # type: ignore[operator]
    members: dict[str, list[nn.Parameter]] = {name: [] for name in _GROUPS}
    for name, parameter in system.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name in spared_by_system or not _SPARED.isdisjoint(name.split("."))
        part = f"{_BACKBONE}_" if name.startswith(f"{_BACKBONE}.") else ""
        members[part + ("no_decay" if spared else "decay")].append(parameter)
    return [_group(name, parameters, train) for name, parameters in members.items() if parameters]


def build_optimizer(system: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW of torch, fused: DeepSpeed's own compiles kernels for 90 s, and foreach is slower on a CPU.

    With a backbone it is a `MixedOptimizer`, whose groups can rest and be of two kinds.

    Raises:
        UserError: `train.backbone` is given but the system has no trainable parameter there.
    """
    groups = parameter_groups(system, train)
    if any(_is_backbone(group) for group in groups):
        return MixedOptimizer(groups)
    if train.backbone is not None:
        raise UserError("train.backbone: nothing of the system's backbone is trained: remove it")
    return torch.optim.AdamW(groups, fused=True)


def has_backbone(optimizer: Any) -> bool:
    """Whether some groups are the backbone's."""
    return any(_is_backbone(group) for group in optimizer.param_groups)


def set_learning_rate(optimizer: Any, rate: float, backbone: float | None = None, resting: bool = False) -> None:
    """Give every group the rate of this step.

    Args:
        backbone: the rate of the backbone's groups; None: as the others.
        resting: mark the backbone's groups as resting (their rate should be 0 then).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        if _is_backbone(group):
            group["lr"] = rate if backbone is None else backbone
            group["resting"] = resting


def _group(name: str, parameters: list[nn.Parameter], train: Train) -> dict[str, Any]:
    rule = train.backbone or train if name.startswith(_BACKBONE) else train
    group = {
        "name": name,
        "params": parameters,
        "lr": rule.warmup_lr,
        "weight_decay": 0.0 if name.endswith("no_decay") else rule.weight_decay,
    }
    if isinstance(rule, Sgd):
        return {**group, "kind": "sgd", "momentum": rule.momentum}
    return {**group, "kind": "adamw", "betas": rule.betas, "eps": rule.eps}


def _is_backbone(group: dict[str, Any]) -> bool:
    return group["name"].startswith(_BACKBONE)
