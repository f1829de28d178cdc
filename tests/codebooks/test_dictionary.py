"""The visual dictionary against slow re-computations: eq. 2 to 5, what moves it, and ranks that agree."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlscale import distributed
from vlscale.codebooks.dictionary import VisualDictionary
from vlscale.codebooks.protocol import Codebook
from vlscale.config import Dictionary
from vlscale.errors import UserError

SIZE, WIDTH = 10, 6


def dictionary(**options: object) -> VisualDictionary:
    torch.manual_seed(0)
    return VisualDictionary(Dictionary(**{"size": SIZE, "gamma": 0.7, **options}), WIDTH).train()  # type: ignore[arg-type]


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features [4, 5, WIDTH] near some of the codes only, and valid cells; what is padding is not even finite."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(SIZE // 2, (4, 5), generator=generator)
    features = dictionary().codes[picks] + 0.3 * torch.randn(4, 5, WIDTH, generator=generator)
    valid = torch.rand(4, 5, generator=generator) < 0.6
    return features.masked_fill(~valid[..., None], math.nan), valid


def slowly_moved(codes: Tensor, gamma: float, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Eq. 4 one feature and one code at a time, and how often each code was chosen."""
    groups: list[list[Tensor]] = [[] for _ in codes]
    for features, valid in batches:
        for feature in features[valid]:
            groups[int(((feature - codes) ** 2).sum(1).argmin())].append(feature)
    rows = [gamma * d + (1 - gamma) * torch.stack(g).mean(0) if g else d for d, g in zip(codes, groups, strict=True)]
    return torch.stack(rows), torch.tensor([float(len(g)) for g in groups])


def test_it_is_a_codebook() -> None:
    book = dictionary()
    assert isinstance(book, Codebook)
    features = torch.randn(3, 5, WIDTH)
    slow = [[int(((v - book.codes) ** 2).sum(1).argmin()) for v in row] for row in features]
    assert book.assign(features).tolist() == slow
    assert book.codes.dtype == torch.float32
    assert book.usage().counts.shape == (SIZE,)
    big = VisualDictionary(Dictionary(size=512), 64)
    assert big.codes.std() == pytest.approx(1, abs=0.02)
    assert set(dict(big.named_buffers())) == {"codes"}
    assert not list(big.parameters())


