"""The momentum teacher (ALBEF, section 3.3): exponential moving averages of modules, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """fp32 moving averages of named modules.

    Not an `nn.Module` on purpose: a registered teacher would be cast by native half precision, kept by the optimizer's
    engine and dropped by universal checkpoints. Its owner carries `state()` and calls `place(device)`.

    The copies run in evaluation mode: targets come without dropout.
    """

    def __init__(self, students: Mapping[str, nn.Module], momentum: float) -> None:
        self.momentum = momentum
        self._students = dict(students)
        self.modules = {name: _frozen_copy(module) for name, module in students.items()}

    def __getitem__(self, name: str) -> Any:
        """The copy of the module of that name; it has its student's class."""
        return self.modules[name]

    @torch.no_grad()
    def update(self) -> None:
        """p ← m · p + (1 − m) · student's p for every parameter; buffers are copied."""
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for name, module in self.modules.items():
            student = self._students[name]
            for mine, theirs in zip(module.parameters(), student.parameters(), strict=True):
                averages.append(mine)
                current.append(theirs.detach().to(mine.dtype))
            for own, given in zip(module.buffers(), student.buffers(), strict=True):
                own.copy_(given)
        torch._foreach_lerp_(averages, current, 1 - self.momentum)

    @torch.no_grad()
    def copy_students(self) -> None:
        """Start anew from the students' present weights."""
        for name, module in self.modules.items():
            module.load_state_dict(self._students[name].state_dict())

    def place(self, device: torch.device) -> None:
        """Move the copies to `device`."""
        for module in self.modules.values():
            module.to(device)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by `module.name`; not copies."""
        return {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            RuntimeError: a shape differs.
        """
        own = self.state()
        if own.keys() != state.keys():
            raise KeyError(
                f"teacher: missing {sorted(own.keys() - state.keys())}, unknown {sorted(state.keys() - own)}"
            )
        for name, module in self.modules.items():
            module.load_state_dict({key: state[f"{name}.{key}"] for key in module.state_dict()})


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().eval().requires_grad_(False)
