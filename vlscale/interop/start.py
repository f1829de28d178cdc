"""The weights that a run starts with, taken from a checkpoint of another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.export import read_tensors
from vlscale.nn.vision import resize_positions

_INSIDE = "system."
"""Before the names of a system in the weights of one with a head."""
_TABLES = ("pos_embed", "query_positions")
"""Ends of the names of position tables."""


@runtime_checkable
class Headed(Protocol):
    """A module `system` with something new on it, which may start from the system's parts."""

    def start_head(self) -> None:
        """Called once the system has its weights."""
        ...


@runtime_checkable
class Carrying(Protocol):
    """A system with a teacher, which goes on from that of the other run."""

    def carried_state(self) -> dict[str, Tensor]: ...

    def start_carried(self, state: Mapping[str, Tensor]) -> None:
        """Called once the system has its weights, with the state that lies beside them, or as much as there is."""
        ...


def start_from(system: nn.Module, path: Path) -> None:
    """Give a system, or the one inside a headed one, the weights of `model.safetensors`, strictly both ways.

    Its teacher goes on from the one that was saved beside them. Tables of positions are resized to another image size
    (bicubic, as ALBEF's release does from 256 to 384 pixels).

    Raises:
        UserError: names or shapes differ.
    """
    inner = system.get_submodule("system") if isinstance(system, Headed) else system
    tensors = read_tensors(path)
    if any(name.startswith(_INSIDE) for name in tensors):
        tensors = {name.removeprefix(_INSIDE): value for name, value in tensors.items() if name.startswith(_INSIDE)}
    own = inner.state_dict()
    try:
        inner.load_state_dict({name: _fitted(name, value, own) for name, value in tensors.items()}, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: does not fit the recipe's system: {' '.join(lines[1:3])[:300]}") from None
    if isinstance(inner, Carrying):
        carried, known = path.with_name(layout.CARRIED), inner.carried_state()
        given = read_tensors(carried) if carried.is_file() else {}
        inner.start_carried({name: _fitted(name, value, known) for name, value in given.items()})
    if isinstance(system, Headed):
        system.start_head()


def _fitted(name: str, value: Tensor, own: dict[str, Tensor]) -> Tensor:
    """A table of positions of square images, [1, 1 + n², D] or [n², D] or [1 + n², D], resized where it has to be."""
    if not name.endswith(_TABLES) or name not in own or own[name].shape == value.shape:
        return value
    rows, wanted = value.shape[-2], own[name].shape[-2]
    side, extra = math.isqrt(wanted), wanted - math.isqrt(wanted) ** 2
    if extra > 1 or rows - math.isqrt(rows) ** 2 != extra:
        return value  # no such table: refused by its shape
    table = value.reshape(1, rows, -1)
    resized = resize_positions(table if extra else F.pad(table, (0, 0, 1, 0)), (side, side))
    return resized[:, 1 - extra :].reshape(own[name].shape[:-1] + value.shape[-1:])
