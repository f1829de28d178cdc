"""One transformer over the words and the visual tokens of a pair (SOHO, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.config import Joint
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.attention import additive_mask
from vlscale.nn.bert import BertLayer, Embeddings, final_norm, init_bert, read_bert, run_layer, take


class JointEncoder(nn.Module):
    """BERT whose input is word embeddings with visual tokens behind them; the caller joins the two.

    Visual tokens bring their own positions and no segment: what marks them as visual is what they are.
    """

    def __init__(self, config: Joint, vocabulary: Vocabulary, checkpointing: bool = False) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, vocabulary)
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.final_norm = final_norm(config)
        self.checkpointing = checkpointing
        self.apply(init_bert)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Words' part of the input: input_ids [B, L] int64, L at most `max_positions` → [B, L, D]."""
        return self.embeddings(input_ids)

    def forward(self, states: Tensor, mask: Tensor, cls_only: bool = False) -> Tensor:
        """All tokens attend to all that the mask lets be seen.

        Args:
            states: [B, T, D], words first: row 0 is [CLS].
            mask: [B, T] int64, 1 = attend.
            cls_only: of the last layer only row 0 is wanted, and computed.

        Returns:
            [B, T, D]; [B, 1, D] with `cls_only`.
        """
        bias = additive_mask(mask, torch.float32)
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            only = cls_only and index == last
            states = run_layer(layer, self.checkpointing, states, bias, None, None, only)
        return self.final_norm(states)


def load_joint(source: str, encoder: JointEncoder) -> None:
    """Start from a `transformers` BERT by name or local folder: its embeddings and first layers.

    Raises:
        UserError: it can't be had, has too few layers or another width or vocabulary.
    """
    weights, depth = read_bert(source)
    if depth < len(encoder.layer):
        raise UserError(f"system.text.init: {source} has {depth} layers, system.text.layers needs {len(encoder.layer)}")
    take(encoder.embeddings, weights, "bert.embeddings.", source)
    for index, layer in enumerate(encoder.layer):
        take(layer, weights, f"bert.encoder.layer.{index}.", source)
