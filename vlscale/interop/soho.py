"""Weights of SOHO's public pre-training checkpoints. The names are data: `soho_keys.json`.

`renamed` maps a name, or a prefix that ends in a dot; the longest that fits counts. `constant` and `tied` entries are
stored there and not here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import UserError
from vlscale.systems.soho import Soho


def load_soho_weights(system: Soho, state_dict: dict[str, Tensor]) -> None:
    """Load every parameter and buffer from the release's pre-training `state_dict`, strictly.

    The recipe must say what the release does: `neck.kind` gated (or sum), `dictionary.update: release`,
    `mvm.head: cosine`. The dictionary's usage, which the release does not keep, starts anew.

    Raises:
        UserError: an entry is missing, unknown or of another shape, or tied entries differ.
    """
    for copy, original in _keys()["tied"].items():
        if copy in state_dict and not torch.equal(state_dict[copy], state_dict[original]):
            raise UserError(f"SOHO checkpoint: {copy} differs from {original}, but they are one parameter here")
    found = {name: value for key, value in state_dict.items() if (name := our_name(key)) is not None}
    own = system.state_dict()
    for name in own.keys() ^ found.keys():
        where = "is missing" if name in own else "has no place"
        raise UserError(f"SOHO checkpoint: {name} {where}; are neck, dictionary, mvm and depth the checkpoint's?")
    for name, value in own.items():
        if found[name].numel() != value.numel():
            shapes = f"expected {tuple(value.shape)}, found {tuple(found[name].shape)}"
            raise UserError(f"SOHO checkpoint: {name}: {shapes}; the recipe's sizes must be the checkpoint's")
    system.load_state_dict({name: found[name].view_as(value) for name, value in own.items()})


def our_name(key: str) -> str | None:
    """Name here of an entry of the release; None for entries that are not stored here.

    Raises:
        UserError: the release has no such entry.
    """
    keys = _keys()
    if key in keys["constant"] or key in keys["tied"]:
        return None
    for theirs in sorted(keys["renamed"], key=len, reverse=True):
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return str(keys["renamed"][theirs] + key.removeprefix(theirs))
    raise UserError(f"SOHO checkpoint: {key} is no entry of a pre-training checkpoint of the public release")


@cache
def _keys() -> dict[str, Any]:
    return json.loads((resources.files("vlscale.interop") / "soho_keys.json").read_text(encoding="utf-8"))
