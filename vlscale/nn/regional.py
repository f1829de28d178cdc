"""MVPTR's encoders (section 3): words with phrases, tags with regions, and both together.

Parameters carry the names of `transformers`' BERT inside each part, so that its checkpoints map layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale.config.bert import Bert
from vlscale.config.mvptr import MvptrSystem
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.attention import additive_mask
from vlscale.nn.bert import LAYER_NORM_EPS, BertLayer, final_norm, init_bert, read_bert, run_layer, take
from vlscale.nn.heads import MlmHead

TEXT, IMAGE = 0, 1
"""Segments: words and phrases, and tags. Regions have none."""
BOX_NUMBERS = 6
"""Behind a region's feature: x1, y1, x2, y2, width, height as shares of the image."""


class Fused(NamedTuple):
    """What the multimodal encoder gives."""

    states: Tensor
    """[B, T, D] of the last layer that ran; [B, 1, D] with `cls_only`."""
    layers: tuple[Tensor, ...]
    """[B, T, D] after each layer, before a final norm; empty unless asked for."""


class ConceptEmbeddings(nn.Module):
    """One table for words, tags and phrases, positions, two segments, LayerNorm, dropout."""

    def __init__(self, config: Bert, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.words, self.pad = vocabulary.size, vocabulary.pad
        self.word_embeddings = nn.Embedding(self.words + vocabulary.phrases, config.width, padding_idx=vocabulary.pad)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, segment: int | Tensor) -> Tensor:
        """Embed a sequence, positions counted from its start over padding.

        Args:
            ids: [B, L] int64; phrase p is `words` + p.
            segment: of the whole sequence, or [B, L] int64 of every position.

        Returns:
            [B, L, D].
        """
        states = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(states + self.token_type_embeddings.weight[segment]))

    def word_rows(self) -> Tensor:
        """[words, D], a view of the table."""
        return self.word_embeddings.weight[: self.words]

    def phrase_rows(self) -> Tensor:
        """[phrases, D], a view of the table: what the phrase head is tied to."""
        return self.word_embeddings.weight[self.words :]

    @torch.no_grad()
    def start_phrases(self, pieces: Sequence[Sequence[int]]) -> None:
        """Every phrase's embedding becomes the mean of its words' (section 3.1.1).

        Args:
            pieces: word pieces of each phrase of the vocabulary, at least one.
        """
        if not pieces:
            return
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in pieces], batch_first=True, padding_value=self.pad)
        table = self.word_embeddings.weight
        rows = nn.functional.embedding_bag(ids.to(table.device), table, mode="mean", padding_idx=self.pad)
        self.phrase_rows().copy_(rows)


