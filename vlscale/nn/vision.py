"""Vision transformers by timm name (Dosovitskiy et al. 2021; DeiT weights as ALBEF's release)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vlscale.config import Vision
from vlscale.errors import UserError


class VisionEncoder(nn.Module):
    """A timm vision transformer without head; CLS kept, final LayerNorm applied."""

    def __init__(self, config: Vision, image_size: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.vit: Any = _create(config, image_size)
        self.vit.set_grad_checkpointing(checkpointing)
        if config.init not in {"random", "pretrained"}:
            _load_local(self.vit, Path(config.init))
        self.width: int = self.vit.embed_dim
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.patch: int = self.vit.patch_embed.patch_size[0]
        if image_size % self.patch:
            raise UserError(f"data.image_size: {image_size} is no multiple of the patch size {self.patch}")

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] float, normalised → [B, 1 + N, D], CLS first, cells row by row."""
        for block in self.vit.blocks:
            block.attn.fused_attn = images.is_cuda  # see nn/attention.py: the fused kernel is slow on CPU
        # Native half precision casts parameters, not inputs; elsewhere this does nothing.
        return self.vit.forward_features(images.to(self.vit.patch_embed.proj.weight.dtype))


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position table [1, 1 + n², D] to a grid; the CLS row stays (ALBEF's release).

    Returns: [1, 1 + rows · columns, D].
    """
    cls, cells = positions[:, :1], positions[:, 1:]
    side = round(cells.shape[1] ** 0.5)
    cells = cells.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    cells = nn.functional.interpolate(cells.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, cells.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def _create(config: Vision, image_size: int) -> Any:
    try:
        vit = timm.create_model(
            config.model,
            pretrained=config.init == "pretrained",
            img_size=image_size,
            num_classes=0,
            global_pool="token",
            **config.overrides,
        )
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"system.vision: timm can't build {config.model!r}: {reason}") from None
    if not isinstance(vit, timm.models.vision_transformer.VisionTransformer):
        raise UserError(
            f"system.vision.model: {config.model} is no vision transformer; use a timm vit_* or deit_* name"
        )
    return vit


def _load_local(vit: Any, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"system.vision.init: {path}: no such file; use random, pretrained or a weights file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights: dict[str, Any] = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("model", weights)
    own = vit.state_dict()
    if "pos_embed" in weights and weights["pos_embed"].shape != own["pos_embed"].shape:
        weights["pos_embed"] = resize_positions(weights["pos_embed"], tuple(vit.patch_embed.grid_size))
    wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise UserError(f"system.vision.init: {path}: {wrong[0]} is missing or has another shape")
    vit.load_state_dict({name: weights[name] for name in own})
