"""`vlscale data regions`: any data → shards with regions beside the images, and a picture of what was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlscale import distributed
from vlscale.data.open import load_sources
from vlscale.data.regions import (
    MAX_REGIONS,
    MAX_TAGS,
    MIN_CONFIDENCE,
    SOURCE_TAGS,
    RegionExtractor,
    Regions,
    object_tags,
    problems,
    strongest,
)
from vlscale.data.sample import Sample, SampleError
from vlscale.data.sample_files import Annotated, Annotator
from vlscale.data.shard_plan import plan_shards
from vlscale.data.shard_writer import REGIONS, write_shards
from vlscale.data.shards import Manifest, open_shards, read_manifest
from vlscale.data.sheet import draw_sheet
from vlscale.data.sources import vinvl
from vlscale.data.sources.base import Source
from vlscale.errors import UserError

SHEET = "regions.jpg"
"""Name of the contact sheet in the folder of the shards."""
_SHEET_SAMPLES = 24
_OF_THE_DATA = ("boxes", "boxes+grid")
"""Kinds of extractors that take the data's own boxes."""
_NAMELESS = (*_OF_THE_DATA, "grid")
"""Kinds that name nothing but what the data names: the data's tags stay."""
_FORMAT = vinvl.FORMATS[0].name
"""The format that has region features of its own."""
_WIDTH = vinvl.WIDTH - 6
"""Of such a feature, without the six numbers of its box."""

Report = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """Which regions, and how many of them."""

    extractor: str | None
    """Specification for `vlscale.nn.detectors.make_extractor`; None: the source's own features."""
    weights: str | None = None
    max_regions: int = MAX_REGIONS
    """Kept of an image, the most confident."""
    min_confidence: float = MIN_CONFIDENCE
    """Of a region whose label becomes a tag; at most MAX_TAGS of an image."""
    ground_truth_tags: bool = False
    """Tags of the data where it has some, instead of the detector's."""

    def limits(self, tags: str) -> dict[str, object]:
        """For the manifest; `tags`: whose they are."""
        return {
            "max_regions": self.max_regions,
            "max_tags": MAX_TAGS,
            "min_confidence": self.min_confidence,
            "tags": tags,
        }


def extract_regions(
    specs: Sequence[str],
    out: Path,
    request: Request,
    max_size: int,
    *,
    resize: int | None = None,
    image_root: str | None = None,
    batch: int = 8,
    workers: int = 1,
    report: Report | None = None,
) -> Manifest:
    """Shards of the sources with the regions of every image, and SHEET beside them.

    Everything that the sources know goes along. Goes on after the last finished shard where it was interrupted; of a
    pair of images the first has regions. The manifest says under `options.regions` what found them.

    Args:
        specs: as for `vlscale data shards`.
        max_size: of a tar, in bytes.
        resize: shorter side of the images in the shards; the extractor sees them before.
        batch: images that the extractor is given at once.
        workers: threads that decode.

    Raises:
        UserError: the request contradicts itself or the data, the extractor or its weights are not there, or `out`
            holds something else.
    """
    sources = [source for spec in specs for source in load_sources(spec, image_root)[0]]
    _check(request, sources)
    plan, splits, missing = plan_shards(specs, max_size, resize, image_root)
    if _kind(request.extractor or "") in _OF_THE_DATA and not any(_has_boxes(sample) for sample in plan.read()):
        raise UserError(
            f"{request.extractor}: no sample of {', '.join(specs)} has a box; name the file that has them (boxes=FILE, "
            "COCO's instances for example), or take a grid: or a detector"
        )
    annotator = _annotator(request, sources)
    manifest = write_shards(
        replace(plan, annotator=annotator, batch=batch),
        out,
        missing,
        workers,
        None if report is None else lambda split, done: report(f"regions of {split}", done, splits[split]),
    )
    sheet = out / SHEET
    if not sheet.is_file():
        draw_sheet(open_shards(out), sheet, _SHEET_SAMPLES, regions=True)
    return manifest


class ExtractedRegions:
    """Regions of a detector, a grid or given boxes."""

    def __init__(self, extractor: RegionExtractor, request: Request) -> None:
        self._extractor, self._request = extractor, request
        self._names = _kind(extractor.name) not in _NAMELESS
        self._warned = False

    def options(self) -> dict[str, object]:
        own = "data, else detector" if self._request.ground_truth_tags else "detector"
        return {
            "extractor": self._extractor.name,
            "weights": self._extractor.weights_hash,
            "width": self._extractor.width,
            **self._request.limits(own if self._names else "data"),
        }

    def annotate(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Annotated]:
        """Raises UserError where the device has too little memory."""
        if any(sample.second is not None for sample in samples) and not self._warned:
            self._warned = True
            _log.warning("samples with two images: the first alone gets regions")
        try:
            found = self._extractor.extract([_pixels(image) for image in images], list(samples))
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self._extractor.name}: out of memory with {len(images)} images at once; the same command with a "
                "smaller --batch goes on after the finished shards"
            ) from None
        return [self._finished(sample, regions) for sample, regions in zip(samples, found, strict=True)]

    def _finished(self, sample: Sample, found: Regions) -> Annotated:
        regions = _kept(found, self._request.max_regions)
        for problem in problems(regions):
            return SampleError(problem)
        if not self._names or (self._request.ground_truth_tags and sample.tags):
            return sample, regions
        own = {name: value for name in ("boxes", "tags", "confidences") if (value := getattr(sample, name))}
        extra = {SOURCE_TAGS: own, **sample.extra} if own else sample.extra
        return _tagged(replace(sample, extra=extra), regions, self._request.min_confidence), regions


