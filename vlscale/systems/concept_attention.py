"""Attention among words, phrases, tags and regions, as MVPTR's Fig. 4 draws it, and the concepts' own embeddings.

Written for any system that reads `data.concepts`, in one encoder or in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.data.sample import Batch
from vlscale.errors import UserError
from vlscale.nn.attention import recorded_attention
from vlscale.systems.gradcam import pick
from vlscale.systems.protocol import ImageStates, TextStates, offers


class AttentionLayers(NamedTuple):
    """Self-attention of every layer of each encoder, first layer first."""

    textual: Sequence[nn.Module]
    """Over the text. Empty, as is `visual`, where one encoder reads everything."""
    visual: Sequence[nn.Module]
    """Over the tags, then the regions."""
    multimodal: Sequence[nn.Module]
    """Over the text, then what `encode_image` gives: regions last, before them the tags, if any, without [CLS]."""


class ConceptRows(NamedTuple):
    """Embeddings before position, segment and norm."""

    words: Tensor
    """[V, D]; tags are words."""
    phrases: Tensor
    """[phrases, D]."""


class ReadsConcepts(Protocol):
    """A system whose attention runs over words, phrases, tags and regions."""

    def attention_layers(self) -> AttentionLayers:
        """The modules that call `attend`, of each encoder as many layers or none."""
        ...

    def concept_rows(self) -> ConceptRows:
        """Views of the table of embeddings."""
        ...

    def encode_image(self, batch: Batch) -> ImageStates: ...

    def encode_text(self, batch: Batch) -> TextStates: ...

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor: ...


class ConceptAttention(NamedTuple):
    """Attention probabilities of one layer, fp32; who attends stands in the rows. L, T and R as in `Batch`.

    A row sums to 1 over all that its encoder sees, and is 0 at padding. Where one encoder reads everything, `textual`
    and `visual` are its parts: the rest of their rows lies with the other modality.
    """

    textual: Tensor
    """[B, h, L, L]: [CLS] words phrases [SEP]."""
    visual: Tensor
    """[B, h, T + R, T + R]: [CLS] tags [SEP] regions. Where one encoder reads everything the tags' [CLS] is not among
    it: its row and column are 0."""
    text_to_text: Tensor
    """[B, h, L, L], of the multimodal encoder, as what follows."""
    text_to_regions: Tensor
    """[B, h, L, R]."""
    text_to_tags: Tensor
    """[B, h, L, T]; 0 where the multimodal encoder sees no tags."""
    layer: int
    """From 0, of each encoder."""


def concept_attention(
    system: ReadsConcepts, batch: Batch, layer: int | None = None, head: int | None = None
) -> ConceptAttention:
    """Who attends to whom in a layer of each encoder, for pairs as evaluation sees them.

    Args:
        batch: as many texts as images.
        layer: from 0; None: the last.
        head: from 0; None: the mean over all. Either way h is 1.

    Raises:
        UserError: there is no such layer or head.
    """
    assert batch.tag_ids is not None
    assert batch.region_mask is not None
    layers = system.attention_layers()
    chosen = pick("layer", layer, len(layers.multimodal), len(layers.multimodal) - 1)
    modules = {name: stack[chosen] for name, stack in layers._asdict().items() if stack}
    with torch.no_grad(), recorded_attention(modules) as found:
        system.fuse(system.encode_text(batch), system.encode_image(batch))
    seen = {name: _of_head(probabilities, head) for name, probabilities in found.items()}
    length, tags, regions = batch.input_ids.shape[1], batch.tag_ids.shape[1], batch.region_mask.shape[1]
    joint = seen["multimodal"]
    to_text, to_image = joint[:, :, :length, :length], joint[:, :, :length, length:]
    to_tags = to_image[..., : to_image.shape[3] - regions]
    return ConceptAttention(
        textual=seen.get("textual", to_text),
        visual=seen["visual"] if "visual" in seen else F.pad(joint[:, :, length:, length:], (1, 0, 1, 0)),
        text_to_text=to_text,
        text_to_regions=to_image[..., to_image.shape[3] - regions :],
        text_to_tags=F.pad(to_tags, (tags - to_tags.shape[3], 0)),
        layer=chosen,
    )


def resting(system: ReadsConcepts) -> bool:
    """Whether the multimodal encoder is not trained in the run's stage."""
    layers = system.attention_layers().multimodal
    return not any(weight.requires_grad for layer in layers for weight in layer.parameters())


def as_reader(system: Any, name: str) -> ReadsConcepts:
    """The system, if it reads concepts.

    Args:
        name: of the run, for the error.

    Raises:
        UserError: it does not.
    """
    if not offers(system, ReadsConcepts):
        raise UserError(f"{name}: its system reads no phrases, tags or regions, so there are no concepts to look at")
    return system


def _of_head(probabilities: Tensor, head: int | None) -> Tensor:
    """[B, h, …] → one head or the mean over them, [B, 1, …] fp32."""
    if head is None:
        return probabilities.float().mean(1, keepdim=True)
    number = pick("head", head, probabilities.shape[1], 0)
    return probabilities[:, number : number + 1].float()
