"""Image-text contrastive learning (ALBEF, section 3.2 and 3.3). Everything here runs in fp32, under autocast too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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


class CrossAlignment(NamedTuple):
    """Student against the other modality's teacher, both directions, and what that was made of."""

    i2t: Tensor
    """Scalar loss, images against the texts' teacher."""
    t2i: Tensor
    sim_i2t: Tensor
    """[B, B + Q], this batch first, then the queue."""
    sim_t2i: Tensor
    hard: Tensor
    """[B, B + Q], the right answers in equal shares."""
    targets_i2t: Tensor
    targets_t2i: Tensor

    def accuracy(self) -> Tensor:
        """Share of the rows, of both directions, whose highest similarity is a right answer."""
        return (retrieval_accuracy(self.sim_i2t, self.hard) + retrieval_accuracy(self.sim_t2i, self.hard)) / 2


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


def cross_alignment(
    image_feat: Tensor,
    text_feat: Tensor,
    taught_image: Tensor,
    taught_text: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    image_ids: Tensor,
    alpha: float,
    queue_ids: Tensor | None = None,
) -> CrossAlignment:
    """ITC of ALBEF (eq. 1 and 6) and CODIS (slides, part 2: t2i and i2t), smoothed by the teacher.

    The release's hard targets are the identity; equal image ids within the batch share their row here. With
    `queue_ids` they share it with the queue's as well, as in the release's retrieval fine-tuning.

    Args:
        image_feat, text_feat: [B, d], the student's, unit length.
        taught_image, taught_text: [B, d], the teacher's of the same pairs.
        image_queue, text_queue: [d, Q], the teacher's of earlier steps.
        temperature: scalar divisor, already clamped.
        image_ids: [B].
        alpha: weight of the teacher's similarities in the targets; 0 computes none.
        queue_ids: [Q], image ids of both queues' columns, `nn.queue.EMPTY` where there is none; None knows of none.
    """
    sim_i2t = queue_similarities(image_feat, taught_text, text_queue, temperature)
    sim_t2i = queue_similarities(text_feat, taught_image, image_queue, temperature)
    hard = queue_targets(image_ids, image_queue, queue_ids)
    targets_i2t = targets_t2i = hard
    if alpha:
        with torch.no_grad():
            soft_i2t = queue_similarities(taught_image, taught_text, text_queue, temperature)
            soft_t2i = queue_similarities(taught_text, taught_image, image_queue, temperature)
        targets_i2t = smoothed_targets(soft_i2t, hard, alpha)
        targets_t2i = smoothed_targets(soft_t2i, hard, alpha)
    i2t, t2i = soft_cross_entropy(sim_i2t, targets_i2t), soft_cross_entropy(sim_t2i, targets_t2i)
    return CrossAlignment(i2t, t2i, sim_i2t, sim_t2i, hard, targets_i2t, targets_t2i)


def intra_alignment(
    feat: Tensor,
    taught: Tensor,
    queue: Tensor,
    temperature: Tensor,
    image_ids: Tensor,
    queue_ids: Tensor | None = None,
) -> Tensor:
    """CODIS, slides, part 2: i2i or t2t, a student's features against its own modality's teacher; one-hot targets.

    The slide's t2t denominator repeats the images' queue; it runs over the texts' here.

    Args:
        feat, taught: [B, d], unit length.
        queue: [d, Q].
        temperature: scalar divisor, already clamped.
        image_ids: [B]; equal ones share their row.
        queue_ids: as in `cross_alignment`.
    """
    targets = queue_targets(image_ids, queue, queue_ids)
    return soft_cross_entropy(queue_similarities(feat, taught, queue, temperature), targets)


def queue_targets(image_ids: Tensor, queue: Tensor, queue_ids: Tensor | None = None) -> Tensor:
    """Hard targets [B, B + Q]: equal shares where the batch's ids are equal, and the queue's where they are known.

    Args:
        image_ids: [B].
        queue: [d, Q].
        queue_ids: [Q]; None: no column of the queue is a right answer.
    """
    if queue_ids is None:
        return functional.pad(hard_targets(image_ids, image_ids), (0, queue.shape[1]))
    return hard_targets(image_ids, torch.cat([image_ids, queue_ids]))


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


def vsc(
    image_feat: Tensor, text_feat: Tensor, logit_scale: Tensor, image_ids: Tensor, gather: bool = True
) -> InBatchItc:
    """Visual semantic contrast (MVPTR, eq. 4 and 5).

    The learned number is CLIP's: similarities are multiplied by exp(logit_scale), as in the release. Its temperature
    exp(−logit_scale) is kept in the range of every other; the release does not bound it.

    Args:
        image_feat, text_feat: [B, d], unit length; row b of both is one pair.
        logit_scale: scalar.
        image_ids: [B]; texts of the same image share their row. Eq. 5 knows the pair alone, which is the same where no
            image occurs twice.
        gather: against the pairs of all ranks, with gradient; else of this rank only, as in the release.
    """
    temperature = clamped_temperature((-logit_scale.float()).exp())
    if gather:
        return in_batch_itc(image_feat, text_feat, temperature, image_ids)
    sim = similarities(image_feat, text_feat, temperature)  # [B, B]
    targets = hard_targets(image_ids, image_ids)
    loss = (soft_cross_entropy(sim, targets) + soft_cross_entropy(sim.T, targets)) / 2
    return InBatchItc(loss, sim.detach(), sim.T.detach())


def retrieval_accuracy(sim: Tensor, targets: Tensor) -> Tensor:
    """Share of the rows whose highest similarity is a right answer; [B, C], targets > 0 where right → scalar."""
    best = sim.detach().argmax(1, keepdim=True)
    return (targets.gather(1, best) > 0).float().mean()


def count_nonfinite(*tensors: Tensor) -> Tensor:
    """How many values are NaN or infinite, as a float32 scalar on the device."""
    return torch.stack([(~tensor.detach().isfinite()).sum() for tensor in tensors]).sum().float()
