"""How large a retrieval will be and how long it will take, told before the work from a first batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vlscale import distributed
from vlscale.config import Data
from vlscale.data.captions import CaptionEncoder
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Sample
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import TextTokenizer
from vlscale.systems.protocol import ImageStates, System, TextStates
from vlscale.tasks import features
from vlscale.tasks.features import Precision, encode_text, without_padding
from vlscale.tasks.stages import PAIRS_AT_ONCE

T = TypeVar("T")

PROBED_IMAGES = 8
"""Of the first batch, at most."""
WARM_SECONDS = 0.5
"""What takes less is timed a second time: the first call also warms up."""


@dataclass(frozen=True, slots=True)
class Size:
    """What there is to do."""

    images: int
    captions: int
    rerank: int
    """Candidates of a query."""
    fold: int | None
    """Images of a fold."""

    def pairs(self, every: bool) -> int:
        """Pairs that ITM scores: all, or at most so many, since the two directions share some."""
        if every:
            return self.images * self.captions
        total = self._asked(self.images, self.captions)
        if self.fold is not None:
            share = self.fold / self.images
            total += self.images // self.fold * self._asked(self.fold, round(self.captions * share))
        return min(total, self.images * self.captions)

    def _asked(self, images: int, captions: int) -> int:
        return captions * min(self.rerank, images) + images * min(self.rerank, captions)


@torch.no_grad()
def forecast(
    system: System,
    samples: list[Sample],
    size: Size,
    data: Data,
    tokenizer: TextTokenizer,
    precision: Precision,
    batch_size: int,
) -> str:
    """A line: images, captions, pairs, MB of features and about how long. Every rank may call it.

    Args:
        samples: all that will be asked; the first of them are read.
    """
    began = time.perf_counter()
    count = min(batch_size, PROBED_IMAGES)
    loaded = next(iter(evaluation_batches(samples[:count], data, count, tokenizer)))
    load = (time.perf_counter() - began) / count
    what = f"retrieval among {size.images:,} images and {size.captions:,} captions"
    if not len(loaded.images):
        return f"{what}: none of the first {count} images can be read, no estimate"
    batch = normalize_batch(loaded.to(precision.device), data)
    fields: Any = CaptionEncoder(data, tokenizer)(_captions(samples, PAIRS_AT_ONCE))
    ids, mask = fields["input_ids"], fields["attention_mask"]
    longest = int(mask.sum(dim=1).max())

    def look() -> ImageStates:
        with precision.autocast():
            return system.encode_image(batch)

    def read() -> TextStates:
        return encode_text(system, ids[:, :longest], mask[:, :longest], precision)

    def fuse() -> object:
        with precision.autocast():
            return system.match_logits(system.fuse(texts, image).float())

    images, look_seconds = _timed(look, precision)
    texts, read_seconds = _timed(read, precision)
    image = without_padding(images, 0)
    _, fuse_seconds = _timed(fuse, precision)
    every = system.similarity(images, texts) is None
    image_bytes = int(images.mask.sum()) / len(images.mask) * images.tokens.shape[2] * precision.dtype.itemsize
    text_bytes = float(mask.sum()) / len(ids) * texts.tokens.shape[2] * precision.dtype.itemsize
    world = distributed.world_size()
    twice = size.images / world * image_bytes > features.IMAGE_TOKEN_BUDGET
    pairs = size.pairs(every)
    per_image = _per_image(look_seconds / len(images.mask), load, size.images / world, data)
    own = size.images / world * (1 + twice) * per_image
    own += size.captions / world * read_seconds / len(ids) + pairs / world * fuse_seconds / len(ids)
    asked = "all" if every else "at most"
    megabytes = (size.images * image_bytes + size.captions * text_bytes) / 1e6
    ranks = f"{world} ranks" if world > 1 else "one rank"
    return (
        f"{what}: {f'{asked} {pairs:,} pairs to score' if pairs else 'no pairs to score'}, {megabytes:,.0f} MB of "
        f"features{', images encoded twice' if twice else ''}; about {duration(own)} on {ranks}"
    )


def duration(seconds: float) -> str:
    """`50 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _captions(samples: list[Sample], count: int) -> list[str]:
    found = [caption for sample in samples[:count] for caption in sample.captions][:count]
    return found or [""]


def _timed(work: Callable[[], T], precision: Precision) -> tuple[T, float]:
    """What it gives, and its seconds."""
    result, seconds = _once(work, precision)
    return _once(work, precision) if seconds < WARM_SECONDS else (result, seconds)


def _once(work: Callable[[], T], precision: Precision) -> tuple[T, float]:
    began = time.perf_counter()
    result = work()
    if precision.device.type == "cuda":
        torch.cuda.synchronize(precision.device)
    return result, time.perf_counter() - began


def _per_image(look: float, load: float, images: float, data: Data) -> float:
    """Seconds of an image: loader processes, where there are some, read while others are encoded."""
    return max(look, load / data.workers) if data.workers and images >= 2000 else look + load
