"""How tasks and inspection ask a system of words, phrases, tags and regions; see `System`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vlscale.config.mvptr import MvptrSystem
from vlscale.data.sample import Batch
from vlscale.errors import UserError
from vlscale.nn.regional import ConceptHead, MvpEncoder, SharedSpace
from vlscale.objectives import contrastive, grounding
from vlscale.systems.concept_attention import AttentionLayers, ConceptRows
from vlscale.systems.concept_inputs import given, image_mask
from vlscale.systems.encoding import TEMPERATURE_RANGE
from vlscale.systems.protocol import Cells, ImageStates, Progress, TextStates


class ConceptEncoding:
    """Answers from the system's parts; knows nothing of training."""

    config: MvptrSystem
    encoder: MvpEncoder
    word_head: ConceptHead
    itm_head: nn.Linear
    contrasts: bool
    """Whether there is what the contrast compares: both spaces and the scale."""
    text_space: SharedSpace
    image_space: SharedSpace
    logit_scale: nn.Parameter

    @property
    def grid(self) -> tuple[int, int]:
        """There are regions, no cells."""
        return 0, 0

    def cells(self, batch: Batch) -> Cells:
        """None."""
        regions = given(batch.regions)
        return Cells(0, 0, torch.zeros(len(regions), 0, dtype=torch.bool, device=regions.device))

    def rest(self, progress: Progress) -> bool:
        """Nothing rests in the middle of a stage."""
        return False

    def encode_image(self, batch: Batch) -> ImageStates:
        """What the multimodal encoder sees of tags and regions, [I, R, D], and the contrast's vector."""
        mask, tag_ids = image_mask(batch), given(batch.tag_ids)
        states, tags = self.encoder.encode_image(tag_ids, given(batch.regions), mask), tag_ids.shape[1]
        pooled = self.image_space(states) if self.contrasts else states.new_zeros(len(states), 0)
        return ImageStates(self.encoder.for_fusion(states, tags), self.encoder.for_fusion(mask, tags), pooled)

    def encode_text(self, batch: Batch) -> TextStates:
        """Words and phrases, [B, L, D], and the contrast's vector."""
        states = self.encoder.encode_text(batch.input_ids, batch.attention_mask)
        pooled = self.text_space(states) if self.contrasts else states.new_zeros(len(states), 0)
        return TextStates(states, batch.attention_mask, pooled)

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        """The multimodal encoder's states of words and phrases, [B, L, D]; an image of one row serves all texts."""
        count, length = text.mask.shape
        tokens, mask = image.tokens.expand(count, -1, -1), image.mask.expand(count, -1)
        return self.encoder.fuse(text.tokens.to(tokens.dtype), tokens, text.mask, mask).states[:, :length]

    def joint_feature(self, states: Tensor) -> Tensor:
        """What BERT's pooler makes of [CLS]; [B, L, D] → [B, D]."""
        return self.encoder.pool(states)

    def joint_parts(self, pooled: bool = True) -> tuple[str, ...]:
        """The encoder; without `joint_feature` its pooler is not read."""
        every = ("embeddings", "regions", "textual", "visual", "multimodal", *(("pooler",) if pooled else ()))
        return tuple(f"encoder.{name}" for name in every)

    @property
    def grounding_layer(self) -> int:
        """Index of the multimodal layer that WPG grounds phrases on."""
        return self.config.wpg.layer

    def phrase_region_scores(self, batch: Batch, spans: Tensor, layer: int | None = None) -> Tensor:
        """Cosines of phrases with their image's regions, as WPG compares them; [B, S, R] fp32, −inf in padding.

        Args:
            spans: [B, S, L] bool, the tokens of each phrase, words or concepts; it is the mean of their states.
            layer: index of the multimodal layer; default `grounding_layer`.

        Raises:
            UserError: there is no such layer.
        """
        layer, layers = self.grounding_layer if layer is None else layer, self.config.multimodal_layers
        if not 0 <= layer < layers:
            raise UserError(f"layer {layer}: the multimodal encoder has layers 0 to {layers - 1}")
        text, image = self.encode_text(batch), self.encode_image(batch)
        masks = text.mask, image.mask
        fused = self.encoder.fuse(text.tokens, image.tokens, *masks, return_layers=True, depth=layer + 1)
        return grounding.phrase_region_similarity(fused.layers[-1], spans, given(batch.region_mask))

    def phrase_parts(self, layer: int | None = None) -> tuple[str, ...]:
        """Names of the modules that `phrase_region_scores` reads: multimodal layers up to that one."""
        depth = 1 + (self.grounding_layer if layer is None else layer)
        below = tuple(f"encoder.{name}" for name in ("embeddings", "regions", "textual", "visual"))
        return below + tuple(f"encoder.multimodal.layer.{index}" for index in range(depth))

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        """VSC's similarities, [B_image, B_text] fp32; None where `fusion: merged` has no contrast."""
        return contrastive.similarities(image.pooled, text.pooled, self.divisor()) if self.contrasts else None

    def match_logits(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, 2] fp32; class 1 = match."""
        return self.itm_head(self.joint_feature(states)).float()

    def word_logits(self, states: Tensor) -> Tensor:
        """MLM logits [n, V] of fused states [n, D]."""
        return self.word_head(states).float()

    def word_decoder(self) -> tuple[Tensor, Tensor]:
        """Its own matrix, and the bias."""
        return self.word_head.decoder.weight, self.word_head.head.bias

    def attention_layers(self) -> AttentionLayers:
        """Of the three encoders; with `fusion: merged` of the one there is."""
        textual, visual, multimodal = (
            [cast(Any, layer).attention.self for layer in stack.layer]
            for stack in (self.encoder.textual, self.encoder.visual, self.encoder.multimodal)
        )
        return AttentionLayers(textual, visual, multimodal)

    def concept_rows(self) -> ConceptRows:
        """Words, which are tags too, and phrases."""
        return ConceptRows(self.encoder.embeddings.word_rows(), self.encoder.embeddings.phrase_rows())

    def divisor(self) -> Tensor:
        """The learned temperature, in its range."""
        return contrastive.clamped_temperature((-self.logit_scale.float()).exp(), *TEMPERATURE_RANGE)
