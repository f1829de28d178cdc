"""Masked visual modelling on the indices of a visual dictionary (SOHO, section 3.3, eq. 7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.precision import full_precision
from vlscale.objectives.masking import IGNORED, mlm_loss


class MaskedCells(NamedTuple):
    """Cells to predict."""

    mask: Tensor
    """[M, N] bool, true = hidden from the transformer."""
    labels: Tensor
    """[M, N] int64: the index where the cell is masked, else −100."""


def mask_index(indices: Tensor, valid: Tensor, generator: torch.Generator | None = None) -> MaskedCells:
    """In every image one of its indices, each that occurs as likely as another, and every cell that has it.

    So no neighbour of the same index gives the label away. The draws are made on the CPU, so that they do not depend
    on the device.

    Args:
        indices: [M, N] int64.
        valid: [M, N] bool, false where a cell is padding: its index does not occur, and it is not masked. An image
            without valid cells masks nothing.
        generator: of the draws.
    """
    draws = torch.rand(indices.shape, generator=generator).to(indices.device, non_blocking=True)
    first = valid & ~_seen_before(indices, valid)  # [M, N], one cell per index that occurs
    chosen = torch.where(first, draws, -1.0).argmax(1, keepdim=True)
    return _masked(indices, valid & (indices == indices.gather(1, chosen)))


def mask_cell(
    indices: Tensor,
    valid: Tensor,
    probability: float,
    generator: torch.Generator | None = None,
    position: Tensor | None = None,
    coins: Tensor | None = None,
) -> MaskedCells:
    """One cell position for the whole batch; in an image, with `probability`, every cell that shares its index there.

    The release's masking. Frequent indices are masked more often, and an image whose cell at the position is padding
    masks nothing. The draws are made on the CPU.

    Args:
        indices: [M, N] int64.
        valid: [M, N] bool.
        probability: of an image.
        generator: of the draws that are not given.
        position: [1] int64, in [0, N).
        coins: [M], true or 1 where the image is masked.
    """
    count, cells = indices.shape
    if position is None:
        position = torch.randint(cells, (1,), generator=generator)
    if coins is None:
        coins = torch.rand(count, generator=generator) < probability
    position = position.to(indices.device, non_blocking=True)
    coins = coins.to(indices.device, non_blocking=True).bool()
    applies = coins[:, None] & valid.index_select(1, position)  # [M, 1]
    return _masked(indices, valid & applies & (indices == indices.index_select(1, position)))


def mvm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the masked cells' indices, eq. 7, a mean over labels ≥ 0; 0 where there is none.

    Args:
        logits: [C, K].
        labels: [C] int64, −100 in rows that do not count.
    """
    return mlm_loss(logits, labels)


def cosine_logits(states: Tensor, codes: Tensor) -> Tensor:
    """Cosines of states [..., D] to codes [K, D] as logits [..., K], fp32, without temperature.

    No gradient reaches the codes. A zero code has cosine 0 to everything.
    """
    with full_precision(states):
        unit = F.normalize(codes.detach().float(), dim=-1)
        return F.normalize(states.float(), dim=-1) @ unit.T


def _seen_before(indices: Tensor, valid: Tensor) -> Tensor:
    """[M, N] bool: an earlier valid cell of the image has the same index."""
    cells = indices.shape[1]
    earlier = torch.ones(cells, cells, dtype=torch.bool, device=indices.device).tril(-1)
    same = (indices[:, :, None] == indices[:, None, :]) & earlier & valid[:, None, :]  # [M, N, N]
    return same.any(2)


def _masked(indices: Tensor, mask: Tensor) -> MaskedCells:
    return MaskedCells(mask, torch.where(mask, indices, IGNORED))
