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


class ClassHead(nn.Module):
    """Linear, ReLU, dropout, linear, over a pair's [CLS].

    `hidden` is the width for ALBEF's visual entailment and NLVR2, three times the width for MVPTR's entailment.
    """

    def __init__(self, width: int, classes: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )
        self.apply(init_bert)

    def forward(self, states: Tensor) -> Tensor:
        """states [B, D] → logits [B, classes]."""
        return self.layers(states)


class AnswerHead(ClassHead):
    """Classifier over answers, four times the width inside (SOHO's VQA head)."""

    def __init__(self, width: int, answers: int, dropout: float = 0.5) -> None:
        super().__init__(width, answers, 4 * width, dropout)


class WordAnswerHead(nn.Linear):
    """Classifier over answers whose rows start from the answers' words (MVPTR's VQA head)."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__(width, answers)
        self.apply(init_bert)

    @torch.no_grad()
    def start_from(self, decoder: Tensor, bias: Tensor, pieces: Tensor, pad: int) -> None:
        """Every answer's weight and bias become the mean of its word pieces' in the masked-word head.

        Args:
            decoder: [V, D], the masked-word head's decoder, or the word embeddings where it is tied to them.
            bias: [V] of that head.
            pieces: [answers, n] int64, word pieces of each answer without special tokens, filled up by `pad`.
            pad: padding id.

        Raises:
            ValueError: another number of answers, or one without pieces.
        """
        if len(pieces) != self.out_features or bool(pieces.eq(pad).all(1).any()):
            raise ValueError(
                f"expected the pieces of {self.out_features} answers, none empty, not {list(pieces.shape)}"
            )
        both = torch.cat([decoder, bias[:, None]], dim=1)  # [V, D + 1]
        means = nn.functional.embedding_bag(pieces, both, mode="mean", padding_idx=pad)
        self.weight.copy_(means[:, :-1])
        self.bias.copy_(means[:, -1])
