"""One text over two images (ALBEF, section 3.4, NLVR2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlscale.config import Text
from vlscale.nn.attention import additive_mask
from vlscale.nn.bert import BertLayer, FusionEncoder, KeyValue, final_norm, init_bert, run_layer


class PairedFusionEncoder(nn.Module):
    """Fusion layers doubled: of each pair, the first layer sees the first image, the second the second.

    The pair's key and value projections are one and belong to its first layer, where they are stored; so both images'
    keys and values come from `project_context`, and an image that stands in several pairs is projected once.
    """

    def __init__(self, config: Text, context_width: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, context_width) for _ in range(2 * config.fusion_layers))
        for second in self._layers()[1::2]:
            del second.crossattention.self.key, second.crossattention.self.value
        self.final_norm = final_norm(config)
        self.checkpointing = checkpointing
        self.apply(init_bert)

    def project_context(self, images: Tensor) -> list[KeyValue]:
        """Keys and values of every pair of layers for images [I, 1 + N, C], first and second ones alike."""
        return [layer.crossattention.self.project(images) for layer in self._layers()[::2]]

    def forward(
        self,
        queries: Tensor,
        query_mask: Tensor | None,
        first: list[KeyValue],
        second: list[KeyValue],
        cls_only: bool = False,
    ) -> Tensor:
        """Text states over both images.

        Args:
            queries: [B, L, D].
            query_mask: [B, L] int64, 1 = attend; None: attend to all.
            first, second: the B texts' images: rows of `project_context`, see `select_context`.
            cls_only: of the last layer only row 0 is wanted, and computed.

        Returns:
            [B, L, D]; [B, 1, D] with `cls_only`.
        """
        bias = additive_mask(query_mask, torch.float32)
        contexts = [kv for pair in zip(first, second, strict=True) for kv in pair]
        last = len(self.layer) - 1
        for index, (layer, kv) in enumerate(zip(self.layer, contexts, strict=True)):
            only = cls_only and index == last
            queries = run_layer(layer, self.checkpointing, queries, bias, kv, None, only)
        return self.final_norm(queries)

    @torch.no_grad()
    def start_from(self, fusion: FusionEncoder) -> None:
        """Both layers of pair i become copies of fusion layer i.

        Raises:
            ValueError: the fusion encoder has another depth.
        """
        if 2 * len(fusion.layer) != len(self.layer):
            raise ValueError(f"{len(self.layer)} layers in pairs can't start from {len(fusion.layer)} fusion layers")
        for index, layer in enumerate(self.layer):
            given = fusion.layer[index // 2].state_dict()
            layer.load_state_dict({name: given[name] for name in layer.state_dict()})
        self.final_norm.load_state_dict(fusion.final_norm.state_dict())

    def _layers(self) -> list[Any]:
        return list(self.layer)
