"""SGD and AdamW in one optimizer: DeepSpeed takes one, and SOHO trains its backbone by another rule than the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

_KINDS = {"sgd": {"momentum"}, "adamw": {"betas", "eps"}}
"""Numbers that a group of each kind must bring, besides `lr` and `weight_decay`."""


class MixedOptimizer(torch.optim.Optimizer):
    """Every group is of `kind` "sgd" or "adamw" and brings its own numbers.

    - `sgd`: g ← g + weight_decay · x, m ← momentum · m + g, x ← x − lr · m; torch.optim.SGD without dampening and
      Nesterov.
    - `adamw`: torch.optim.AdamW, fused.

    A group with `resting` true keeps its parameters and its state to the bit: no step, no decay, no momentum, no count.
    That can't be left to missing gradients: ZeRO fills them with zeros.

    The state of both kinds is `exp_avg`, `exp_avg_sq` (as the parameter) and `step` (float32 scalar), the names that
    DeepSpeed's universal checkpoints ask of every group; SGD keeps its momentum in `exp_avg` and leaves the zeros of
    `exp_avg_sq` alone. A momentum of zeros makes the first step's momentum the gradient, as in torch.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """Groups with `params`, `kind`, `name`, `lr`, `weight_decay`, and `momentum` or `betas` and `eps`.

        Raises:
            ValueError: unknown `kind`, or one of its numbers is missing.
        """
        # `fused`: torch then keeps `step` on the parameters' device when it loads a state.
        super().__init__(groups, {"resting": False, "fused": True})
        for group in self.param_groups:
            missing = {"lr", "weight_decay", *_KINDS.get(group.get("kind", ""), {"kind"})} - group.keys()
            if group.get("kind") not in _KINDS or missing:
                raise ValueError(f"group {group.get('name')}: kind {group.get('kind')}, missing {sorted(missing)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every group that does not rest from its gradients; no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                # At rest too: DeepSpeed links the moments to the parameters once every group has some.
                if not self.state[parameter]:
                    self.state[parameter] = _fresh_state(parameter)
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving and not group["resting"]:
                update = _sgd_step if group["kind"] == "sgd" else _adamw_step
                update(group, moving, [self.state[parameter] for parameter in moving])


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _sgd_step(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    torch._foreach_add_([state["step"] for state in states], 1)
    sgd(
        parameters,
        _gradients(parameters),
        [state["exp_avg"] for state in states],
        fused=True,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _adamw_step(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    adamw(
        parameters,
        _gradients(parameters),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],  # counted inside
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
