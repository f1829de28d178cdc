"""CB-ViLA's codebook against slow re-computations: assignment, Gumbel path, health."""

import math

import pytest
import torch
from torch import nn

from vlscale.codebooks.health import UsageTracker, count_codes, entropy, kmeans, perplexity
from vlscale.codebooks.protocol import Codebook
from vlscale.codebooks.quantizer import Quantizer
from vlscale.codebooks.upkeep import REVIVE_EVERY
from vlscale.config import CodebookOptions


class Writer:
    """Writes to a plain parameter and remembers whose moments were reset."""

    def __init__(self) -> None:
        self.reset: list[torch.Tensor] = []

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)

    def reset_moments(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        self.reset.append(rows.clone())


def quantizer(**options: object) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(CodebookOptions(**{"size": 16, **options}), 6)


def test_assignment_is_the_nearest_code_by_squared_distance() -> None:
    book, features = quantizer(), torch.randn(3, 5, 6)
    slow = [[((v - book.codes) ** 2).sum(1).argmin().item() for v in row] for row in features]
    assert book.assign(features).tolist() == slow
    assert isinstance(book, Codebook)


def test_assignment_stays_exact_under_bf16_autocast() -> None:
    book, features = quantizer(size=512), torch.randn(2000, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = book.assign(features)
    assert torch.equal(found, torch.cdist(features.double(), book.codes.double()).argmin(1))


def test_sample_takes_the_perturbed_argmax_and_sends_the_softmax_gradient() -> None:
    book = quantizer()
    features = torch.randn(7, 6, requires_grad=True)
    noise, tau = torch.randn(7, 16), 0.7
    sampled = book.sample(features, tau, noise)
    slow = torch.stack([-((v - book.codes) ** 2).sum(1) / tau for v in features]) + noise
    assert torch.equal(sampled.indices, slow.argmax(1))
    torch.testing.assert_close(sampled.codes, book.codes[slow.argmax(1)])

    direction = torch.randn(7, 6)
    grads = torch.autograd.grad((sampled.codes * direction).sum(), [features, book.codes])
    # The straight-through value has the soft path's gradient in ℓ, and the hard one-hot as the weight of C.
    soft = slow.softmax(1)
    hard = nn.functional.one_hot(slow.argmax(1), 16).float()
    by_feature = torch.autograd.grad((soft @ book.codes.detach() * direction).sum(), features, retain_graph=True)[0]
    through_distance = torch.autograd.grad((soft @ book.codes.detach() * direction).sum(), book.codes)[0]
    torch.testing.assert_close(grads[0], by_feature)
    torch.testing.assert_close(grads[1], through_distance + hard.T @ direction)


def test_noise_fades_as_the_temperature_falls() -> None:
    book, features = quantizer(), torch.randn(4000, 6)
    noise = -torch.empty(4000, 16).exponential_().log()
    nearest = book.assign(features)
    agreement = [
        (book.sample(features, tau, noise).indices == nearest).float().mean().item() for tau in (5.0, 1.0, 0.01)
    ]
    assert agreement[0] < agreement[1] < agreement[2]
    assert agreement[2] > 0.97


def test_temperature_goes_from_start_to_end_and_stays() -> None:
    book = quantizer(tau_start=1.0, tau_end=0.1, tau_until=0.8)
    assert book.tau(0.0) == 1.0
    assert book.tau(0.4) == pytest.approx(math.sqrt(0.1))
    assert book.tau(0.8) == book.tau(1.0) == pytest.approx(0.1)


def test_entropy_and_perplexity() -> None:
    counts = count_codes(torch.tensor([[0, 0], [1, 3]]), 5)
    assert counts.tolist() == [2, 1, 0, 1, 0]
    assert entropy(counts).item() == pytest.approx(1.5 * math.log(2))
    assert perplexity(torch.ones(8)).item() == pytest.approx(8)
    assert perplexity(torch.zeros(8)).item() == pytest.approx(1)


def test_kmeans_centres_are_the_means_of_the_features_nearest_to_them() -> None:
    torch.manual_seed(1)
    features = (50 * torch.randn(8, 1, 3) + 0.1 * torch.randn(8, 200, 3)).flatten(0, 1)
    centres = kmeans(features, 8, 3)
    nearest = torch.cdist(features, centres).argmin(1)
    slow = torch.stack([features[nearest == code].mean(0) for code in nearest.unique()])
    torch.testing.assert_close(centres[nearest.unique()], slow, atol=1e-3, rtol=1e-3)
    spread = (features - centres[nearest]).square().sum(1).mean()
    assert spread < 0.5 * (features - features.mean(0)).square().sum(1).mean()
    assert torch.equal(centres, kmeans(features, 8, 3))
    assert kmeans(features[:2], 4, 0).shape == (4, 3)


def test_codes_start_from_kmeans_of_the_batch_at_the_given_step() -> None:
    book, writer = quantizer(init="kmeans", init_step=3, revive_after=5), Writer()
    before = book.codes.detach().clone()
    features = 10 + torch.randn(400, 6)
    for step in (1, 2):
        book.observe(features, book.assign(features))
        book.after_step(step, 0.0, writer)
        assert torch.equal(book.codes, before)
    book.observe(features, book.assign(features))
    book.after_step(3, 0.0, writer)
    assert (book.codes - features.mean(0)).norm(dim=1).max() < 6
    assert book.assign(features).unique().numel() == 16
    assert writer.reset[0].all()


def test_only_dead_codes_are_revived_from_features_and_their_moments_reset() -> None:
    book, writer = quantizer(init="random", revive_after=2 * REVIVE_EVERY, revive_until=0.5), Writer()
    features = torch.randn(64, 6)
    used = torch.arange(8).repeat(8)
    before = book.codes.detach().clone()
    for step in range(1, 2 * REVIVE_EVERY + 1):
        book.observe(features, used)
        book.after_step(step, 0.1, writer)
    assert torch.equal(book.codes[:8], before[:8])
    assert (book.codes[8:, None] == features).all(-1).any(1).all()
    assert writer.reset[-1].tolist() == [False] * 8 + [True] * 8
    assert book.tracker.dead(2 * REVIVE_EVERY).sum() == 0


def test_no_code_is_revived_late_in_the_run() -> None:
    book, writer = quantizer(init="random", revive_after=REVIVE_EVERY, revive_until=0.5), Writer()
    before = book.codes.detach().clone()
    for step in range(1, 5 * REVIVE_EVERY):
        book.observe(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))
        book.after_step(step, 0.6, writer)
    assert torch.equal(book.codes, before)
    assert not writer.reset


def test_usage_survives_a_restart() -> None:
    tracker = UsageTracker(4, dead_after=2)
    tracker.update(torch.tensor([3.0, 0, 1, 0]), 1)
    tracker.update(torch.tensor([0.0, 2, 1, 0]), 2)
    other = UsageTracker(4, dead_after=2)
    other.load_state({name: value.clone() for name, value in tracker.state().items()})
    assert other.summary().perplexity == tracker.summary().perplexity
    assert tracker.dead(3).tolist() == [True, False, False, True]
    assert other.dead(3).tolist() == tracker.dead(3).tolist()
