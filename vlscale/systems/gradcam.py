"""Grad-CAM: which cells of an image speak for a match, or for a similarity (Selvaraju et al. 2017).

As ALBEF's release draws it (section 6.2 of the paper): attention probabilities times their gradient where that is
positive, averaged over the heads. Written for any system whose words, or whose image's [CLS], attend to cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from vlscale.data.sample import Batch
from vlscale.errors import UserError
from vlscale.nn.attention import recorded_attention
from vlscale.systems.protocol import System, offers


class WordsOverCells(Protocol):
    """A system whose `fuse` lets words attend to the cells of an image."""

    def word_attention(self) -> Sequence[nn.Module]:
        """The attention of every layer, first layer first: its rows begin with the L words, its columns end with the
        cells of `System.cells`."""
        ...


class ClsOverCells(Protocol):
    """A system whose image feature is a [CLS] that attends to the cells."""

    def cls_attention(self) -> Sequence[nn.Module]:
        """The attention of every layer of the image encoder, first layer first: its row 0 is [CLS], its columns end
        with the cells of `System.cells`."""
        ...


class GradCam(NamedTuple):
    """Evidence for a match."""

    maps: Tensor
    """[B, L, rows, columns] fp32, at least 0: one map per token of the text, 0 where the text is padding."""
    match_logits: Tensor
    """[B, 2] fp32; class 1 = match."""
    layer: int
    """The one that was looked at, from 0."""

    def whole(self) -> Tensor:
        """The text's own map, [B, rows, columns]: the mean over L, padding included, as in the release."""
        return self.maps.mean(1)


class ContrastCam(NamedTuple):
    """Evidence for the similarity of a pair."""

    maps: Tensor
    """[B, rows, columns] fp32, at least 0."""
    similarity: Tensor
    """[B] fp32, the pairs' cosines over the temperature."""
    layer: int
    """The one that was looked at, from 0."""


def gradcam(system: System, batch: Batch, layer: int | None = None, head: int | None = None) -> GradCam:
    """Where each word sees evidence that image and text match.

    The pairs' own gradients do not mix: the sum of their match logits is what is derived. Parameters get none.

    Args:
        batch: float images, normalised; as many as texts, or one for all.
        layer: of `word_attention`, from 0; None: the middle one, which of six is the release's (BERT's layer 8).
        head: None: the mean over all.

    Raises:
        UserError: the system's words attend to no cells, or it has no such layer or head.
    """
    modules = word_layers(system)
    chosen = pick("layer", layer, len(modules), (len(modules) - 1) // 2)
    cells = system.cells(batch)
    with _gradients():
        with torch.no_grad():
            image, text = system.encode_image(batch), system.encode_text(batch)
        with recorded_attention({"words": modules[chosen]}) as found:
            logits = system.match_logits(system.fuse(text, image))
            relevance = _relevance(found["words"], logits[:, 1].sum(), head)  # [B, T, M]
    words = text.mask.shape[1]
    maps = relevance[:, :words, -cells.rows * cells.columns :] * text.mask[:, :, None]  # [B, L, N]
    return GradCam(maps.unflatten(2, (cells.rows, cells.columns)), logits.detach(), chosen)


def contrast_gradcam(system: System, batch: Batch, layer: int | None = None, head: int | None = None) -> ContrastCam:
    """Where the image encoder sees evidence that its image is similar to the text.

    Args:
        batch: float images, normalised, as many as texts.
        layer: of `cls_attention`, from 0; None: the last, as in the release.
        head: None: the mean over all.

    Raises:
        UserError: the system compares no features, its image feature is no [CLS], or it has no such layer or head.
    """
    modules = cls_layers(system)
    chosen = pick("layer", layer, len(modules), len(modules) - 1)
    cells = system.cells(batch)
    with _gradients():
        with torch.no_grad():
            text = system.encode_text(batch)
        with recorded_attention({"cls": modules[chosen]}) as found:
            # A tensor made in inference mode can't take part in a backward pass; its copy can.
            image = system.encode_image(replace(batch, images=batch.images.clone()))
            similarity = system.similarity(image, text)  # [B, B]
            if similarity is None:
                raise UserError("no Grad-CAM of the contrast: this system was trained without one")
            relevance = _relevance(found["cls"], similarity.trace(), head)  # [B, T, T]
    maps = relevance[:, 0, -cells.rows * cells.columns :]
    return ContrastCam(maps.unflatten(1, (cells.rows, cells.columns)), similarity.detach().diagonal(), chosen)


def word_layers(system: object) -> Sequence[nn.Module]:
    """The layers in which words attend to cells.

    Raises:
        UserError: there are none.
    """
    if not offers(system, WordsOverCells):
        raise UserError("no Grad-CAM: words don't attend to cells of an image in this system (it reads regions)")
    return cast(WordsOverCells, system).word_attention()


def cls_layers(system: object) -> Sequence[nn.Module]:
    """The layers in which the image's [CLS] attends to cells.

    Raises:
        UserError: there are none.
    """
    if not offers(system, ClsOverCells):
        raise UserError("no Grad-CAM of the contrast: this system has no [CLS] of an image that is compared with texts")
    return cast(ClsOverCells, system).cls_attention()


def pick(what: str, wanted: int | None, count: int, default: int) -> int:
    """Which of `count` layers or heads is meant.

    Raises:
        UserError: there is none of this number.
    """
    number = default if wanted is None else wanted
    if not 0 <= number < count:
        raise UserError(f"{what} {number}: there are {count} of them, counted from 0")
    return number


@contextmanager
def _gradients() -> Iterator[None]:
    """Gradients on, whatever the caller does without."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _relevance(attention: Tensor, score: Tensor, head: int | None) -> Tensor:
    """attention [B, h, L, M] → A · max(∂score/∂A, 0) of one head or the mean over them, [B, L, M] fp32."""
    (gradient,) = torch.autograd.grad(score, [attention])
    relevance = attention.detach().float() * gradient.float().clamp(min=0)
    return relevance.mean(1) if head is None else relevance[:, pick("head", head, relevance.shape[1], 0)]
