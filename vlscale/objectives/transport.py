"""CODIS's code losses (slides, part 1): each modality predicts how the other is transported to the shared codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def modality_losses(sim: Tensor, other: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """L_i2p or L_t2p, and L_ot, of one modality; means over this rank's rows.

    The first is H(G · T_other, P) with P = softmax(Z Cᵀ / temperature), the second Σ G · T_own ∘ D with D = 1 − cosine.
    The plans are givens: they need not be the student's own minimisers, so no gradient goes through them.

    Args:
        sim: [B, K] fp32 cosines of the student's features to the codes.
        other: [B, K] fp32, rows of G · T of the *other* modality.
        own: [B, K] fp32, rows of G · T of this modality.
        temperature: divisor of the cosines.
    """
    prediction, moved = _ModalityLosses.apply(sim, other, own, temperature)
    return prediction, moved


class _ModalityLosses(torch.autograd.Function):
    """Both losses from one softmax: rows of K = 4000 are many enough that autograd's own passes over them cost more."""

    @staticmethod
    def forward(ctx: Any, sim: Tensor, other: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        probabilities = (sim / temperature).softmax(1)  # [B, K]
        normaliser = sim.amax(1) / temperature - probabilities.amax(1).log()  # [B], log Σ exp(sim / temperature)
        mass = other.sum(1)  # [B], 1 as far as the solver has converged
        ctx.save_for_backward(probabilities, mass, other, own)
        ctx.temperature = temperature
        prediction = mass.dot(normaliser) - _dot(other, sim) / temperature
        return prediction / len(sim), (own.sum() - _dot(own, sim)) / len(sim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_prediction: Tensor, by_moved: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, mass, other, own = ctx.saved_tensors
        scale = by_prediction / (len(mass) * ctx.temperature)
        grad = probabilities * (mass * scale).unsqueeze(1)
        grad.addcmul_(other, scale.expand(1, 1), value=-1)
        return grad.addcmul_(own, (by_moved / len(mass)).expand(1, 1), value=-1), None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def code_losses(
    image_sim: Tensor, text_sim: Tensor, image_spread: Tensor, text_spread: Tensor, temperature: float
) -> CodeLosses:
    """All four terms; every argument [B, K], see `modality_losses`."""
    i2p, ot_image = modality_losses(image_sim, text_spread, image_spread, temperature)
    t2p, ot_text = modality_losses(text_sim, image_spread, text_spread, temperature)
    return CodeLosses(i2p, t2p, ot_image, ot_text)
