"""One of two ranks: collectives, and the gradient of a contrastive loss against the whole batch in one process."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.errors import UserError


def loss(model: nn.Module, images: torch.Tensor, texts: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of this rank against the columns of all: what a symmetric ITC does."""
    image, text = model(images), model(texts)
    own = torch.arange(len(image)) + first
    i2t = image @ distributed.gather_with_grad(text).T
    t2i = text @ distributed.gather_with_grad(image).T
    return F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own)


def check_gradient(rank: int) -> None:
    torch.manual_seed(0)
    model, images, texts = nn.Linear(5, 4), torch.randn(6, 5), torch.randn(6, 5)
    mine = slice(3 * rank, 3 * rank + 3)
    loss(model, images[mine], texts[mine], 3 * rank).backward()
    assert model.weight.grad is not None
    averaged = distributed.all_reduce_sum(model.weight.grad) / 2  # as DDP and ZeRO do
    model.weight.grad = None
    image, text, own = model(images), model(texts), torch.arange(6)
    whole = F.cross_entropy(image @ text.T, own) + F.cross_entropy(text @ image.T, own)
    whole.backward()
    torch.testing.assert_close(averaged, model.weight.grad)


def check_collectives(rank: int) -> None:
    tensor = torch.full((2, 3), float(rank))
    assert distributed.gather(tensor)[:, 0].tolist() == [0, 0, 1, 1]
    assert distributed.all_reduce_sum(tensor).unique().tolist() == [1.0]
    assert tensor[0, 0] == rank, "the input stays"
    assert distributed.broadcast(tensor, src=1).unique().tolist() == [1.0]
    assert distributed.broadcast_object({"rank": rank}) == {"rank": 0}
    assert distributed.on_main(lambda: distributed.rank() + 5) == 5
    with distributed.main_process_first() as main:
        assert main == (rank == 0)
    with pytest.raises(UserError, match="no"):
        distributed.on_main(refuse)


def refuse() -> None:
    raise UserError("no")


if __name__ == "__main__":
    distributed.init_from_environment()
    assert distributed.world_size() == 2
    check_gradient(int(os.environ["RANK"]))
    check_collectives(distributed.rank())
    distributed.shutdown()
