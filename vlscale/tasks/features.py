"""Images and captions encoded once, kept in host memory for the two stages of retrieval.

Each rank encodes its share. The pooled features of all, and the captions' tokens, go to every rank; an image's tokens
stay with the rank that encoded it, which re-ranks what is asked of this image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import distributed
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
"""Bytes of image tokens that a rank keeps in host memory; what needs more is encoded a second time for re-ranking."""


@dataclass(slots=True)
class Precision:
    """Arithmetic of the encoders and of fusion; scores are fp32 in any case."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device, system: nn.Module | None = None) -> Precision:
        """bfloat16 autocast where the hardware multiplies it, else fp32.

        Args:
            system: what is evaluated; where training holds its parameters in half precision, autocast to theirs.
        """
        halves = {p.dtype for p in system.parameters()} & {torch.float16, torch.bfloat16} if system is not None else ()
        if halves:
            return cls(device, next(iter(halves)))
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls(device, torch.bfloat16 if fast else torch.float32)

    def autocast(self) -> torch.autocast:
        """Context for everything before the scores."""
        half = torch.bfloat16 if self.dtype == torch.float32 else self.dtype
        return torch.autocast(self.device.type, dtype=half, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        names = {torch.bfloat16: "bf16 autocast, fp32 scores", torch.float16: "fp16 autocast, fp32 scores"}
        return names.get(self.dtype, "fp32")


@dataclass(slots=True)
class ImageStore:
    """I encoded images of all ranks. Token states are this rank's own alone, behind one another without padding: images
    may differ in length."""

    pooled: Tensor
    """[I, d] float32; d is 0 where the system has no first stage."""
    tokens: Tensor | None
    """[sum of lengths, D] in the precision's type; None where they would not fit."""
    length: Tensor
    """[own] int64: tokens of each own image that are not padding, in their order."""
    kept: list[int]
    """Which samples these I images are."""
    skipped: list[str]
    """Images that can't be read: `path: reason`."""
    first: int = 0
    """Number of this rank's first image."""
    start: Tensor = field(init=False)
    """[own] int64: first row of each own image."""

    def __post_init__(self) -> None:
        self.start = self.length.cumsum(0) - self.length

    @property
    def own(self) -> range:
        """Numbers of the images that this rank encoded."""
        return range(self.first, self.first + len(self.length))

    def states(self, index: int, device: torch.device) -> ImageStates:
        """Image `index`, one of its own, as a batch of one, without padding."""
        assert self.tokens is not None
        place = index - self.first
        start = int(self.start[place])
        tokens = self.tokens[None, start : start + int(self.length[place])].to(device)  # [1, N, D]
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


@torch.no_grad()  # not inference mode: what a system keeps from here may be trained through afterwards
def encode_images(
    system: System,
    samples: list[Sample],
    data: Data,
    tokenizer: TextTokenizer,
    precision: Precision,
    batch_size: int,
    on_progress: OnProgress,
) -> ImageStore:
    """Every readable image; the tokens are kept where all of a rank's own fit into `IMAGE_TOKEN_BUDGET`. Collective.

    Raises:
        UserError: no image can be read.
    """
    share = distributed.share(len(samples))
    own = samples[share.start : share.stop]
    pooled: list[Tensor] = []
    tokens: list[Tensor] = []
    lengths: list[Tensor] = []
    kept: list[int] = []
    skipped: list[str] = []
    size, keep = 0, True
    for batch, states in image_states(system, own, data, tokenizer, precision, batch_size):
        skipped += batch.skipped
        kept += [share.start + index for index in batch.image_ids.tolist()]
        pooled.append(states.pooled.float().cpu())
        mask = states.mask.cpu().bool()  # [b, N]
        lengths.append(mask.sum(dim=1))
        # What all will take is known from the first images on, before memory is taken.
        size += int(lengths[-1].sum()) * states.tokens.shape[-1] * precision.dtype.itemsize
        keep = keep and size * len(own) <= IMAGE_TOKEN_BUDGET * len(kept)
        if keep:
            tokens.append(states.tokens.to("cpu", precision.dtype)[mask])
        else:
            tokens.clear()
        on_progress("images", len(kept), len(own))
    counts = distributed.gather_list([len(kept)])
    skipped, first = distributed.gather_list(skipped), sum(counts[: distributed.rank()])
    if not sum(counts):
        raise UserError(f"none of the {len(samples)} images can be read, the first is {skipped[0]}; check --image-root")
    kept_tokens = _joined(tokens, torch.empty(0, 0)) if keep else None
    length = _joined(lengths, torch.empty(0, dtype=torch.int64))
    every = distributed.gather_rows(_joined(pooled))
    return ImageStore(every, kept_tokens, length, distributed.gather_list(kept), skipped, first)


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


@torch.no_grad()
def encode_texts(
    system: System,
    captions: list[str],
    encode: CaptionEncoder,
    precision: Precision,
    batch_size: int,
    on_progress: OnProgress,
) -> TextStore:
    """Every caption once, in batches of similar length so that little padding is computed. Collective."""
    share = distributed.share(len(captions))
    fields = encode(captions[share.start : share.stop])
    input_ids, mask = fields["input_ids"], fields["attention_mask"]  # [own, L]
    length = mask.sum(dim=1)
    order = torch.argsort(length, stable=True)
    pooled: list[Tensor] = []
    tokens: list[Tensor] = []
    for chunk in order.split(batch_size) if len(order) else ():
        longest = int(length[chunk].max())
        states = encode_text(system, input_ids[chunk, :longest], mask[chunk, :longest], precision)
        pooled.append(states.pooled.float().cpu())
        tokens.append(states.tokens.to("cpu", precision.dtype)[mask[chunk, :longest].bool()])
        on_progress("captions", sum(map(len, pooled)), len(share))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    start = (length[order].cumsum(0) - length[order])[rank]
    return _of_all_ranks(_joined(pooled), _joined(tokens), start, length, rank)


def encode_text(system: System, input_ids: Tensor, mask: Tensor, precision: Precision) -> TextStates:
    """States of captions [b, L] on the precision's device."""
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


def _of_all_ranks(
    pooled: Tensor | None, tokens: Tensor | None, start: Tensor, length: Tensor, rank: Tensor
) -> TextStore:
    """One store of every rank's captions; where a rank has none, pooled and tokens are None.

    Args:
        rank: [own] int64, the row of `pooled` that each caption's is.
    """
    rows = distributed.gather_list([0 if tokens is None else len(tokens)])
    start = start + sum(rows[: distributed.rank()])
    return TextStore(
        distributed.gather_rows(None if pooled is None else pooled[rank]),
        distributed.gather_rows(tokens),
        distributed.gather_rows(start),
        distributed.gather_rows(length),
    )


def _joined(parts: list[Tensor], nothing: Tensor | None = None) -> Any:
    """The parts behind one another; `nothing` where there are none."""
    return torch.cat(parts) if parts else nothing