class RegionEmbedding(nn.Module):
    """A region's feature and box to the width of a token: no position, no segment."""

    def __init__(self, config: Bert, region_width: int, norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(region_width + BOX_NUMBERS, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS) if norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """[B, R, region_width + 6] → [B, R, D]."""
        return self.dropout(self.LayerNorm(self.dense(features)))


class _Stack(nn.Module):
    """BERT layers; none of them give back what they are given."""

    def __init__(self, config: Bert, layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(layers))
        self.final_norm = final_norm(config) if layers else nn.Identity()
        self.checkpointing = checkpointing

    def forward(
        self, states: Tensor, mask: Tensor, depth: int | None = None, keep: bool = False, cls_only: bool = False
    ) -> Fused:
        bias = additive_mask(mask, torch.float32)
        last, kept = len(self.layer) - 1, []
        for index, layer in enumerate(self.layer[:depth]):
            states = run_layer(layer, self.checkpointing, states, bias, None, None, cls_only and index == last)
            if keep:
                kept.append(states)
        whole = depth is None or depth > last
        return Fused(self.final_norm(states) if whole else states, tuple(kept))


class MvpEncoder(nn.Module):
    """Embeddings and three stacks of BERT layers: textual, visual and multimodal (Fig. 3).

    With `fusion: merged` the uni-modal stacks are empty, and the multimodal one sees embeddings, tags among them
    (Table 4): attention does not ask in which order words, phrases, tags and regions stand.
    """

    def __init__(self, config: MvptrSystem, region_width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        sizes, merged, again = config.text, config.fusion == "merged", config.checkpoint_activations
        alone = 0 if merged else sizes.layers
        self.embeddings = ConceptEmbeddings(sizes, vocabulary)
        self.regions = RegionEmbedding(sizes, region_width, config.region_norm)
        self.textual = _Stack(sizes, alone, again)
        self.visual = _Stack(sizes, alone, again)
        self.multimodal = _Stack(sizes, config.multimodal_layers, again)
        self.pooler = nn.Linear(sizes.width, sizes.width)
        self.keep_tags = merged or config.tags_in_fusion
        self.apply(init_bert)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[CLS] words phrases [SEP]: ids, mask [B, L] int64 (1 = attend) → [B, L, D]."""
        return self.textual(self.embeddings(ids, TEXT), mask).states

    def encode_image(self, tag_ids: Tensor, features: Tensor, mask: Tensor, segment: int | Tensor = IMAGE) -> Tensor:
        """[CLS] tags [SEP] regions.

        Args:
            tag_ids: [B, Lt] int64.
            features: [B, R, region_width + 6].
            mask: [B, Lt + R] int64, tags first.
            segment: of the tags, or [B, Lt] int64.

        Returns:
            [B, Lt + R, D], what MCR and VSC read; `for_fusion` takes of it what the multimodal encoder sees.
        """
        tags = self.embeddings(tag_ids, segment)
        regions = self.regions(features).to(tags.dtype)
        return self.visual(torch.cat([tags, regions], dim=1), mask).states

    def for_fusion(self, states: Tensor, tags: int) -> Tensor:
        """Leave the tags out (section 3.3.1), or, where they are kept, their [CLS]; also of a mask.

        Args:
            states: [B, Lt + R, …] of `encode_image`, or the mask that went with it.
            tags: Lt.

        Returns:
            [B, R, …], or [B, Lt − 1 + R, …] with `tags_in_fusion`.
        """
        return states[:, 1 if self.keep_tags else tags :]

    def fuse(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        image_mask: Tensor,
        *,
        return_layers: bool = False,
        depth: int | None = None,
        cls_only: bool = False,
    ) -> Fused:
        """Text and image states through the multimodal stack.

        Args:
            text: [B, L, D]; its first row is the pair's [CLS].
            image: [B, R, D] of `for_fusion`: regions last.
            text_mask, image_mask: [B, L] and [B, R] int64, 1 = attend.
            return_layers: keep every layer's states; WPG reads the third.
            depth: run the first so many layers only: all that WPG's own negatives need.
            cls_only: of the last layer only row 0 is wanted, and computed.
        """
        states = torch.cat([text, image.to(text.dtype)], dim=1)
        mask = torch.cat([text_mask, image_mask], dim=1)
        return self.multimodal(states, mask, depth, return_layers, cls_only)

    def pool(self, states: Tensor) -> Tensor:
        """tanh of the projected [CLS], which ITM and the tasks' heads read; [B, T, D] → [B, D]."""
        return self.pooler(states[:, 0]).tanh()


class ConceptHead(nn.Module):
    """Words or tags of states: BERT's transform and a decoder of its own, which starts from the word embeddings.

    The phrase head is plain `MlmHead`, tied to `ConceptEmbeddings.phrase_rows`; its label p is phrase p.
    """

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.head = MlmHead(width, words)
        self.decoder = nn.Linear(width, words, bias=False)
        self.apply(init_bert)

    def forward(self, states: Tensor) -> Tensor:
        """[n, D] → logits [n, words]."""
        return self.head(states, self.decoder.weight)

    @torch.no_grad()
    def start_from(self, word_rows: Tensor) -> None:
        """Copy the word embeddings [words, D] into the decoder."""
        self.decoder.weight.copy_(word_rows)


class SharedSpace(nn.Module):
    """[CLS] states to unit vectors that VSC compares: a bias-free matrix, or nothing, before the norm."""

    def __init__(self, width: int, proj: bool) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Identity()
        if proj:
            self.proj = nn.Linear(width, width, bias=False)
            nn.init.normal_(self.proj.weight, std=width**-0.5)  # a random rotation, nearly: cosines start as they are

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, D] of unit length, fp32."""
        return nn.functional.normalize(self.proj(states[:, 0]).float(), dim=1)


def load_regional(source: str, encoder: MvpEncoder, heads: Sequence[ConceptHead]) -> None:
    """Start from a `transformers` BERT by name or local folder: first layers → textual and visual, last → multimodal.

    Words get its embeddings, heads its transform and these words as decoder; phrases keep theirs until
    `start_phrases`.

    Raises:
        UserError: it can't be had, has too few layers or another width or vocabulary.
    """
    weights, depth = read_bert(source)
    needed = len(encoder.textual.layer) + len(encoder.multimodal.layer)
    if depth < needed:
        raise UserError(f"system.text.init: {source} has {depth} layers, textual and multimodal encoders need {needed}")
    embeddings = encoder.embeddings
    words = weights["bert.embeddings.word_embeddings.weight"]
    if words.shape != embeddings.word_rows().shape:
        expected = tuple(embeddings.word_rows().shape)
        raise UserError(f"system.text.init: {source}: word embeddings: expected {expected}, found {tuple(words.shape)}")
    table = torch.cat([words, embeddings.phrase_rows().detach()])
    take(embeddings, weights | {"bert.embeddings.word_embeddings.weight": table}, "bert.embeddings.", source)
    last = depth - len(encoder.multimodal.layer)
    for stack, first in ((encoder.textual, 0), (encoder.visual, 0), (encoder.multimodal, last)):
        for index, layer in enumerate(stack.layer):
            take(layer, weights, f"bert.encoder.layer.{first + index}.", source)
    for head in heads:
        take(head.head, weights, "cls.predictions.", source)
        head.start_from(words)
