"""CODIS's codebook: unit-norm prototypes that image and text features are transported to (slides, part 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed, transport
from vlscale.codebooks.protocol import CodebookUsage
from vlscale.codebooks.upkeep import Upkeep
from vlscale.config import PrototypeOptions
from vlscale.nn.precision import full_precision
from vlscale.nn.writer import ParameterWriter


class Prototypes(nn.Module):
    """K codes of width d as one parameter `codes`, normalised where they are used, never in place."""

    def __init__(self, options: PrototypeOptions, width: int) -> None:
        super().__init__()
        self.options = options
        self.codes = nn.Parameter(F.normalize(torch.randn(options.size, width), dim=1))
        self.upkeep = Upkeep(options)
        self.tracker = self.upkeep.tracker

    def unit_codes(self) -> Tensor:
        """[K, d] fp32, unit length, with gradient to the codes."""
        return F.normalize(self.codes.float(), dim=1)

    def similarities(self, features: Tensor) -> Tensor:
        """Cosines of unit features [B, d] to the codes, [B, K] fp32, with gradient to both."""
        with full_precision(features):
            return features.float() @ self.unit_codes().T

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """The code of the highest cosine; [..., d], of any length → [...] int64."""
        with full_precision(features):
            codes = self.unit_codes()
            return (features.float() @ codes.T).argmax(-1)

    @torch.no_grad()
    def transported(self, features: Tensor) -> Tensor:
        """How this rank's features are spread over the codes by the optimal transport plan; no gradient.

        The cost of moving a feature to a code is 1 − cosine; marginals are uniform over the features of all ranks (or
        this one's, by `transport.marginals`) and over the codes. Every rank solves the same problem and takes its rows.

        Args:
            features: [B, d], unit length.

        Returns:
            G · T, [B, K] fp32: each row sums to 1 (as far as the solver has converged).
        """
        options = self.options.transport
        everyone = features if options.marginals == "local" else distributed.gather(features.float())
        first = 0 if options.marginals == "local" else distributed.rank() * len(features)
        cost = 1 - self.similarities(everyone)  # [G, K]
        plan = transport.solve(
            cost, options.solver, epsilon=options.epsilon, beta=options.beta, iterations=options.iterations
        )
        return plan[first : first + len(features)] * len(everyone)

    @torch.no_grad()
    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Remember what a training forward saw, until `after_step`; features [n, d], indices [n]."""
        self.upkeep.observe(features, indices)

    def after_step(self, step: int, fraction: float, writer: ParameterWriter) -> None:
        """Usage, k-means start and revival, the same on every rank; `step` counts the step just taken."""
        self.upkeep.after_step(self.codes, step, fraction, writer)

    def usage(self) -> CodebookUsage:
        """Recent usage in training, both modalities together."""
        return self.tracker.summary()
