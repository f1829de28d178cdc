"""Weights of MVPTR's public checkpoints under the names of its parts here. The names are data: `mvptr_keys.json`.

`renamed` maps a name, or a prefix that ends in a dot; the longest that fits counts. Before it, `retrieval` is read for
a retrieval model, whose classifier judges pairs, and `classification` for one whose classifier is wanted as `head`: a
`WordAnswerHead` for VQA, a `ClassHead` for visual entailment. `transposed` matrices multiply from the right there. The
rows of `swapped` ones change places: in pre-training class 0 is the match there, class 1 here. Heads of `tasks` and
`constant` entries have no place here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, Literal

from torch import Tensor

from vlscale.errors import UserError

Kind = Literal["pretrain", "retrieval", "classification", "task"]
"""A pre-training checkpoint, one tuned for retrieval, one for VQA or entailment with its classifier, or the encoder of
one with any task's classifier, which is left out."""


def our_weights(state_dict: dict[str, Tensor], kind: Kind = "pretrain") -> dict[str, Tensor]:
    """The release's tensors as the parts here hold them, by name here; task heads are left out.

    Raises:
        UserError: the release has no such entry.
    """
    named = {key: our_name(key, kind) for key in state_dict}
    return {name: as_ours(key, state_dict[key]) for key, name in named.items() if name is not None}


def our_name(key: str, kind: Kind = "pretrain") -> str | None:
    """Name here of an entry of the release; None for entries without a place here.

    Raises:
        UserError: the release has no such entry.
    """
    keys = _keys()
    renamed = keys["renamed"] | keys.get(kind, {})
    for theirs in sorted(renamed, key=len, reverse=True):
        if _fits(key, theirs):
            return str(renamed[theirs] + key.removeprefix(theirs))
    if any(_fits(key, theirs) for theirs in [*keys["tasks"], *keys["constant"]]):
        return None
    raise UserError(f"MVPTR checkpoint: {key} is no entry of a checkpoint of the public release")


def as_ours(key: str, value: Tensor) -> Tensor:
    """A tensor of the release, or its gradient, laid out as here."""
    keys = _keys()
    if key in keys["transposed"]:
        return value.T.contiguous()
    return value.flip(0) if key in keys["swapped"] else value


def _fits(key: str, theirs: str) -> bool:
    return key == theirs or (theirs.endswith(".") and key.startswith(theirs))


@cache
def _keys() -> dict[str, Any]:
    return json.loads((resources.files("vlscale.interop") / "mvptr_keys.json").read_text(encoding="utf-8"))
