"""Answers word by word over a question's fused states (ALBEF, section 3.4, VQA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlscale.config import Text
from vlscale.data.sample import Vocabulary
from vlscale.nn.attention import additive_mask
from vlscale.nn.bert import BertLayer, Embeddings, FusionEncoder, KeyValue, final_norm, init_bert, run_layer
from vlscale.nn.heads import MlmHead


class AnswerDecoder(nn.Module):
    """BERT layers that see the words so far and, by cross-attention, the question; the head is tied to the words.

    The embeddings are its own, not the question's: they start equal and part in training, as in the release.
    """

    def __init__(
        self, config: Text, vocabulary: Vocabulary, layers: int | None = None, checkpointing: bool = False
    ) -> None:
        """`layers`: as many as the fusion encoder has, unless said otherwise."""
        super().__init__()
        depth = config.fusion_layers if layers is None else layers
        self.embeddings = Embeddings(config, vocabulary)
        self.layer = nn.ModuleList(BertLayer(config, config.width) for _ in range(depth))
        self.final_norm = final_norm(config)
        self.mlm_head = MlmHead(config.width, vocabulary.size)
        self.checkpointing = checkpointing
        self.apply(init_bert)

    def project_context(self, states: Tensor) -> list[KeyValue]:
        """Keys and values of every layer for questions [B, M, D]: once, for all the answers that are asked of each."""
        layers: list[Any] = list(self.layer)
        return [layer.crossattention.self.project(states) for layer in layers]

    def forward(
        self, answer_ids: Tensor, answer_mask: Tensor, context: list[KeyValue], question_mask: Tensor | None = None
    ) -> Tensor:
        """States that predict the next word.

        Args:
            answer_ids: [n, L] int64, [CLS] answer [SEP] padding.
            answer_mask: [n, L] int64, 1 = attend.
            context: of the n answers' questions: rows of `project_context`, see `select_context`.
            question_mask: [n, M] int64, or None: attend to all.

        Returns:
            [n, L, D]; row p has seen the words up to p.
        """
        states = self.embeddings(answer_ids)
        bias, context_bias = _causal_mask(answer_mask, torch.float32), additive_mask(question_mask, torch.float32)
        for layer, kv in zip(self.layer, context, strict=True):
            states = run_layer(layer, self.checkpointing, states, bias, kv, context_bias)
        return self.final_norm(states)

    def word_logits(self, states: Tensor) -> Tensor:
        """[…, D] → […, V]."""
        return self.mlm_head(states, self.embeddings.word_embeddings.weight)

    @torch.no_grad()
    def start_from(self, fusion: FusionEncoder, embeddings: Embeddings, mlm_head: MlmHead) -> list[str]:
        """Copy the fusion layers, the text's embeddings and the masked-word head, as ALBEF's release starts VQA.

        Keys and values of the cross-attention read a question here and an image there. They are copied all the same
        where image and text have one width; else they can't be and keep their initialisation.

        Returns:
            Names of the parameters that were not copied; empty where the widths are equal.

        Raises:
            ValueError: the fusion encoder has another depth.
        """
        if len(fusion.layer) != len(self.layer):
            raise ValueError(
                f"a decoder of {len(self.layer)} layers can't start from {len(fusion.layer)} fusion layers"
            )
        self.embeddings.load_state_dict(embeddings.state_dict())
        self.mlm_head.load_state_dict(mlm_head.state_dict())
        self.final_norm.load_state_dict(fusion.final_norm.state_dict())
        own, given = self.layer.state_dict(), fusion.layer.state_dict()
        fresh = [name for name, value in own.items() if given[name].shape != value.shape]
        self.layer.load_state_dict({name: own[name] if name in fresh else given[name] for name in own})
        return [f"layer.{name}" for name in fresh]


def _causal_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, L] with 1 = attend → [n, 1, L, L]: 0 where row p may see column q ≤ p, the dtype's minimum elsewhere."""
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen = earlier & mask.bool()[:, None, :]  # [n, L, L]
    bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
