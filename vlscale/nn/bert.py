"""BERT-compatible text and fusion encoders (Devlin et al. 2019; ALBEF, section 3.1).

Parameters carry the names of `transformers`' BERT, so that its checkpoints map layer by layer: the first layers
become the text encoder, the last ones the fusion encoder, whose cross-attention starts fresh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlscale.config import Bert, Text
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.attention import additive_mask, attend, split_heads

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02


class KeyValue(NamedTuple):
    """Cross-attention keys and values of one fusion layer, computed once per image or text."""

    key: Tensor
    """[B, h, M, d]."""
    value: Tensor
    """[B, h, M, d]."""


def select_context(context: list[KeyValue], index: Tensor) -> list[KeyValue]:
    """Rows `index` [B'] of every layer's keys and values."""
    return [KeyValue(kv.key[index], kv.value[index]) for kv in context]


def concat_context(*contexts: list[KeyValue]) -> list[KeyValue]:
    """Contexts of equal length M behind one another along the batch."""
    return [
        KeyValue(torch.cat([kv.key for kv in layer]), torch.cat([kv.value for kv in layer]))
        for layer in zip(*contexts, strict=True)
    ]


class _Projections(nn.Module):
    """Query, key and value; key and value may read another width."""

    def __init__(self, config: Bert, context_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)

    def project(self, context: Tensor) -> KeyValue:
        return KeyValue(split_heads(self.key(context), self.heads), split_heads(self.value(context), self.heads))

    def forward(self, states: Tensor, context: KeyValue, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(split_heads(self.query(states), self.heads), context.key, context.value, bias, dropout)


class _Output(nn.Module):
    """Dense, dropout and the block's LayerNorm: after the residual (`post`) or before the block (`pre`)."""

    def __init__(self, config: Bert, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.pre = config.norm == "pre"

    def before(self, states: Tensor) -> Tensor:
        return self.LayerNorm(states) if self.pre else states

    def forward(self, update: Tensor, residual: Tensor) -> Tensor:
        states = self.dropout(self.dense(update)) + residual
        return states if self.pre else self.LayerNorm(states)


class _Attention(nn.Module):
    def __init__(self, config: Bert, context_width: int | None = None) -> None:
        super().__init__()
        self.self = _Projections(config, context_width or config.width)
        self.output = _Output(config, config.width)


class _Intermediate(nn.Module):
    def __init__(self, config: Bert) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.intermediate)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(states))


class BertLayer(nn.Module):
    """Self-attention, optional cross-attention, feed-forward."""

    def __init__(self, config: Bert, context_width: int | None = None) -> None:
        super().__init__()
        self.attention = _Attention(config)
        if context_width is not None:
            self.crossattention = _Attention(config, context_width)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate)

    def forward(
        self,
        states: Tensor,
        bias: Tensor | None,
        context: KeyValue | None = None,
        context_bias: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; with `cls_only` only row 0 leaves the layer, [B, 1, D]."""
        block = self.attention
        normed = block.output.before(states)
        keys = block.self.project(normed)
        if cls_only:
            states, normed = states[:, :1], normed[:, :1]
        states = block.output(block.self(normed, keys, bias), states)
        if context is not None:
            cross = self.crossattention
            states = cross.output(cross.self(cross.output.before(states), context, context_bias), states)
        return self.output(self.intermediate(self.output.before(states)), states)


class Embeddings(nn.Module):
    """Word + position + segment 0, LayerNorm, dropout. Positions count on over padding, as in the release."""

    def __init__(self, config: Bert, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary.size, config.width, padding_idx=vocabulary.pad)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        states = self.word_embeddings(input_ids) + self.position_embeddings.weight[:length]
        return self.dropout(self.LayerNorm(states + self.token_type_embeddings.weight[0]))


class TextEncoder(nn.Module):
    """Embeddings and the uni-modal layers."""

    def __init__(self, config: Text, vocabulary: Vocabulary, checkpointing: bool = False) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, vocabulary)
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.text_layers))
        self.final_norm = final_norm(config)
        self.checkpointing = checkpointing
        self.apply(init_bert)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids, mask [B, L] int64 (1 = attend) → [B, L, D]."""
        states = self.embeddings(input_ids)
        bias = additive_mask(mask, torch.float32)
        for layer in self.layer:
            states = run_layer(layer, self.checkpointing, states, bias)
        return self.final_norm(states)


class FusionEncoder(nn.Module):
    """Layers with cross-attention. Which modality asks and which answers is the caller's choice."""

    def __init__(self, config: Text, context_width: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, context_width) for _ in range(config.fusion_layers))
        self.final_norm = final_norm(config)
        self.checkpointing = checkpointing
        self.apply(init_bert)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of every layer for a context [B, M, C]: once, for all passes that read it."""
        layers: list[Any] = list(self.layer)
        return [layer.crossattention.self.project(context) for layer in layers]

    def forward(
        self,
        queries: Tensor,
        query_mask: Tensor | None,
        context: list[KeyValue],
        context_mask: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """queries [B, L, D], masks [B, L] and [B, M] (None: attend to all) → [B, L, D]; [B, 1, D] with `cls_only`."""
        bias, context_bias = additive_mask(query_mask, torch.float32), additive_mask(context_mask, torch.float32)
        last = len(self.layer) - 1
        for index, (layer, kv) in enumerate(zip(self.layer, context, strict=True)):
            only = cls_only and index == last
            queries = run_layer(layer, self.checkpointing, queries, bias, kv, context_bias, only)
        return self.final_norm(queries)


def run_layer(layer: nn.Module, checkpointing: bool, *arguments: object) -> Tensor:
    """One layer, recomputed in the backward pass when `checkpointing`."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False)
    return layer(*arguments)


