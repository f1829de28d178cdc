"""The vector-quantisation terms of CB-ViLA's codebook loss."""

from __future__ import annotations

from torch import Tensor

from vlscale.nn.precision import full_precision


def codebook_loss(features: Tensor, codes: Tensor, beta: float, reduction: str = "mean") -> Tensor:
    """CB-ViLA, eq. 3, second and third term: ‖sg[v] − c‖² + β ‖v − sg[c]‖².

    Args:
        features: v [n, d], with gradient to the encoder.
        codes: c [n, d], the nearest codes, with gradient to the codebook.
        beta: weight of the commitment term.
        reduction: over the d dimensions, `mean` or `sum` (eq. 3 to the letter); over tokens always the mean.

    Returns:
        Scalar, fp32.
    """
    with full_precision(features):
        features, codes = features.float(), codes.float()
        learned = (features.detach() - codes).square()
        commitment = (features - codes.detach()).square()
        per_dimension = learned + beta * commitment
        return per_dimension.sum(-1).mean() if reduction == "sum" else per_dimension.mean()
