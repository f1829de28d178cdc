"""One of two ranks: the plan over the global batch, the codes' statistics and revival are the same on both."""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.codebooks.prototypes import Prototypes
from vlscale.codebooks.upkeep import REVIVE_EVERY
from vlscale.config import PrototypeOptions

SIZE, WIDTH, LOCAL = 6, 4, 5


class Writer:
    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().float()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def reset_moments(self, parameter: nn.Parameter, rows: Tensor) -> None:
        pass


def features(step: int) -> Tensor:
    """[2 · LOCAL, WIDTH], what both ranks together see."""
    return F.normalize(torch.randn(2 * LOCAL, WIDTH, generator=torch.Generator().manual_seed(step)), dim=1)


def main() -> None:
    distributed.init_from_environment()
    rank, writer = distributed.rank(), Writer()
    torch.manual_seed(0)
    book = Prototypes(PrototypeOptions(size=SIZE, revive_after=2 * REVIVE_EVERY), WIDTH)
    alone = Prototypes(PrototypeOptions(size=SIZE), WIDTH)
    alone.load_state_dict(book.state_dict())
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    for step in range(1, 3 * REVIVE_EVERY + 1):
        local = features(step)[mine]
        spread = book.transported(local)
        if step == 1:  # the rows of the plan that one process makes of the whole batch
            one = 1 - features(step) @ alone.unit_codes().detach().T
            from vlscale import transport

            whole = transport.solve(one, "ipot") * 2 * LOCAL
            torch.testing.assert_close(spread, whole[mine], atol=1e-5, rtol=1e-4)
        book.observe(local, torch.full((LOCAL,), rank))  # two codes in use: the others die and are revived
        book.after_step(step, 0.1, writer)
    state = [book.codes, *book.tracker.state().values()]
    digest = hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in state)).hexdigest()
    assert distributed.broadcast_object(digest) == digest, "codes or statistics differ between the ranks"
    assert not torch.equal(book.codes[2:], alone.codes[2:]), "nothing was revived"
    distributed.shutdown()
    print(rank, digest, file=sys.stderr)


if __name__ == "__main__":
    main()