def init_bert(module: nn.Module) -> None:
    """BERT's initialisation: N(0, 0.02) weights, zero biases, zero padding row."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def load_bert(source: str, text: TextEncoder, fusion: FusionEncoder, head: nn.Module) -> None:
    """Start from a `transformers` BERT by name or local folder: first layers → text, last → fusion, head → head.

    Raises:
        UserError: it can't be had, has too few layers or another width or vocabulary.
    """
    weights, depth = read_bert(source)
    if depth < len(text.layer) + len(fusion.layer):
        needed = len(text.layer) + len(fusion.layer)
        raise UserError(f"system.text.init: {source} has {depth} layers, text and fusion need {needed}")
    first_fusion = depth - len(fusion.layer)
    take(text.embeddings, weights, "bert.embeddings.", source)
    for index, layer in enumerate(text.layer):
        take(layer, weights, f"bert.encoder.layer.{index}.", source)
    for index, layer in enumerate(fusion.layer):
        take(layer, weights, f"bert.encoder.layer.{first_fusion + index}.", source, fresh="crossattention.")
    take(head, weights, "cls.predictions.", source)


def read_bert(source: str) -> tuple[dict[str, Tensor], int]:
    """Weights of a `transformers` BERT by name or local folder, under its masked-word model's names, and its depth.

    Raises:
        UserError: it can't be had.
    """
    from transformers import AutoModelForMaskedLM

    try:
        model = AutoModelForMaskedLM.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"system.text.init: {source}: {str(error).splitlines()[0]}") from None
    return model.state_dict(), model.config.num_hidden_layers


def take(module: nn.Module, weights: dict[str, Tensor], prefix: str, source: str, fresh: str | None = None) -> None:
    """Fill a module from the weights whose names start with `prefix`; names that start with `fresh` keep theirs.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    own = module.state_dict()
    for name, value in own.items():
        if fresh and name.startswith(fresh):
            continue
        given = weights.get(prefix + name)
        if given is None or given.shape != value.shape:
            got = "nothing" if given is None else tuple(given.shape)
            raise UserError(f"system.text.init: {source}: {prefix}{name}: expected {tuple(value.shape)}, found {got}")
        own[name] = given
    module.load_state_dict(own)


def final_norm(config: Bert) -> nn.Module:
    """What follows the last layer: pre-norm stacks end un-normalised, post-norm ones don't."""
    return nn.LayerNorm(config.width, eps=LAYER_NORM_EPS) if config.norm == "pre" else nn.Identity()