def test_values_are_the_codes_and_gradients_the_features() -> None:
    book = dictionary()
    features = (1000 * torch.randn(2, 5, WIDTH)).requires_grad_()  # far away: v + (d − v) would not be d
    direction = torch.randn(2, 5, WIDTH)
    quantised = book(features, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(quantised.values, book.codes[quantised.indices])
    (quantised.values * direction).sum().backward()
    assert torch.equal(features.grad, direction)  # type: ignore[arg-type]
    assert book.codes.grad is None
    assert not book.codes.requires_grad


def test_one_update_per_step_from_all_micro_batches() -> None:
    book, batches = dictionary(), [batch(1), batch(2)]
    before = book.codes.clone()
    expected, counts = slowly_moved(before, 0.7, batches)
    assert 0 < int((counts == 0).sum()) < SIZE
    for features, valid in batches:
        book.begin(0)
        book(features, valid)
        assert torch.equal(book.codes, before), "every micro-batch reads the same codes"
    book.after_step(1)
    torch.testing.assert_close(book.codes, expected)
    assert torch.equal(book.codes[counts == 0], before[counts == 0]), "a code without features stays"
    torch.testing.assert_close(book.tracker.counts, 0.01 * counts)
    assert torch.equal(book.tracker.last_used, (counts > 0).long())

    moved = book.codes.clone()
    book.after_step(2)
    assert torch.equal(book.codes, moved), "the sums were used up"


def test_nothing_moves_in_evaluation() -> None:
    for update in ("paper", "release"):
        book = dictionary(update=update).eval()
        before = [buffer.clone() for buffer in book.buffers()]
        book(*batch())
        book.after_step(1)
        assert all(torch.equal(now, then) for now, then in zip(book.buffers(), before, strict=True))
        assert not book.tracker.counts.any()


@pytest.mark.parametrize("how", ["begin", "discard"])
def test_a_skipped_step_leaves_nothing(how: str) -> None:
    book, untouched = dictionary(), dictionary()
    book.begin(0)
    book(*batch(1))  # never finished
    if how == "discard":
        book.discard()
    for one in (book, untouched):
        one.begin(1 if how == "begin" else 0)
        one(*batch(2))
        one.after_step(2)
    assert torch.equal(book.codes, untouched.codes)
    assert torch.equal(book.tracker.counts, untouched.tracker.counts)


def test_release_counts_padding_and_returns_the_moved_codes() -> None:
    book = dictionary(update="release", decay=0.4)
    features, valid = batch()
    features = features.nan_to_num(0.5)
    old = book.codes.clone()
    quantised = book(features, valid)
    assert torch.equal(quantised.indices, torch.cdist(features, old[None]).argmin(-1)), "labels are the old codes'"
    assert torch.equal(quantised.values, book.codes[quantised.indices]), "values are the new codes"
    used = quantised.indices.unique()
    assert not torch.allclose(book.codes[used], old[used])
    counts = torch.bincount(quantised.indices.flatten(), minlength=SIZE)
    assert torch.equal(book.total_counts, counts.float())
    assert int(book.total_counts.sum()) == valid.numel() > int(valid.sum())
    means = torch.stack([features[quantised.indices == j].mean(0) for j in used])
    torch.testing.assert_close(book.codes[used], means, atol=1e-3, rtol=1e-3)  # all but the smoothing
    assert not book.codes[counts == 0].any()
    assert float(book.metrics(0)["codebook_zero"]) == pytest.approx(float((counts == 0).float().mean()))
    book.after_step(1)
    torch.testing.assert_close(book.tracker.counts, 0.01 * counts.float())


def test_metrics() -> None:
    book = dictionary()
    assert {"codebook_perplexity", "codebook_dead", "codebook_zero"} <= set(book.metrics(0))
    assert float(book.metrics(0)["codebook_zero"]) == 0
    book.codes.zero_()
    assert float(book.metrics(0)["codebook_zero"]) == 1
    assert float(book.metrics(100)["codebook_dead"]) == 1


@pytest.mark.parametrize("update", ["paper", "release"])
def test_full_precision_under_autocast(update: str) -> None:
    """The same features in either precision: the same indices, values and codes, to the last bit."""
    books = [dictionary(update=update, size=64) for _ in range(2)]
    features = torch.randn(3, 200, WIDTH).bfloat16()
    valid = torch.ones(3, 200, dtype=torch.bool)
    plain = books[0](features.float(), valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = books[1](features, valid)
        books[1].after_step(1)
    books[0].after_step(1)
    assert cast.values.dtype == torch.float32
    assert torch.equal(cast.indices, plain.indices)
    assert torch.equal(cast.values, plain.values)
    assert torch.equal(books[0].codes, books[1].codes)


def test_native_half_precision_leaves_the_codes_in_fp32() -> None:
    book = dictionary(update="release")
    before = book.codes.clone()
    for cast in (book.half(), book.bfloat16(), torch.nn.Sequential(book).to(torch.float16)[0]):
        assert {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
        assert torch.equal(cast.codes, before)
    assert book.to("meta", torch.float16).codes.device.type == "meta"
    assert book.codes.dtype == torch.float32


@pytest.mark.parametrize(("update", "key"), [("paper", "gamma"), ("release", "decay")])
def test_a_dictionary_that_cannot_move_is_refused(update: str, key: str) -> None:
    with pytest.raises(UserError, match=f"system.dictionary.{key}: 1 "):
        dictionary(update=update, **{key: 1.0})


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("update", ["paper", "release"])
def test_it_keeps_to_the_gpu(update: str) -> None:
    """Mixed devices and questions to the device raise under fake tensors."""
    book = dictionary(update=update)
    with FakeTensorMode():
        for name, buffer in list(book.named_buffers()):
            setattr(book, name, torch.empty(buffer.shape, device="cuda"))
        book.tracker.counts = torch.empty(SIZE, device="cuda")
        book.tracker.last_used = torch.empty(SIZE, dtype=torch.int64, device="cuda")
        features = torch.empty(4, 5, WIDTH, dtype=torch.float16, device="cuda")
        quantised = book(features, torch.empty(4, 5, dtype=torch.bool, device="cuda"))
        book.after_step(1)
        devices = {value.device.type for value in (*quantised, *book.metrics(1).values(), book.codes)}
    assert devices == {"cuda"}


def test_two_ranks_agree_with_each_other_and_with_one() -> None:
    root, main = Path(__file__).parents[2], "tests.codebooks.dictionary_main"
    port = str(distributed.free_port())
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", main],
            cwd=root,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


def test_kmeans_start_and_revival_take_valid_features_only() -> None:
    """Padding is far away here: no code may come from it; all ends up used where random codes leave most unused."""
    torch.manual_seed(0)
    options = Dictionary(size=8, init="kmeans", init_step=1, revive_after=20, gamma=0.9)
    dictionary = VisualDictionary(options, 4).train()
    valid = torch.ones(6, 10, dtype=torch.bool)
    valid[:, 7:] = False
    for step in range(60):
        features = torch.where(valid[..., None], torch.randn(6, 10, 4) * 0.1 + 5, torch.tensor(-99.0))
        dictionary.begin(step)
        dictionary(features, valid)
        dictionary.after_step(step + 1, step / 100)
        if step == 0:
            assert dictionary.codes.min() > 4
            dictionary.codes[:4] = 1000.0  # dead from here on, until they are revived
    assert 4 < float(dictionary.codes.min()) < float(dictionary.codes.max()) < 6
    assert not dictionary.tracker.dead(60).any()
    random = VisualDictionary(Dictionary(size=8), 4).train()
    random.begin(0)
    assert len(random(features, valid).indices[valid].unique()) < len(dictionary.assign(features)[valid].unique())


def test_the_release_has_no_upkeep() -> None:
    with pytest.raises(ValueError, match="need update: paper"):
        Dictionary(update="release", init="kmeans")
