"""The vision transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlscale.config import Vision
from vlscale.errors import UserError
from vlscale.nn.vision import VisionEncoder, resize_positions

OVERRIDES = {"embed_dim": 12, "depth": 1, "num_heads": 2, "patch_size": 8}


def encoder(size: int = 32, **changes: object) -> VisionEncoder:
    torch.manual_seed(0)
    options = Vision(model="vit_tiny_patch16_224", overrides=OVERRIDES)
    return VisionEncoder(options.model_copy(update=changes), size).eval()


def test_cells_come_row_by_row_after_cls() -> None:
    vision = encoder()
    assert vision.grid == (4, 4)
    assert vision.patch == 8
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 24:32] = 1  # row 1, column 3
    with torch.no_grad():
        tokens = vision(images)
        embedded = vision.vit.patch_embed(images) - vision.vit.patch_embed(torch.zeros_like(images))
    assert tokens.shape == (1, 17, 12)
    assert embedded.abs().sum(2).flatten().nonzero().flatten().tolist() == [1 * 4 + 3]
    # the final LayerNorm, fresh from initialisation, leaves unit variance
    assert torch.allclose(tokens.var(2, unbiased=False), torch.ones(1, 17), atol=1e-2)


def test_resized_positions_keep_cls_and_place() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 4).flatten()
    table = torch.stack([torch.cat([torch.tensor([9.0]), rows])], dim=1)[None]  # the value is the row
    resized = resize_positions(table, (8, 4))
    assert resized.shape == (1, 33, 1)
    assert float(resized[0, 0]) == 9
    column = resized[0, 1:, 0].view(8, 4)
    assert torch.allclose(column, column[:, :1].expand(8, 4), atol=1e-6)
    assert (column[1:, 0] > column[:-1, 0]).all()
    assert torch.allclose(resize_positions(table, (4, 4)), table, atol=1e-6)


def test_starts_from_a_local_file_of_another_resolution(tmp_path: Path) -> None:
    source = encoder()
    torch.save({"model": source.vit.state_dict()}, tmp_path / "vit.pth")
    same = encoder(init=str(tmp_path / "vit.pth"))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(same(images), source(images))
    larger = encoder(size=48, init=str(tmp_path / "vit.pth"))
    assert torch.equal(larger.vit.pos_embed.detach(), resize_positions(source.vit.pos_embed.detach(), (6, 6)))


def test_wrong_models_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't build 'no_such_model'"):
        encoder(model="no_such_model")
    for other in ("resnet18", "swin_tiny_patch4_window7_224"):
        with pytest.raises(UserError, match=rf"system\.vision.*{other}"):
            encoder(model=other, overrides={})
    with pytest.raises(UserError, match="no such file"):
        encoder(init=str(tmp_path / "absent.pth"))
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: cls_token is missing or has another shape"):
        encoder(init=str(tmp_path / "other.pth"))


def test_half_precision_weights_take_float_images() -> None:
    assert encoder().bfloat16()(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
