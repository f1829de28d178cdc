"""Prototypes: what every codebook answers, marginals over all ranks, and ranks that agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vlscale import distributed
from vlscale.codebooks.protocol import Codebook
from vlscale.codebooks.prototypes import Prototypes
from vlscale.config import PrototypeOptions, TransportOptions


def test_it_is_a_codebook() -> None:
    book = Prototypes(PrototypeOptions(size=6), 4)
    assert isinstance(book, Codebook)
    torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(6))
    assert book.assign(torch.randn(2, 3, 4)).shape == (2, 3)
    assert book.usage().counts.shape == (6,)


@pytest.mark.parametrize("marginals", ["global", "local"])
def test_whose_features_share_the_codes(marginals: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    everyone = torch.randn(8, 4)
    everyone[4:] = everyone[4] + 0.01 * torch.randn(4, 4)  # this rank's look all alike
    everyone = F.normalize(everyone, dim=1)
    options = PrototypeOptions(size=4, transport=TransportOptions(marginals=marginals, iterations=300))  # type: ignore[arg-type]
    book = Prototypes(options, 4)
    monkeypatch.setattr(distributed, "gather", lambda _local: everyone)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    spread = book.transported(everyone[4:])
    torch.testing.assert_close(spread.sum(1), torch.ones(4), atol=0.02, rtol=0)
    even = (spread.sum(0) - 1).abs().max()
    if marginals == "local":
        assert even < 0.02, "this rank's four features fill the four codes evenly"
    else:
        assert even > 0.1, "only all eight together do"
        monkeypatch.setattr(distributed, "rank", lambda: 0)
        both = book.transported(everyone[:4]).sum(0) + spread.sum(0)
        torch.testing.assert_close(both, torch.full((4,), 2.0), atol=0.04, rtol=0)


def test_two_ranks_agree() -> None:
    root, main = Path(__file__).parents[2], "tests.codebooks.prototypes_main"
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
