"""The weights that a run starts with, taken from a checkpoint of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vlscale.errors import UserError
from vlscale.interop.export import read_tensors
from vlscale.nn.vision import resize_positions

_INSIDE = "system."
"""Before the names of a system in the weights of one with a head."""


@runtime_checkable
class Headed(Protocol):
    """A system with something new on it, which may start from the system's parts."""

    system: nn.Module

    def start_head(self) -> None:
        """Called once the system has its weights."""
        ...


def start_from(system: nn.Module, path: Path) -> None:
    """Give a system, or the one inside a headed one, the weights of `model.safetensors`, strictly both ways.

    Tables of positions are resized to another image size (bicubic, as ALBEF's release does from 256 to 384 pixels).

    Raises:
        UserError: names or shapes differ.
    """
    inner: nn.Module = system.system if isinstance(system, Headed) else system
    tensors = read_tensors(path)
    if any(name.startswith(_INSIDE) for name in tensors):
        tensors = {name.removeprefix(_INSIDE): value for name, value in tensors.items() if name.startswith(_INSIDE)}
    own = inner.state_dict()
    try:
        inner.load_state_dict({name: _fitted(name, value, own) for name, value in tensors.items()}, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: does not fit the recipe's system: {' '.join(lines[1:3])[:300]}") from None
    if isinstance(system, Headed):
        system.start_head()


def _fitted(name: str, value: Tensor, own: dict[str, Tensor]) -> Tensor:
    if name.endswith("pos_embed") and name in own and own[name].shape != value.shape:
        side = round((own[name].shape[1] - 1) ** 0.5)
        return resize_positions(value, (side, side))
    return value
