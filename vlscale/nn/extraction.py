"""What all region extractors share: their specification, the hash of their weights, and the results' last steps."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.data.regions import Regions
from vlscale.data.sample import Sample
from vlscale.errors import UserError

_log = logging.getLogger(__name__)

SCORE = 0.05
"""A detection below it is none."""
DETECTIONS = 100
"""At most so many per image, the best."""
LONGEST = 100
"""Times that an image may be longer than wide; beyond, resizing in its aspect ratio would leave no pixel."""

RANDOM = "random"
"""In place of a weights file: none. It has to be asked for."""

_CELLS = re.compile(r"@([1-9][0-9]*)x([1-9][0-9]*)$")
_OPTION = re.compile(r",(?=[a-z]+=)")
_RECIPE_KEY = re.compile(r"^system\.backbone(\.\w+)?: ")


@dataclass(frozen=True, slots=True)
class Spec:
    """`KIND:MODEL[@RxC][,key=value…]`, taken apart."""

    text: str
    """As it was written."""
    kind: str
    model: str
    cells: tuple[int, int] | None = None
    """Rows and columns of a grid."""
    options: dict[str, str] = field(default_factory=dict)

    def check_options(self, known: Collection[str]) -> None:
        """Refuse options that this kind doesn't read.

        Raises:
            UserError: there is one.
        """
        for key in self.options:
            if key not in known:
                has = f"it has {', '.join(sorted(known))}" if known else "it has none"
                raise UserError(f"{self.text}: {self.kind} has no option {key!r}; {has}")


def parse_spec(text: str) -> Spec:
    """Take a specification apart; `@RxC` is looked for in kinds that make grids alone, for folders may have an @ too.

    Raises:
        UserError: there is no kind or no model in it.
    """
    body, *options = _OPTION.split(text)
    kind, _, model = body.partition(":")
    cells = _CELLS.search(model) if "grid" in kind.split("+") else None
    if cells is not None:
        model = model[: cells.start()]
    if not kind or not model:
        raise UserError(f"{text or '(nothing)'}: expected KIND:MODEL, such as grid:resnet50@7x7")
    return Spec(
        text,
        kind,
        model,
        None if cells is None else (int(cells[1]), int(cells[2])),
        dict(option.split("=", 1) for option in options),
    )


@contextmanager
def errors_of(spec: Spec) -> Iterator[None]:
    """Around what complains in a recipe's words: there is no recipe here, so the specification takes its place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{spec.text}: {_RECIPE_KEY.sub('', str(error))}") from None


def warn_of_random_weights(spec: Spec) -> None:
    """Say it loudly: nothing downstream would notice."""
    _log.warning("%s: RANDOM weights, as asked for: the regions' features mean nothing; for trials only", spec.text)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names (sorted), dtypes, shapes and bytes of a state dict, wherever its tensors are; 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def equal_shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that can be stacked, in order of first appearance.

    Images of one shape go through a network together, without padding: what is found in an image doesn't depend on
    its neighbours.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())


def workable(image: Tensor) -> Tensor:
    """uint8 [3, H, W] → the same, its short side stretched where the long one is over LONGEST times as long.

    Boxes are shares of the sides, so they stay right.
    """
    height, width = image.shape[1:]
    rows, columns = max(height, -(-width // LONGEST)), max(width, -(-height // LONGEST))
    if (rows, columns) == (height, width):
        return image
    return F.interpolate(image[None], size=(rows, columns), mode="nearest")[0]


def to_regions(
    features: Tensor, boxes: Tensor, confidences: Tensor, tags: Sequence[str], spec: Spec, sample: Sample
) -> Regions:
    """Regions on the CPU, boxes cut to the image.

    Args:
        features: [R, d], any float.
        boxes: [R, 4] x1, y1, x2, y2 as shares.
        confidences: [R].
        tags: R of them.

    Raises:
        UserError: a feature is no number in float16: such weights are broken or meant for another model.
    """
    kept = features.detach().to("cpu", torch.float16)
    if not bool(kept.isfinite().all()):
        raise UserError(
            f"{spec.text}: sample {sample.id}: features beyond float16; are these the weights of this model?"
        )
    return Regions(kept, boxes.detach().cpu().float().clamp(0, 1), confidences.detach().cpu().float(), tuple(tags))
