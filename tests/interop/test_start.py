"""Weights of another run: tables of positions follow the image size, everything else must fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vlscale.errors import UserError
from vlscale.interop.export import write_tensors
from vlscale.interop.start import start_from
from vlscale.nn.vision import resize_positions


class Tables(nn.Module):
    """A ViT's table, and one of cells alone or with a row before them."""

    def __init__(self, side: int, extra: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + side**2, 4))
        self.query_positions = nn.Parameter(torch.randn(extra + side**2, 4))


@pytest.mark.parametrize("extra", [0, 1])
def test_tables_of_positions_follow_the_image_size(extra: int, tmp_path: Path) -> None:
    small, large = Tables(4, extra), Tables(6, extra)
    write_tensors(tmp_path / "model.safetensors", small.state_dict(), {})
    start_from(large, tmp_path / "model.safetensors")
    assert torch.equal(large.pos_embed, resize_positions(small.pos_embed, (6, 6)))
    cells = torch.cat([torch.zeros(1, 4), small.query_positions[extra:]])[None]
    assert torch.equal(large.query_positions[extra:], resize_positions(cells, (6, 6))[0, 1:])
    assert torch.equal(large.query_positions[:extra], small.query_positions[:extra])


def test_another_kind_of_table_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", Tables(4, 0).state_dict(), {})
    with pytest.raises(UserError, match="query_positions"):
        start_from(Tables(6, 1), tmp_path / "model.safetensors")
