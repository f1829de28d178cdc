"""Regions of an image: features, boxes, tags; one portable file per image, whatever found them.

A region is what a detector saw, a cell of a grid, or a box that the data has. The file is a safetensors: no pickle, and
it is read without trusting it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlscale.data.sample import Sample, SampleError

MAX_REGIONS = 50
"""Regions kept per image, those of the highest confidence (MVPTR, section 4.1)."""
MAX_TAGS = 20
MIN_CONFIDENCE = 0.2
"""Of a region whose label becomes a tag."""
MEMBER = "regions.safetensors"
"""Ending of the file beside an image in a shard."""
SOURCE_TAGS = "source_tags"
"""Key of `Sample.extra`: boxes, tags and confidences that the data had before a detector's took their place."""
LARGEST = 64 << 20
"""Bytes of such a file; a larger one is refused before it is read."""


@dataclass(frozen=True, slots=True)
class Regions:
    """R regions of one image, the most confident first."""

    features: Tensor
    """[R, d] float16."""
    boxes: Tensor
    """[R, 4] float32: x1, y1, x2, y2 as shares of the image's width and height."""
    confidences: Tensor
    """[R] float32 in [0, 1]; 1 where the box is given, 0 where nobody judged (a grid)."""
    tags: tuple[str, ...]
    """R names; empty where a region has none."""

    def __len__(self) -> int:
        return len(self.boxes)


class RegionExtractor(Protocol):
    """Whatever finds regions."""

    name: str
    """Kind and model, such as `torchvision:fasterrcnn_resnet50_fpn_v2` or `grid:tf_efficientnet_lite0`."""
    weights_hash: str
    """sha256 of names, shapes and bytes of its weights."""
    width: int
    """d of its features."""

    def extract(self, images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        """Regions of each image, uint8 [3, H, W] of any size; unsorted and unlimited counts are allowed."""
        ...


def strongest(regions: Regions, limit: int = MAX_REGIONS) -> Regions:
    """At most `limit` regions, the most confident first; equal ones keep their order."""
    order = torch.argsort(regions.confidences, descending=True, stable=True)[:limit]
    tags = tuple(regions.tags[index] for index in order.tolist())
    return Regions(regions.features[order], regions.boxes[order], regions.confidences[order], tags)


def object_tags(regions: Regions, limit: int = MAX_TAGS, threshold: float = MIN_CONFIDENCE) -> tuple[str, ...]:
    """Names of confident regions, each once, the most confident first."""
    named = [tag for tag, sure in zip(regions.tags, regions.confidences.tolist(), strict=True) if sure >= threshold]
    return tuple(dict.fromkeys(tag for tag in named if tag))[:limit]


def geometry(boxes: Tensor) -> Tensor:
    """The six numbers beside a region's feature (MVPTR, section 3.1): x1, y1, x2, y2, width, height; [R, 6]."""
    return torch.cat([boxes, boxes[:, 2:] - boxes[:, :2]], dim=1)


def pack(regions: Regions) -> bytes:
    """The file's bytes, the same for the same regions."""
    tensors = {
        "features": regions.features.to(torch.float16).contiguous(),
        "boxes": regions.boxes.float().contiguous(),
        "confidences": regions.confidences.float().contiguous(),
    }
    return save(tensors, {"tags": json.dumps(regions.tags, ensure_ascii=False)})


def unpack(content: bytes) -> Regions:
    """What `pack` wrote.

    Raises:
        SampleError: it is not such a file, or its parts don't fit together.
    """
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tags = json.loads(header["__metadata__"]["tags"])
        features, boxes, confidences = tensors["features"], tensors["boxes"], tensors["confidences"]
        count = len(boxes)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise SampleError(f"regions: not a file of regions ({type(error).__name__}: {error})") from None
    named = isinstance(tags, list) and len(tags) == count and all(isinstance(tag, str) for tag in tags)
    if features.ndim != 2 or boxes.shape != (count, 4) or confidences.shape != (count,) or len(features) != count:
        raise SampleError("regions: features, boxes and confidences are of different lengths")
    if not named:
        raise SampleError(f"regions: expected {count} tags")
    return Regions(features.half(), boxes.float(), confidences.float(), tuple(tags))


def read_regions(sample: Sample) -> Regions | None:
    """The regions that lie beside the sample's image; None where there are none.

    Raises:
        SampleError: they can't be read, are larger than LARGEST, or are no regions.
    """
    member = sample.regions
    if member is None:
        return None
    if member.length > LARGEST:
        raise SampleError(f"{member}: {member.length:,} bytes, more than {LARGEST:,}")
    try:
        return unpack(member.read())
    except OSError as error:
        raise SampleError(f"{member}: can't be read ({error.strerror or error})") from None


def problems(regions: Regions) -> Iterator[str]:
    """What would spoil a training on them, a line each."""
    if not regions.features.isfinite().all():
        yield "regions: features that are not finite"
    left, top, right, bottom = regions.boxes.unbind(1)
    if not ((left >= 0) & (left <= right) & (right <= 1) & (top >= 0) & (top <= bottom) & (bottom <= 1)).all():
        yield "regions: expected boxes of 0 <= x1 <= x2 <= 1 and the same for y (shares of the image)"
    if not ((regions.confidences >= 0) & (regions.confidences <= 1)).all():
        yield "regions: expected confidences in [0, 1]"
