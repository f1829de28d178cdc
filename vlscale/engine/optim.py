"""The optimizer of a recipe: named groups of parameters, their rules, and their rates in a step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlscale.config import Sgd, Train
from vlscale.config.tasks import TaskConfig
from vlscale.engine.mixed import MixedOptimizer
from vlscale.errors import UserError

_SPARED = {"cls_token", "mask_token", "pos_embed", "position_embeddings", "temperature", "codebook"}
"""A parameter with one of these in its dotted name is not decayed."""
_BACKBONE = "backbone"
"""Parameters under this name have groups of their own: they may rest, and be trained by SGD."""
_GROUPS = ("decay", "no_decay", f"{_BACKBONE}_decay", f"{_BACKBONE}_no_decay")
_INSIDE = "system."
"""Before the names of a system's parameters, where a task's head is beside it."""
_LAYER = re.compile(r"(.+\.(?:layer|blocks))\.(\d+)\.")


def parameter_groups(system: nn.Module, train: Train, task: TaskConfig | None = None) -> list[dict[str, Any]]:
    """Trainable parameters in groups, each with its name, kind and numbers; ZeRO refuses an empty group.

    Weights decay; biases, norms, tables of positions and codes don't. `backbone_…` groups are of kind `sgd` where the
    recipe has `train.backbone`, all others of kind `adamw`. These up to four groups are divided further where a task
    has `head_lr` or `layer_decay`: a group whose rate is not the schedule's carries its factor as `scale`.
    """
    spared_by_system = system.no_weight_decay()  # type: ignore[operator]
    named = dict(system.named_parameters())
    scales = rate_factors(list(named), task)
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name in spared_by_system or not _SPARED.isdisjoint(name.split("."))
        part = f"{_BACKBONE}_" if name.removeprefix(_INSIDE).startswith(f"{_BACKBONE}.") else ""
        members.setdefault((part + ("no_decay" if spared else "decay"), scales[name]), []).append(parameter)
    ordered = sorted(members, key=lambda key: (_GROUPS.index(key[0]), -key[1]))
    return [_group(name, scale, members[name, scale], train) for name, scale in ordered]


def rate_factors(names: Sequence[str], task: TaskConfig | None) -> dict[str, float]:
    """By parameter the factor of the learning rate that a task asks for.

    `head_lr` for what is not the system's. `layer_decay` once for every layer that comes after a parameter's own in its
    stack (`….layer.N.…`, `….blocks.N.…`); what stands before a part's first layer, such as embeddings, comes below all.

    Args:
        names: of all parameters, in the order in which a system has them.
    """
    if task is None:
        return dict.fromkeys(names, 1.0)
    head_lr = getattr(task, "head_lr", 1.0)  # retrieval and grounding put nothing on the system
    after = _layers_after([name.removeprefix(_INSIDE) for name in names])
    heads = [1.0 if name.startswith(_INSIDE) else head_lr for name in names]
    return {name: head * task.layer_decay**layers for name, head, layers in zip(names, heads, after, strict=True)}


def build_optimizer(system: nn.Module, train: Train, task: TaskConfig | None = None) -> torch.optim.Optimizer:
    """AdamW of torch, fused: DeepSpeed's own compiles kernels for 90 s, and foreach is slower on a CPU.

    With a backbone it is a `MixedOptimizer`, whose groups can rest and be of two kinds.

    Raises:
        UserError: `train.backbone` is given but the system has no trainable parameter there.
    """
    groups = parameter_groups(system, train, task)
    if any(_is_backbone(group) for group in groups):
        return MixedOptimizer(groups)
    if train.backbone is not None:
        raise UserError("train.backbone: nothing of the system's backbone is trained: remove it")
    return torch.optim.AdamW(groups, fused=True)


def has_backbone(optimizer: Any) -> bool:
    """Whether some groups are the backbone's."""
    return any(_is_backbone(group) for group in optimizer.param_groups)


def set_learning_rate(optimizer: Any, rate: float, backbone: float | None = None, resting: bool = False) -> None:
    """Give every group the rate of this step, times its own factor.

    Args:
        backbone: the rate of the backbone's groups; None: as the others.
        resting: mark the backbone's groups as resting (their rate should be 0 then).
    """
    for group in optimizer.param_groups:
        own = rate
        if _is_backbone(group):
            own = rate if backbone is None else backbone
            group["resting"] = resting
        group["lr"] = own * group.get("scale", 1.0)


def _group(name: str, scale: float, parameters: list[nn.Parameter], train: Train) -> dict[str, Any]:
    rule = train.backbone or train if name.startswith(_BACKBONE) else train
    group: dict[str, Any] = {
        "name": name,
        "params": parameters,
        "lr": rule.warmup_lr * scale,
        "weight_decay": 0.0 if name.endswith("no_decay") else rule.weight_decay,
    }
    if scale != 1:
        group |= {"name": f"{name}_x{scale:.6g}", "scale": scale}
    if isinstance(rule, Sgd):
        return {**group, "kind": "sgd", "momentum": rule.momentum}
    return {**group, "kind": "adamw", "betas": rule.betas, "eps": rule.eps}


def _is_backbone(group: dict[str, Any]) -> bool:
    return group["name"].startswith(_BACKBONE)


def _layers_after(names: Sequence[str]) -> list[int]:
    """Of each parameter the layers that come after it in its stack; all of a stack's for what stands before it."""
    depths: dict[str, int] = {}
    starts: dict[str, int] = {}
    for place, name in enumerate(names):
        if found := _LAYER.match(name):
            stack, layer = found[1], int(found[2])
            depths[stack] = max(depths.get(stack, 0), layer + 1)
            starts.setdefault(stack, place)

    def after(place: int, name: str) -> int:
        if found := _LAYER.match(name):
            return depths[found[1]] - 1 - int(found[2])
        part = name.partition(".")[0]
        return next((depths[s] for s, start in starts.items() if s.partition(".")[0] == part and place < start), 0)

    return [after(place, name) for place, name in enumerate(names)]
