"""CODIS's code losses against a slow re-computation, its plans by POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.codebooks.prototypes import Prototypes
from vlscale.config import PrototypeOptions, TransportOptions
from vlscale.objectives.transport import code_losses, modality_losses

G, K, D = 12, 7, 5


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Prototypes]:
    torch.manual_seed(seed)
    options = PrototypeOptions(size=K, transport=TransportOptions(solver="sinkhorn", epsilon=0.1, iterations=500))
    image, text = (F.normalize(torch.randn(G, D), dim=1) for _ in range(2))
    return image, text, Prototypes(options, D)


def slow_plan(features: Tensor, codes: Tensor) -> np.ndarray:
    """POT's entropic plan between unit features and codes, cost 1 − cosine, uniform marginals."""
    cost = np.array([[1 - float(f @ c) / float(c.norm()) for c in codes] for f in features])
    rows, columns = np.full(len(features), 1 / len(features)), np.full(len(codes), 1 / len(codes))
    return ot.sinkhorn(rows, columns, cost, reg=0.1, method="sinkhorn_log", numItermax=10_000, stopThr=1e-12)


def slow_losses(image: Tensor, text: Tensor, codes: Tensor, temperature: float) -> dict[str, float]:
    """Every sum written out, as the slide has it."""
    plans = {"image": slow_plan(image, codes), "text": slow_plan(text, codes)}
    features = {"image": image, "text": text}
    result = {}
    for name, own, other in (("i2p", "image", "text"), ("t2p", "text", "image")):
        entropy = transport = 0.0
        for i, feature in enumerate(features[own]):
            cosines = [float(feature @ code) / float(code.norm()) for code in codes]
            normaliser = sum(math.exp(cosine / temperature) for cosine in cosines)
            for j, cosine in enumerate(cosines):
                entropy -= G * plans[other][i, j] * math.log(math.exp(cosine / temperature) / normaliser)
                transport += G * plans[own][i, j] * (1 - cosine)
        result[name] = entropy / G
        result[f"ot_{own}"] = transport / G
    return result


def test_all_four_terms_against_pot() -> None:
    image, text, book = problem()
    spreads = book.transported(image), book.transported(text)
    found = code_losses(book.similarities(image), book.similarities(text), *spreads, temperature=0.1)
    expected = slow_losses(image, text, book.codes.detach(), 0.1)
    for name, value in found._asdict().items():
        assert float(value.detach()) == pytest.approx(expected[name], rel=1e-4), name
    assert float(found.total().detach()) == pytest.approx(sum(expected.values()), rel=1e-4)


@pytest.mark.parametrize("solver", ["ipot", "sinkhorn", "pot"])
def test_rows_are_distributions_and_codes_get_equal_shares(solver: str) -> None:
    image, _, _ = problem()
    options = PrototypeOptions(size=K, transport=TransportOptions(solver=solver, iterations=200))  # type: ignore[arg-type]
    spread = Prototypes(options, D).transported(image)
    assert (spread >= 0).all()
    torch.testing.assert_close(spread.sum(1), torch.ones(G), atol=0.02, rtol=0)
    torch.testing.assert_close(spread.sum(0), torch.full((K,), G / K), atol=0.02, rtol=0)
    assert not spread.requires_grad


def plain_losses(sim: Tensor, other: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both losses as the formulas read, for autograd to differentiate."""
    prediction = -(other * (sim / temperature).log_softmax(1)).sum(1).mean()
    return prediction, (own * (1 - sim)).sum(1).mean()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -2.0)])
def test_the_gradient_is_the_formulas(weights: tuple[float, float]) -> None:
    """Also where the plans' rows are no distributions, as an unconverged solver leaves them."""
    torch.manual_seed(0)
    other, own = torch.rand(G, K), torch.rand(G, K)
    sim = torch.rand(G, K).mul_(2).sub_(1)
    leaves = [sim.clone().requires_grad_() for _ in range(2)]
    for leaf, losses in zip(leaves, (modality_losses, plain_losses), strict=True):
        found = losses(leaf, other, own, 0.07)
        sum(weight * loss for weight, loss in zip(weights, found, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(modality_losses(sim, other, own, 0.07), plain_losses(sim, other, own, 0.07))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_what_moves_and_what_does_not() -> None:
    """Gradient reaches features and codes through P and D, none through the plan."""
    image, text, book = problem()
    image.requires_grad_()
    spread = book.transported(text)
    for which in range(2):
        image.grad = book.codes.grad = None
        modality_losses(book.similarities(image), spread, spread, 0.1)[which].backward()
        assert image.grad is not None
        assert image.grad.abs().sum() > 0
        assert book.codes.grad is not None
        assert book.codes.grad.abs().sum() > 0
    # By hand: the gradient of Σ T ∘ (1 − Z Cᵀ) / B with respect to Z is −T C / B.
    expected = -(spread @ book.unit_codes().detach()) / G
    torch.testing.assert_close(image.grad, expected)


def test_codes_are_used_at_unit_length_and_never_rescaled() -> None:
    image, _, book = problem()
    sim, spread, chosen = book.similarities(image), book.transported(image), book.assign(image)
    with torch.no_grad():
        book.codes.mul_(torch.rand(K, 1) * 5 + 0.1)
    before = book.codes.clone()
    torch.testing.assert_close(book.similarities(image), sim)
    torch.testing.assert_close(book.transported(image), spread, atol=1e-5, rtol=1e-4)
    assert torch.equal(book.assign(image * 3), chosen)
    assert torch.equal(chosen, sim.argmax(1))
    assert torch.equal(book.codes, before)
    # A gradient step along the codes' own direction changes nothing: it is orthogonal to them.
    book.codes.grad = None
    modality_losses(book.similarities(image), spread, spread, 0.1)[1].backward()
    assert book.codes.grad is not None
    torch.testing.assert_close((book.codes.grad * book.codes).sum(1), torch.zeros(K), atol=1e-6, rtol=0)


def test_autocast_changes_nothing() -> None:
    image, _, book = problem()
    with torch.autocast("cpu", torch.bfloat16):
        sim, spread, chosen = book.similarities(image), book.transported(image), book.assign(image)
    assert sim.dtype == spread.dtype == torch.float32
    assert torch.equal(sim, book.similarities(image))
    assert torch.equal(spread, book.transported(image))
    assert torch.equal(chosen, book.assign(image))
