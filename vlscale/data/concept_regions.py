"""The regions of an image as one tensor (MVPTR, section 3.1): a detector's, or what the data's own boxes enclose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlscale.config import Concepts, Data
from vlscale.data.corpus import Corpus
from vlscale.data.images import eval_transform, load_image, normalize
from vlscale.data.regions import geometry, problems, read_regions, strongest
from vlscale.data.sample import Box, Sample, SampleError
from vlscale.errors import UserError

LOOKED_AT = 8
"""So many samples tell at the start whether the data's regions have the recipe's width."""

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class RegionInputs(NamedTuple):
    """R regions of one image, at most `max_regions`."""

    features: Tensor
    """[R, region_width] float32."""
    boxes: Tensor
    """[R, 4] float32, as in `Regions`."""


class WidthError(SampleError):
    """Regions whose features are not `data.concepts.region_width` wide."""


def region_inputs(sample: Sample, data: Data, concepts: Concepts) -> RegionInputs:
    """The sample's regions, the most confident first; with `pixels`, where it has none, what its boxes enclose.

    Raises:
        SampleError: its regions can't be read, have another width (WidthError) or would spoil a training; or, with
            `pixels`, a box is none.
        ImageError: as `load_image`, with `pixels` alone.
        UserError: it has no regions, and `pixels` is not set.
    """
    if sample.regions is None and concepts.pixels is not None:
        return _own_boxes(sample, data, concepts.pixels, concepts.max_regions)
    return _stored(sample, concepts)


def check_regions(corpus: Corpus, concepts: Concepts) -> None:
    """Find out from the first samples whether recipe and data agree, before anything else starts.

    A single sample whose regions are broken or of another width is replaced like any other that can't be read.

    Raises:
        UserError: there are no regions, or those that can be read all have another width.
    """
    wrong = ""
    for index in range(min(LOOKED_AT, len(corpus))):
        try:
            sample = corpus.sample(index)
            if sample.regions is not None or concepts.pixels is None:
                _stored(sample, concepts)
            return
        except WidthError as error:
            wrong = wrong or f"data: sample {sample.id}: {error}; set data.concepts.region_width to the data's"
        except SampleError:  # named when its turn comes
            continue
    if wrong:
        raise UserError(wrong)


def stacked_regions(images: Sequence[RegionInputs], concepts: Concepts) -> dict[str, Tensor]:
    """`regions`, `region_mask` and `region_boxes` of a Batch."""
    shape = len(images), concepts.max_regions
    regions = torch.zeros(*shape, concepts.region_width + 6)
    mask = torch.zeros(shape, dtype=torch.int64)
    boxes = torch.zeros(*shape, 4)
    for row, image in enumerate(images):
        count = len(image.boxes)
        regions[row, :count] = torch.cat([image.features, geometry(image.boxes)], dim=1)
        mask[row, :count] = 1
        boxes[row, :count] = image.boxes
    return {"regions": regions, "region_mask": mask, "region_boxes": boxes}


def _stored(sample: Sample, concepts: Concepts) -> RegionInputs:
    """What lies beside the image."""
    found = read_regions(sample)
    if found is None:
        raise UserError(
            f"data: sample {sample.id} has no regions; make shards with them by `vlscale data regions` and give those "
            "as data.path, or set data.concepts.pixels to take the data's own boxes"
        )
    width = found.features.shape[1]
    if width != concepts.region_width:
        raise WidthError(f"regions: {width} numbers per region, data.concepts.region_width is {concepts.region_width}")
    kept = strongest(found, concepts.max_regions)
    if problem := next(problems(kept), None):
        raise SampleError(problem)
    return RegionInputs(kept.features.float(), kept.boxes)


def _own_boxes(sample: Sample, data: Data, side: int, limit: int) -> RegionInputs:
    """Pixels of the sample's first boxes and, as the last region, of the whole image."""
    boxes = torch.tensor([*sample.boxes[: limit - 1], _WHOLE]).clamp(0, 1)  # rounding may leave the image
    if not (boxes[:, :2] <= boxes[:, 2:]).all():  # of what is no number neither
        raise SampleError("boxes: expected x1 <= x2 and y1 <= y2 (shares of the image)")
    image = load_image(sample.image)
    shrink = eval_transform(data.model_copy(update={"image_size": side, "aspect": None}))
    corners = [_corners(box, image.width, image.height) for box in boxes.tolist()]
    pixels = torch.stack([shrink(image.crop(box)) for box in corners])  # [R, 3, n, n]
    return RegionInputs(normalize(pixels, data.mean, data.std).flatten(1), boxes)


def _corners(box: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole pixels, at least one of them."""
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return left, top, max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
