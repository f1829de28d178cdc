"""Images and captions encoded once, kept in host memory for the two stages of retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlscale.config import Data
from vlscale.data.captions import CaptionEncoder
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.systems.protocol import ImageStates, System, TextStates

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and what there is to do."""

OnMessage = Callable[[str], None]
"""Called with a line for the user."""

IMAGE_TOKEN_BUDGET = 2 << 30
"""Bytes of image tokens kept in host memory; what needs more is encoded a second time for re-ranking."""


@dataclass(slots=True)
class Precision:
    """Arithmetic of the encoders and of fusion; scores are fp32 in any case."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> Precision:
        """bfloat16 autocast where the hardware multiplies it, else fp32."""
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls(device, torch.bfloat16 if fast else torch.float32)

    def autocast(self) -> torch.autocast:
        """Context for everything before the scores."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def __str__(self) -> str:
        return "bf16 autocast, fp32 scores" if self.dtype == torch.bfloat16 else "fp32"


@dataclass(slots=True)
class ImageStore:
    """I encoded images, their token states behind one another without padding: images may differ in length."""

    pooled: Tensor
    """[I, d] float32; d is 0 where the system has no first stage."""
    tokens: Tensor | None
    """[sum of lengths, D] in the precision's type; None where they would not fit."""
    length: Tensor
    """[I] int64: tokens of each image that are not padding, in their order."""
    kept: list[int]
    """Which samples these I images are."""
    skipped: list[str]
    """Images that can't be read: `path: reason`."""
    start: Tensor = field(init=False)
    """[I] int64: first row of each image."""

    def __post_init__(self) -> None:
        self.start = self.length.cumsum(0) - self.length

    def states(self, index: int, device: torch.device) -> ImageStates:
        """One image as a batch of one, without padding."""
        assert self.tokens is not None
        first = int(self.start[index])
        tokens = self.tokens[None, first : first + int(self.length[index])].to(device)  # [1, N, D]
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=device)
        return ImageStates(tokens, mask, self.pooled[index : index + 1].to(device))


@dataclass(slots=True)
class TextStore:
    """T encoded captions, their token states behind one another without padding."""

    pooled: Tensor
    """[T, d] float32."""
    tokens: Tensor
    """[sum of lengths, D] in the precision's type."""
    start: Tensor
    """[T] int64: first row of each caption."""
    length: Tensor
    """[T] int64."""

    def states(self, index: Tensor, device: torch.device) -> TextStates:
        """Captions `index` [b], padded to the longest of them."""
        length = self.length[index]
        column = torch.arange(int(length.max()))
        mask = column < length[:, None]  # [b, L]
        row = torch.where(mask, self.start[index][:, None] + column, 0)
        tokens = self.tokens[row] * mask[..., None].to(self.tokens.dtype)
        return TextStates(tokens.to(device), mask.long().to(device), self.pooled[index].to(device))


def without_padding(states: ImageStates, row: int) -> ImageStates:
    """Image `row` of a batch as a batch of one: tokens [1, N, D], only those that are not padding."""
    tokens = states.tokens[row, states.mask[row].bool()][None]
    return ImageStates(tokens, states.mask.new_ones(tokens.shape[:2]), states.pooled[row : row + 1])


def pooled_only(pooled: Tensor, kind: type[ImageStates] | type[TextStates]) -> ImageStates | TextStates:
    """States that hold the pooled features [b, d] alone: all that a first stage reads."""
    return kind(pooled.new_zeros(len(pooled), 0, 1), pooled.new_zeros(len(pooled), 0, dtype=torch.int64), pooled)


@torch.inference_mode()
def encode_images(
    system: System,
    samples: list[Sample],
    data: Data,
    tokenizer: TextTokenizer,
    precision: Precision,
    batch_size: int,
    on_progress: OnProgress,
) -> ImageStore:
    """Pooled features of every readable image, and the tokens where all of them fit into `IMAGE_TOKEN_BUDGET`."""
    pooled: list[Tensor] = []
    tokens: list[Tensor] = []
    lengths: list[Tensor] = []
    kept: list[int] = []
    skipped: list[str] = []
    keep, size = True, 0
    for batch, states in image_states(system, samples, data, tokenizer, precision, batch_size):
        mask = states.mask.cpu().bool()  # [B, N]
        pooled.append(states.pooled.float().cpu())
        lengths.append(mask.sum(dim=1))
        kept += batch.image_ids.tolist()
        skipped += batch.skipped
        # What all will take is known from the first images on, before memory is taken.
        size += int(lengths[-1].sum()) * states.tokens.shape[-1] * precision.dtype.itemsize
        keep = keep and size * len(samples) <= IMAGE_TOKEN_BUDGET * len(kept)
        if keep:
            tokens.append(states.tokens.to("cpu", precision.dtype)[mask])
        else:
            tokens.clear()
        on_progress("images", len(kept), len(samples))
    if not kept:
        raise UserError(f"none of the {len(samples)} images can be read, the first is {skipped[0]}; check --image-root")
    return ImageStore(torch.cat(pooled), torch.cat(tokens) if keep else None, torch.cat(lengths), kept, skipped)


def image_states(
    system: System,
    samples: list[Sample],
    data: Data,
    tokenizer: TextTokenizer,
    precision: Precision,
    batch_size: int,
) -> Iterator[tuple[Batch, ImageStates]]:
    """Batches of readable images in the order of the samples, and their states, on the precision's device."""
    for loaded in evaluation_batches(samples, data, batch_size, tokenizer):
        batch = normalize_batch(loaded.to(precision.device), data)
        with precision.autocast():
            states = system.encode_image(batch)
        yield batch, states


@torch.inference_mode()
def encode_texts(
    system: System,
    captions: list[str],
    encode: CaptionEncoder,
    precision: Precision,
    batch_size: int,
    on_progress: OnProgress,
) -> TextStore:
    """Every caption once, in batches of similar length so that little padding is computed."""
    fields = encode(captions)
    input_ids, mask = fields["input_ids"], fields["attention_mask"]  # [T, L]
    length = mask.sum(dim=1)
    order = torch.argsort(length, stable=True)
    pooled: list[Tensor] = []
    tokens: list[Tensor] = []
    for chunk in order.split(batch_size):
        longest = int(length[chunk].max())
        states = _encode_text(system, input_ids[chunk, :longest], mask[chunk, :longest], precision)
        pooled.append(states.pooled.float().cpu())
        tokens.append(states.tokens.to("cpu", precision.dtype)[mask[chunk, :longest].bool()])
        on_progress("captions", sum(map(len, pooled)), len(captions))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    start = (length[order].cumsum(0) - length[order])[rank]
    return TextStore(torch.cat(pooled)[rank], torch.cat(tokens), start, length)


def _encode_text(system: System, input_ids: Tensor, mask: Tensor, precision: Precision) -> TextStates:
    device = precision.device
    count = len(input_ids)
    batch = Batch(
        torch.zeros(count, 3, 0, 0, device=device),
        input_ids.to(device),
        mask.to(device),
        torch.arange(count, device=device),
    )
    with precision.autocast():
        return system.encode_text(batch)
