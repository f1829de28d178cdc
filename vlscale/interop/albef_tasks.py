"""Weights of ALBEF's public fine-tuned checkpoints, by the names of the parts here. The names are data:
`albef_task_keys.json`, read as `albef_keys.json` is.

`fusion` says, for each kind of model, where the layers with cross-attention go. Of a model for two images each pair of
these layers shares what `shared_in_pairs` names: stored twice there, once here. `flat` entries have a row axis there.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlscale.errors import UserError
from vlscale.interop.albef import check_tied, fitted

Kind = Literal["retrieval", "ve", "nlvr", "nlvr_pretrain", "vqa"]
"""What the checkpoint was tuned for; `nlvr_pretrain` is text assignment, which comes before NLVR2."""


def load_task_weights(
    parts: nn.Module, state_dict: dict[str, Tensor], kind: Kind, text_layers: int, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Fill the parts of a fine-tuned model from the release's `state_dict`, strictly.

    Position tables of another resolution are resized as the release does.

    Args:
        parts: has, of the names in `albef_task_keys.json`, those that the kind has: `vision`, `text_encoder`,
            `fusion_encoder` or `paired_encoder`, `class_head`, `decoder` …
        state_dict: the release's.
        kind: of the model.
        text_layers: layers without cross-attention.
        grid: rows and columns of patches.

    Returns:
        What is carried beside the parts, by name here: `teacher.<part>…` for `Teacher.load_state`, the queues'
        features, ids and pointers.

    Raises:
        UserError: an entry is missing, unknown or of another shape, or tied entries differ.
    """
    found = our_weights(state_dict, kind, text_layers)
    own = parts.state_dict()
    carried = {name: value for name, value in found.items() if name.startswith("teacher.") or name in _carried()}
    parts.load_state_dict(fitted({name: found[name] for name in found.keys() - carried.keys()}, own, grid))
    taught = {name: value for name, value in carried.items() if name.startswith("teacher.")}
    students = {name: own[student] for name in taught if (student := name.removeprefix("teacher.")) in own}
    return carried | fitted(taught, students, grid)


def our_weights(state_dict: dict[str, Tensor], kind: Kind, text_layers: int) -> dict[str, Tensor]:
    """The release's tensors by name here.

    Raises:
        UserError: the release has no such entry, or entries that are one parameter here differ.
    """
    check_tied(state_dict, _keys()["tied"])
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for name in our_names(key, kind, text_layers):
            if name in found and not torch.equal(found[name], value):
                raise UserError(f"ALBEF checkpoint: {key} differs from its pair's, but they are one parameter here")
            found[name] = value.flatten() if key in _keys()["flat"] else value
    return found


def our_names(key: str, kind: Kind, text_layers: int) -> list[str]:
    """Names here of an entry of the release; none for entries that are not stored here.

    Raises:
        UserError: the release has no such entry.
    """
    keys = _keys()
    if key in keys["carried"]:
        return list(keys["carried"][key])
    part, _, rest = key.partition(".")
    if part.endswith("_m") and part[:-2] in keys["taught"]:
        return [f"teacher.{name}" for name in our_names(f"{part[:-2]}.{rest}", kind, text_layers)]
    if key in keys["constant"] or key in keys["tied"]:
        return []
    if key.startswith(keys["layers"]):
        number, _, rest = key.removeprefix(keys["layers"]).partition(".")
        return [_layer_name(int(number), rest, kind, text_layers)]
    for theirs, ours in keys["renamed"].items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return [ours + key.removeprefix(theirs)]
    raise UserError(f"ALBEF checkpoint: {key} is no entry of a fine-tuned checkpoint of the public release")


def _layer_name(index: int, rest: str, kind: Kind, text_layers: int) -> str:
    keys = _keys()
    if index < text_layers:
        return f"text_encoder.layer.{index}.{rest}"
    place = index - text_layers
    shared = keys["shared_in_pairs"]
    if kind in shared["kinds"] and rest.startswith(tuple(shared["parts"])):
        place -= place % 2  # the pair's first layer stores them
    return f"{keys['fusion'][kind]}{place}.{rest}"


def _carried() -> set[str]:
    return {name for names in _keys()["carried"].values() for name in names}


@cache
def _keys() -> dict[str, Any]:
    text = (resources.files("vlscale.interop") / "albef_task_keys.json").read_text(encoding="utf-8")
    return json.loads(text)
