"""One class out of a few, with or without a teacher (ALBEF, sections 3.3 and 3.4). Everything here runs in fp32."""

from __future__ import annotations

from torch import Tensor


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """(1 − α) · cross-entropy + α · −Σ softmax(teacher) · log softmax(student), row by row.

    The distillation term is a cross-entropy, as in ALBEF's release; the KL divergence of its eq. 7 differs from it by
    the teacher's entropy, which has no gradient.

    Args:
        logits: […, C].
        labels: […] int64, in [0, C).
        teacher_logits: […, C]; no gradient flows to them.
        alpha: weight of the distillation; without a teacher it is not read.

    Returns:
        […] fp32.
    """
    log_probability = logits.float().log_softmax(-1)
    hard = -log_probability.gather(-1, labels[..., None])[..., 0]
    if teacher_logits is None:
        return hard
    soft = -(teacher_logits.detach().float().softmax(-1) * log_probability).sum(-1)
    return (1 - alpha) * hard + alpha * soft


def classification_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Mean of `distilled_cross_entropy`: visual entailment, NLVR2; logits [B, C], labels [B] → scalar."""
    return distilled_cross_entropy(logits, labels, teacher_logits, alpha).mean()


def classification_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows whose highest logit is the label; logits [B, C], labels [B] → scalar."""
    return (logits.detach().argmax(1) == labels).float().mean()
