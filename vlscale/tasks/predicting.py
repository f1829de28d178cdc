"""Scores of classes for the examples of a split, shared out over the ranks; every rank gets all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.config import Data
from vlscale.data.captions import CaptionEncoder
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.tasks.features import OnProgress, Precision

KEPT = 5
"""Classes of each example that are kept, the best ones: of thousands of answers nobody needs the rest."""


class Predicts(Protocol):
    """A system with a head that chooses among classes or answers."""

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, C] fp32, −inf where a class is no candidate; `batch.images` is float32 and normalised."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """What N examples were answered, on the CPU; rows of images that can't be read hold nothing."""

    read: Tensor
    """[N] bool: an image could be read, and the row counts."""
    best: Tensor
    """[N, k] int64: the classes of the highest scores, best first; of equal ones the first class."""
    shares: Tensor
    """[N, k] float32: their share of a softmax over all C classes."""
    true_share: Tensor
    """[N] float32: that of the true class; nan where it is none of the classes."""
    unreadable: list[str]
    """Images that can't be read: `path: reason`."""


@torch.no_grad()  # not inference mode: what a system keeps from here may be trained through afterwards
def score_examples(
    system: Predicts,
    examples: Sequence[Sample],
    true: Tensor,
    classes: int,
    data: Data,
    tokenizer: TextTokenizer,
    precision: Precision,
    batch_size: int,
    on_progress: OnProgress,
) -> Scored:
    """Ask the system for every example; collective, each rank reads every R-th.

    Args:
        system: in evaluation mode, on the precision's device.
        examples: as `examples_of` gives them, the same on every rank.
        true: [N] int64, number of the true class; −1 where it is not known, or none of the classes.
        classes: how many there are.

    Raises:
        UserError: the checkpoint gives scores that are not finite.
    """
    rank, world = distributed.rank(), distributed.world_size()
    share = [examples[index] for index in range(rank, len(examples), world)]
    encode = CaptionEncoder(data, tokenizer)
    parts = [_nothing(min(KEPT, classes), precision.device)]  # a rank without examples gathers this
    unreadable: list[str] = []
    for loaded in evaluation_batches(share, data, batch_size, tokenizer):
        unreadable += loaded.skipped
        if loaded.sample_ids:
            number = rank + world * loaded.image_ids
            batch = _asked(loaded, [share[index] for index in loaded.image_ids.tolist()], encode, data, precision)
            with precision.autocast():
                scores = system.predict(batch)
            parts.append(_rows(scores.float(), number.to(precision.device), true[number].to(precision.device), classes))
        on_progress("examples", sum(len(part[0]) for part in parts) + len(unreadable), len(share))
    number, best, shares, true_share = (
        distributed.gather_rows(torch.cat(column)).cpu() for column in zip(*parts, strict=True)
    )
    if shares.isnan().any():
        raise UserError("the checkpoint gives scores that are not finite; evaluate an earlier one")
    read = torch.zeros(len(examples), dtype=torch.bool)
    read[number] = True

    def placed(rows: Tensor, empty: float) -> Tensor:
        whole = torch.full((len(examples), *rows.shape[1:]), empty, dtype=rows.dtype)
        whole[number] = rows
        return whole

    named = sorted(set(distributed.gather_list(unreadable)))
    return Scored(read, placed(best, -1), placed(shares, torch.nan), placed(true_share, torch.nan), named)


def _asked(
    loaded: Batch, examples: Sequence[Sample], encode: CaptionEncoder, data: Data, precision: Precision
) -> Batch:
    """Images and texts of some examples, on the device."""
    texts = [example.captions[0] for example in examples]
    fields: dict[str, Any] = encode(texts)
    return normalize_batch(replace(loaded, **fields, texts=texts).to(precision.device), data)


def _nothing(kept: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_rows` of no example."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(0, *shape, dtype=dtype, device=device)

    return empty(torch.int64), empty(torch.int64, kept), empty(torch.float32, kept), empty(torch.float32)


def _rows(scores: Tensor, number: Tensor, true: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of the examples [n], their best classes [n, k], these ones' shares [n, k] and the true class's [n]."""
    if scores.shape != (len(number), classes):
        raise ValueError(f"expected scores {[len(number), classes]}, got {list(scores.shape)}")
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : min(KEPT, classes)]
    shares = scores.softmax(1)
    own = shares.gather(1, true.clamp(min=0)[:, None])[:, 0]
    return number, order, shares.gather(1, order), torch.where(true >= 0, own, torch.nan)
