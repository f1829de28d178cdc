"""One of two ranks: different features, equal codes, and those of one process that saw them all."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.codebooks.dictionary import VisualDictionary
from vlscale.config import Dictionary

SIZE, WIDTH, IMAGES, CELLS = 8, 4, 3, 6
MICRO = 2


def fresh(update: str) -> VisualDictionary:
    torch.manual_seed(0)
    return VisualDictionary(Dictionary(size=SIZE, update=update, gamma=0.8), WIDTH).train()  # type: ignore[arg-type]


def batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Features and valid cells of both ranks together."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    features = torch.randn(2 * IMAGES, CELLS, WIDTH, generator=generator)
    return features, torch.rand(2 * IMAGES, CELLS, generator=generator) < 0.7


def trained(update: str, rows: slice) -> list[Tensor]:
    """Buffers and usage after some steps on these rows of every batch."""
    book = fresh(update)
    for step in range(4):
        for micro in range(MICRO):
            features, valid = batch(step, micro)
            book.begin(step)
            book(features[rows], valid[rows])
        if step != 2:  # a skipped step
            book.after_step(step + 1)
    return [*book.buffers(), *book.tracker.state().values()]


def main() -> None:
    distributed.init_from_environment()
    rank = distributed.rank()
    mine = {update: trained(update, slice(rank * IMAGES, (rank + 1) * IMAGES)) for update in ("paper", "release")}
    tensors = [tensor for state in mine.values() for tensor in state]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    assert distributed.broadcast_object(digest) == digest, "codes or statistics differ between the ranks"
    distributed.shutdown()
    for update, state in mine.items():
        for ours, alone in zip(state, trained(update, slice(None)), strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
        assert not torch.equal(state[0], fresh(update).codes), "nothing moved"


if __name__ == "__main__":
    main()
