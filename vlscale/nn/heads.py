"""Prediction heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.nn.bert import LAYER_NORM_EPS, init_bert


class _Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(nn.functional.gelu(self.dense(states)))


class MlmHead(nn.Module):
    """BERT's masked-word head; its decoder is the word-embedding table, passed in so that it is stored once."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = _Transform(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_bert)

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """states [n, D], word_embeddings [V, D] → logits [n, V]."""
        return nn.functional.linear(self.transform(states), word_embeddings, self.bias)


class AnswerHead(nn.Module):
    """Classifier over answers: linear to four times the width, ReLU, dropout, linear (SOHO's VQA head)."""

    def __init__(self, width: int, answers: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, answers)
        )
        self.apply(init_bert)

    def forward(self, states: Tensor) -> Tensor:
        """states [B, D] → logits [B, answers]."""
        return self.layers(states)
