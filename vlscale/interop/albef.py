"""Weights of ALBEF's public pre-training checkpoints. The names are data: `albef_keys.json`.

`renamed` maps a name, or a prefix that ends in a dot; `layers` is the prefix of the BERT layers, of which the first
belong to the text encoder and the rest to the fusion encoder; `taught` are the parts with a momentum copy, whose name
ends in `_m`; `constant` and `tied` entries are stored there and not here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import UserError
from vlscale.nn.vision import resize_positions
from vlscale.systems.albef import Albef


def load_albef_weights(system: Albef, state_dict: dict[str, Tensor]) -> None:
    """Load student, teacher, queues and their pointer from the release's pre-training `state_dict`, strictly.

    Position tables of another resolution are resized as the release does.

    Raises:
        UserError: an entry is missing, unknown or of another shape, or tied entries differ.
    """
    check_tied(state_dict, _keys()["tied"])
    text_layers = len(system.text_encoder.layer)
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for name in our_names(key, text_layers):
            found[name] = value
    own, carried = system.state_dict(), system.carried_state()
    fitting = fitted(found, own | carried, system.grid)
    system.load_state_dict({name: fitting[name] for name in own})
    system.load_carried_state({name: fitting[name] for name in carried})


def fitted(found: dict[str, Tensor], expected: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The checkpoint's tensors by name here, as the expected ones want them: position tables resized to the grid.

    Raises:
        UserError: an entry is missing, unknown or of another shape.
    """
    _check_names(expected, found)
    fitting: dict[str, Tensor] = {}
    for name, value in expected.items():
        given = found[name]
        if name.endswith("vit.pos_embed") and given.shape != value.shape:
            given = resize_positions(given, grid)
        if given.shape != value.shape:
            shapes = f"expected {tuple(value.shape)}, found {tuple(given.shape)}"
            raise UserError(f"ALBEF checkpoint: {name}: {shapes}; the recipe's sizes must be the checkpoint's")
        fitting[name] = given
    return fitting


def our_names(key: str, text_layers: int) -> list[str]:
    """Names here of an entry of the release; none for entries that are not stored here.

    Raises:
        UserError: the release has no such entry.
    """
    keys = _keys()
    if key in keys["carried"]:
        return keys["carried"][key]
    part, _, rest = key.partition(".")
    if part.endswith("_m") and part[:-2] in keys["taught"]:
        return [f"teacher.{name}" for name in our_names(f"{part[:-2]}.{rest}", text_layers)]
    if key in keys["constant"] or key in keys["tied"]:
        return []
    if key.startswith(keys["layers"]):
        number, _, rest = key.removeprefix(keys["layers"]).partition(".")
        index = int(number)
        if index < text_layers:
            return [f"text_encoder.layer.{index}.{rest}"]
        return [f"fusion_encoder.layer.{index - text_layers}.{rest}"]
    for theirs, ours in keys["renamed"].items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return [ours + key.removeprefix(theirs)]
    raise UserError(f"ALBEF checkpoint: {key} is no entry of a pre-training checkpoint of the public release")


def _check_names(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise UserError(f"ALBEF checkpoint: {missing[0]} and {len(missing) - 1} more are missing; is the depth right?")
    if unknown:
        raise UserError(
            f"ALBEF checkpoint: {unknown[0]} and {len(unknown) - 1} more have no place; is the depth right?"
        )


def check_tied(state_dict: dict[str, Tensor], tied: dict[str, str]) -> None:
    """`tied` maps copies to what they copy; so do the teacher's, whose part's name ends in `_m`.

    Raises:
        UserError: a copy differs.
    """
    for copy, original in tied.items():
        for suffix in ("", "_m"):
            pair = [name.replace(".", f"{suffix}.", 1) for name in (copy, original)]
            if all(name in state_dict for name in pair) and not torch.equal(*(state_dict[name] for name in pair)):
                raise UserError(f"ALBEF checkpoint: {pair[0]} differs from {pair[1]}, but they are one parameter here")


@cache
def _keys() -> dict[str, Any]:
    return json.loads((resources.files("vlscale.interop") / "albef_keys.json").read_text(encoding="utf-8"))