class StoredRegions:
    """Regions that a source has with it: the rows of a TSV of VinVL's or Oscar's."""

    def __init__(self, files: Collection[str], request: Request) -> None:
        """`files`: those that the user named. Nothing else is opened, whatever a record says."""
        self._files, self._request = frozenset(files), request

    def options(self) -> dict[str, object]:
        return {
            "extractor": f"{_FORMAT}: features of the source",
            "weights": None,
            "width": _WIDTH,
            **self._request.limits("detector"),
        }

    def annotate(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Annotated]:
        return [self._stored(sample) for sample in samples]

    def _stored(self, sample: Sample) -> Annotated:
        extra = dict(sample.extra)
        pointer = extra.pop(vinvl.REGION_FEATURES, None)
        if pointer is None and sample.boxes:
            return SampleError("its row has boxes and no features")
        if pointer is not None and pointer.get("file") not in self._files:
            return SampleError("its features point to a file that is none of the sources'")
        regions = _kept(_of_rows(pointer, sample), self._request.max_regions)
        for problem in problems(regions):
            return SampleError(problem)
        sample = replace(sample, extra=extra)
        # Labels without confidences can't be told apart: all of them stay.
        return (_tagged(sample, regions, self._request.min_confidence) if sample.confidences else sample), regions


def _check(request: Request, sources: Sequence[Source]) -> None:
    """What can be wrong with a request before anything is read."""
    if request.extractor is not None:
        for source in sources if request.ground_truth_tags else ():
            if _has_detected_tags(source):
                raise UserError(
                    f"{source}: its tags are a detector's already; take the data that these shards were made of, or "
                    "leave --ground-truth-tags out"
                )
        return
    if request.weights is not None or request.ground_truth_tags:
        option = "--weights" if request.weights is not None else "--ground-truth-tags"
        raise UserError(f"{option} belongs to an extractor; --from-source takes regions and tags as they are")
    for source in sources:
        if source.format != _FORMAT:
            raise UserError(f"{source}: has no region features of its own; --from-source reads {_FORMAT}: sources")
        if source.images is None:
            raise UserError(
                f"{source}: no image folder, and shards hold an image beside its regions; add images=FOLDER to the "
                "source, or --image-root FOLDER"
            )


def _has_detected_tags(source: Source) -> bool:
    if source.format != "shards":
        return False
    found = read_manifest(Path(source.path)).options.get(REGIONS)
    return isinstance(found, dict) and found.get("tags") != "data"


def _annotator(request: Request, sources: Sequence[Source]) -> Annotator:
    if request.extractor is None:
        return StoredRegions([str(Path(source.path)) for source in sources], request)
    from vlscale.nn.detectors import make_extractor

    return ExtractedRegions(make_extractor(request.extractor, request.weights, distributed.device()), request)


def _kind(spec: str) -> str:
    return spec.partition(":")[0]


def _has_boxes(sample: Sample) -> bool:
    return bool(sample.boxes) or any(phrase.boxes for phrase in sample.phrases)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def _kept(regions: Regions, limit: int) -> Regions:
    """The strongest, as the file will have them."""
    best = strongest(regions, limit)
    return Regions(best.features.to("cpu", torch.float16), best.boxes.cpu(), best.confidences.cpu(), best.tags)


def _tagged(sample: Sample, regions: Regions, threshold: float) -> Sample:
    """The sample with the tags of its regions, each with the most confident region that has it."""
    tags = object_tags(regions, MAX_TAGS, threshold)
    rows = [regions.tags.index(tag) for tag in tags]  # the most confident come first
    boxes = tuple((a, b, c, d) for a, b, c, d in regions.boxes[rows].tolist())
    return replace(sample, tags=tags, boxes=boxes, confidences=tuple(regions.confidences[rows].tolist()))


def _of_rows(pointer: dict[str, Any] | None, sample: Sample) -> Regions:
    """Rows of features, boxes and sizes; the sample has a tag and a confidence for each, or none."""
    rows = np.zeros((0, vinvl.WIDTH), np.float32) if pointer is None else vinvl.read_features(pointer)
    count = len(rows)
    tags = sample.tags if len(sample.tags) == count else ("",) * count
    sure = sample.confidences if len(sample.confidences) == count else (0.0,) * count
    features = torch.from_numpy(rows[:, :_WIDTH])
    boxes = torch.from_numpy(rows[:, _WIDTH : _WIDTH + 4]).clamp(0, 1)
    return Regions(features, boxes, torch.tensor(sure, dtype=torch.float32), tags)
