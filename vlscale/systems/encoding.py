"""How tasks and inspection ask a system of two encoders and a fusion encoder with text queries; see `System`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.data.sample import Batch
from vlscale.nn.bert import FusionEncoder, TextEncoder
from vlscale.nn.heads import MlmHead
from vlscale.nn.vision import VisionEncoder
from vlscale.objectives.contrastive import clamped_temperature, similarities
from vlscale.systems.protocol import Cells, ImageStates, Progress, TextStates

TEMPERATURE_RANGE = (0.001, 0.5)


class PairEncoding:
    """Answers from the parts that these systems name alike; knows nothing of training."""

    vision: VisionEncoder
    text_encoder: TextEncoder
    fusion_encoder: FusionEncoder
    vision_proj: nn.Linear
    text_proj: nn.Linear
    itm_head: nn.Linear
    mlm_head: MlmHead
    temperature: nn.Parameter

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.vision.grid

    def cells(self, batch: Batch) -> Cells:
        """All patches of a square image."""
        rows, columns = self.grid
        valid = torch.ones(len(batch.images), rows * columns, dtype=torch.bool, device=batch.images.device)
        return Cells(rows, columns, valid)

    def rest(self, progress: Progress) -> bool:
        """Nothing ever rests."""
        return False

    def encode_image(self, batch: Batch) -> ImageStates:
        """Image states; `batch.images` is float and normalised."""
        tokens = self.vision(batch.images)
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        return ImageStates(tokens, mask, self.image_feature(tokens))

    def encode_text(self, batch: Batch) -> TextStates:
        """Text states."""
        tokens = self.text_encoder(batch.input_ids, batch.attention_mask)
        return TextStates(tokens, batch.attention_mask, self.text_feature(tokens))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        """Text queries over image tokens; [B, L, D]."""
        context = self.fusion_encoder.project_context(image.tokens)
        return self.fusion_encoder(text.tokens, text.mask, context, image.mask)

    def joint_feature(self, states: Tensor) -> Tensor:
        """[CLS]; [B, L, D] → [B, D]."""
        return states[:, 0]

    def joint_parts(self, pooled: bool = True) -> tuple[str, ...]:
        """The three encoders."""
        return "vision", "text_encoder", "fusion_encoder"

    def word_attention(self) -> list[nn.Module]:
        """Cross-attention of every fusion layer; see `vlscale.systems.gradcam`."""
        layers: list[Any] = list(self.fusion_encoder.layer)
        return [layer.crossattention.self for layer in layers]

    def cls_attention(self) -> list[nn.Module]:
        """Self-attention of every block of the image encoder."""
        return [block.attn for block in self.vision.vit.blocks]

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        """Cosines over the temperature, [B_image, B_text] fp32."""
        return similarities(image.pooled, text.pooled, self.divisor())

    def match_logits(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, 2]; class 1 = match."""
        return self.itm_head(self.joint_feature(states)).float()

    def word_logits(self, states: Tensor) -> Tensor:
        """MLM logits [n, V] of fused states [n, D]."""
        return self.mlm_head(states, self.text_encoder.embeddings.word_embeddings.weight).float()

    def word_decoder(self) -> tuple[Tensor, Tensor]:
        """The word embeddings, to which the head is tied, and its bias."""
        return self.text_encoder.embeddings.word_embeddings.weight, self.mlm_head.bias

    def image_feature(self, tokens: Tensor) -> Tensor:
        """CLS of [B, 1 + N, D] in the shared space, [B, d] fp32, unit length."""
        return F.normalize(self.vision_proj(tokens[:, 0]).float(), dim=-1)

    def text_feature(self, tokens: Tensor) -> Tensor:
        """CLS of [B, L, D] in the shared space, [B, d] fp32, unit length."""
        return F.normalize(self.text_proj(tokens[:, 0]).float(), dim=-1)

    def divisor(self) -> Tensor:
        """The learned temperature, in its range."""
        return clamped_temperature(self.temperature, *TEMPERATURE_RANGE)
