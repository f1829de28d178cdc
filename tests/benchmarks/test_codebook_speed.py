"""Nearest code and its bookkeeping against vector-quantize-pytorch in training: N 4096, d 256, K 3072.

Both find the nearest codes, look them up and book their use. The peer also moves its codes by EMA; ours learn by
gradient, which the optimizer's step pays for.
"""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.timing import interleaved, ratio
from vlscale.codebooks.quantizer import Quantizer
from vlscale.config import CodebookOptions
from vlscale.nn.writer import ParameterWriter

pytestmark = pytest.mark.slow

N, WIDTH, CODES = 4096, 256, 3072


class NoWriter(ParameterWriter):
    """Counting writes nothing to the codes."""


def test_assignment_and_counts() -> None:
    peer = pytest.importorskip("vector_quantize_pytorch", reason="needs the extra `bench`")
    theirs = peer.VectorQuantize(dim=WIDTH, codebook_size=CODES, decay=0.99).train()
    quantizer = Quantizer(CodebookOptions(size=CODES, init="random", revive_after=0), WIDTH)
    features = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        indices = quantizer.assign(features)
        quantizer.observe(features, indices)
        quantizer.lookup(indices)
        quantizer.after_step(1, 0.0, NoWriter())

    taken = interleaved({"quantizer": ours, "VectorQuantize": lambda: theirs(features[None])}, repeats=15)
    assert ratio(taken, "VectorQuantize", "quantizer") >= 5
