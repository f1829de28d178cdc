"""CODIS's code losses (slides, part 1): each modality predicts how the other is transported to the shared codes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vlscale.objectives.contrastive import soft_cross_entropy


class CodeLosses(NamedTuple):
    """The four terms of L_code, scalars with gradient to features and codes."""

    i2p: Tensor
    """L_i2p(Z_v, C, T_t2p): images predict the texts' plan."""
    t2p: Tensor
    """L_t2p(Z_t, C, T_i2p): texts predict the images' plan."""
    ot_image: Tensor
    """L_ot(Z_v, C)."""
    ot_text: Tensor
    """L_ot(Z_t, C)."""

    def total(self) -> Tensor:
        """L_code, their sum as on the slide."""
        return self.i2p + self.t2p + self.ot_image + self.ot_text


def prediction_loss(sim: Tensor, spread: Tensor, temperature: float) -> Tensor:
    """L_i2p and L_t2p: H(G · T, P), P = softmax(Z Cᵀ / temperature); mean over this rank's rows.

    Args:
        sim: [B, K] cosines of the student's features to the codes.
        spread: [B, K], rows of G · T of the *other* modality, no gradient.
        temperature: divisor of the cosines.
    """
    return soft_cross_entropy(sim / temperature, spread)


def transport_loss(sim: Tensor, spread: Tensor) -> Tensor:
    """L_ot: Σ G · T ∘ D, D = 1 − cosine; mean over this rank's rows.

    The plan is a given: it need not be the student's own minimiser, so no gradient goes through it.

    Args:
        sim: [B, K] cosines of the student's features to the codes.
        spread: [B, K], rows of G · T of the *same* modality, no gradient.
    """
    return (spread * (1 - sim)).sum(1).mean()


def code_losses(
    image_sim: Tensor, text_sim: Tensor, image_spread: Tensor, text_spread: Tensor, temperature: float
) -> CodeLosses:
    """All four terms; every argument [B, K], see `prediction_loss`."""
    return CodeLosses(
        i2p=prediction_loss(image_sim, text_spread, temperature),
        t2p=prediction_loss(text_sim, image_spread, temperature),
        ot_image=transport_loss(image_sim, image_spread),
        ot_text=transport_loss(text_sim, text_spread),
    )
