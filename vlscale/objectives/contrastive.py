"""Image-text contrastive learning (ALBEF, section 3.2 and 3.3). Everything here runs in fp32, under autocast too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.nn.precision import full_precision


class InBatchItc(NamedTuple):
    """Result of `in_batch_itc`."""

    loss: Tensor
    """Scalar."""
    sim_i2t: Tensor
    """[B, B], this rank's images against its own texts, detached."""
    sim_t2i: Tensor
    """[B, B], this rank's texts against its own images, detached."""


def clamped_temperature(temperature: Tensor, low: float = 0.001, high: float = 0.5) -> Tensor:
    """The temperature in [low, high], fp32; the gradient passes as if it were not clamped.

    ALBEF's release clamps the parameter in place before the forward, which has this value and this gradient.
    """
    free = temperature.float()
    return free.detach().clamp(low, high) + (free - free.detach())


def similarities(rows: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
    """Dot products over the temperature in fp32; rows [B, d], columns [C, d] → [B, C]."""
    with full_precision(rows):
        return rows.float() @ columns.float().T / temperature


def queue_similarities(rows: Tensor, current: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """Similarities to the current features and to the queue, which is read in place: not cloned, not joined.

    Args:
        rows: [B, d].
        current: [C, d].
        queue: [d, Q], not written to before the backward pass.
        temperature: scalar divisor, already clamped.

    Returns:
        [B, C + Q] fp32.
    """
    with full_precision(rows):
        scaled = rows.float() / temperature
        return torch.cat([scaled @ current.float().T, scaled @ queue], dim=1)


def hard_targets(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Equal shares where the ids are equal; row_ids [B], column_ids [C] → [B, C] float32.

    A row without any equal column is all zeros.
    """
    same = (row_ids[:, None] == column_ids[None, :]).float()
    return same / same.sum(1, keepdim=True).clamp(min=1)


def smoothed_targets(teacher_sim: Tensor, hard: Tensor, alpha: float) -> Tensor:
    """α · softmax(teacher's similarities) + (1 − α) · hard; all [B, C], no gradient (ALBEF, eq. 6)."""
    return alpha * teacher_sim.detach().float().softmax(1) + (1 - alpha) * hard


def soft_cross_entropy(sim: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows of −Σ targets · log softmax(sim); both [B, C]."""
    return -(targets * sim.float().log_softmax(1)).sum(1).mean()


def in_batch_itc(image_feat: Tensor, text_feat: Tensor, temperature: Tensor, image_ids: Tensor) -> InBatchItc:
    """Contrastive loss over the batches of all ranks, without queue or teacher.

    Args:
        image_feat: [B, d], unit length.
        text_feat: [B, d], unit length; row b belongs to image b.
        temperature: scalar divisor, already clamped.
        image_ids: [B]; texts of the same image are all right answers, with equal shares.

    Returns:
        The mean of both directions over this rank's rows and all ranks' columns, and the local similarities. The
        gathered columns carry gradient, so the mean of the ranks' losses has the gradient of the global batch's loss.
    """
    local = image_feat.shape[0]
    first = distributed.rank() * local
    all_images = distributed.gather_with_grad(image_feat.float())  # [G, d]
    all_texts = distributed.gather_with_grad(text_feat.float())  # [G, d]
    targets = hard_targets(image_ids, distributed.gather(image_ids))  # [B, G]
    sim_i2t = similarities(image_feat, all_texts, temperature)  # [B, G]
    sim_t2i = similarities(text_feat, all_images, temperature)  # [B, G]
    loss = (soft_cross_entropy(sim_i2t, targets) + soft_cross_entropy(sim_t2i, targets)) / 2
    own = slice(first, first + local)
    return InBatchItc(loss, sim_i2t[:, own].detach(), sim_t2i[:, own].detach())


def retrieval_accuracy(sim: Tensor, targets: Tensor) -> Tensor:
    """Share of the rows whose highest similarity is a right answer; [B, C], targets > 0 where right → scalar."""
    best = sim.detach().argmax(1, keepdim=True)
    return (targets.gather(1, best) > 0).float().mean()


def count_nonfinite(*tensors: Tensor) -> Tensor:
    """How many values are NaN or infinite, as a float32 scalar on the device."""
    return torch.stack([(~tensor.detach().isfinite()).sum() for tensor in tensors]).sum().float()
