"""Weights of SOHO's public checkpoints, pre-trained or tuned for VQA. The names are data: `soho_keys.json`.

`renamed` maps a name, or a prefix that ends in a dot; the longest that fits counts. `vqa` is the head that only a tuned
checkpoint has, `not_in_vqa` what such a one lacks. `constant` and `tied` entries are stored there and not here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import UserError
from vlscale.nn.heads import AnswerHead
from vlscale.systems.soho import Soho


def load_soho_weights(system: Soho, state_dict: dict[str, Tensor]) -> None:
    """Load every parameter and buffer from the release's pre-training `state_dict`, strictly.

    The recipe must say what the release does: `neck.kind` gated (or sum), `dictionary.update: release`,
    `mvm.head: cosine`. The dictionary's usage, which the release does not keep, starts anew.

    Raises:
        UserError: an entry is missing, unknown or of another shape, or tied entries differ.
    """
    system.load_state_dict(_fitted(_found(state_dict), system.state_dict()))


def load_soho_vqa(system: Soho, head: AnswerHead, state_dict: dict[str, Tensor]) -> None:
    """Load what the release's VQA model has: backbone, neck, transformer and the head over answers, strictly.

    The recipe must say what that model is: `neck.kind: sum` and `dictionary.use: false`, since fine-tuning reads the
    features that a dictionary would name. What VQA doesn't train (ITM head, mask embedding) keeps its values.

    Raises:
        UserError: an entry is missing, unknown or of another shape.
    """
    prefix = "answer_head."
    own = {name: value for name, value in system.state_dict().items() if not name.startswith(_untuned())}
    heads = {prefix + name: value for name, value in head.state_dict().items()}
    fitting = _fitted(_found(state_dict), own | heads)
    system.load_state_dict(system.state_dict() | {name: fitting[name] for name in own})
    head.load_state_dict({name.removeprefix(prefix): fitting[name] for name in heads})


def _found(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for copy, original in _keys()["tied"].items():
        if copy in state_dict and not torch.equal(state_dict[copy], state_dict[original]):
            raise UserError(f"SOHO checkpoint: {copy} differs from {original}, but they are one parameter here")
    return {name: value for key, value in state_dict.items() if (name := our_name(key)) is not None}


def _fitted(found: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in own.keys() ^ found.keys():
        where = "is missing" if name in own else "has no place"
        raise UserError(f"SOHO checkpoint: {name} {where}; are neck, dictionary, mvm and depth the checkpoint's?")
    for name, value in own.items():
        if found[name].numel() != value.numel():
            shapes = f"expected {tuple(value.shape)}, found {tuple(found[name].shape)}"
            raise UserError(f"SOHO checkpoint: {name}: {shapes}; the recipe's sizes must be the checkpoint's")
    return {name: found[name].view_as(value) for name, value in own.items()}


def our_name(key: str) -> str | None:
    """Name here of an entry of the release; None for entries that are not stored here.

    Raises:
        UserError: the release has no such entry.
    """
    keys = _keys()
    if key in keys["constant"] or key in keys["tied"]:
        return None
    renamed = keys["renamed"] | keys["vqa"]
    for theirs in sorted(renamed, key=len, reverse=True):
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return str(renamed[theirs] + key.removeprefix(theirs))
    raise UserError(f"SOHO checkpoint: {key} is no entry of a checkpoint of the public release")


def _untuned() -> tuple[str, ...]:
    return tuple(_keys()["not_in_vqa"])


@cache
def _keys() -> dict[str, Any]:
    return json.loads((resources.files("vlscale.interop") / "soho_keys.json").read_text(encoding="utf-8"))
