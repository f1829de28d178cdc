"""torchvision's two-stage detectors as region extractors: the family of Faster R-CNN."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection

from vlscale.data.regions import Regions
from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.nn.cnn import COUNTER, read_weights
from vlscale.nn.extraction import (
    DETECTIONS,
    RANDOM,
    SCORE,
    Spec,
    equal_shapes,
    errors_of,
    to_regions,
    warn_of_random_weights,
    weights_hash,
    workable,
)

CLASSES = "roi_heads.box_predictor.cls_score.weight"
"""[number of classes with the background, d]: tells how many classes a file was trained for."""

EXACT_NORMS = frozenset({"fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"})
"""Models whose published weights were trained with nothing added to BatchNorm's variance."""

NAMELESS = frozenset({"N/A", "__background__"})
"""Gaps in COCO's numbering."""


class RoiDetector:
    """Faster, Mask and Keypoint R-CNN: what they detect, and the box head's features there.

    The head's features that a detection was scored by belong to its proposal, a box that the head has then moved. So
    the features are pooled once more, at the final boxes that survived the non-maximum suppression.
    """

    def __init__(
        self,
        spec: Spec,
        model: Any,
        tags: Sequence[str],
        device: torch.device,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Take over a model of torchvision.

        Args:
            model: a `GeneralizedRCNN` with a box head.
            tags: name of each class, the background first.
            mean, std: instead of the model's own, of pixels in [0, 1].
        """
        self.name = f"{spec.kind}:{spec.model}"
        self.weights_hash = weights_hash(model.state_dict())
        self.width: int = model.roi_heads.box_predictor.cls_score.in_features
        self._spec, self._tags, self._device = spec, tuple(tags), device
        self._model = model.to(device).eval()
        self._model.transform.image_mean = list(mean or model.transform.image_mean)
        self._model.transform.image_std = list(std or model.transform.image_std)
        # Masks and key points are not used; without their pooling, the model leaves them out.
        self._model.roi_heads.mask_roi_pool = self._model.roi_heads.keypoint_roi_pool = None

    @torch.no_grad()
    def extract(self, images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        """At most DETECTIONS per image with a score above SCORE, the best first; see the protocol."""
        images = [workable(image) for image in images]
        found: dict[int, Regions] = {}
        for group in equal_shapes(images):
            pixels = [images[index].to(self._device).float() / 255 for index in group]
            for index, parts in zip(group, self._detect(pixels), strict=True):
                found[index] = to_regions(*parts, self._spec, samples[index])
        return [found[index] for index in range(len(images))]

    def _detect(self, pixels: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor, list[str]]]:
        """I images [3, H, W] of one size → features [R, d], boxes [R, 4] as shares, scores [R] and tags of each."""
        resized, _ = self._model.transform(pixels)
        maps = self._model.backbone(resized.tensors)
        proposals, _ = self._model.rpn(resized, maps)
        detected, _ = self._model.roi_heads(maps, proposals, resized.image_sizes)
        boxes = [one["boxes"] for one in detected]  # in pixels of the resized image
        pooled = self._model.roi_heads.box_roi_pool(maps, boxes, resized.image_sizes)
        features = self._model.roi_heads.box_head(pooled).split([len(one) for one in boxes])
        return [
            (features[index], _shares(one["boxes"], size), one["scores"], self._names(one["labels"]))
            for index, (one, size) in enumerate(zip(detected, resized.image_sizes, strict=True))
        ]

    def _names(self, labels: Tensor) -> list[str]:
        return [self._tags[label] for label in labels.tolist()]


def _shares(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [R, 4] in pixels → shares of `size`, height and width."""
    height, width = size
    return boxes / boxes.new_tensor([width, height, width, height])


def load_detector(spec: Spec, weights: str | None) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights, and the names of its classes, the background first.

    Raises:
        UserError: no such model, no RoI head, or the weights are missing or don't fit.
    """
    _check_model(spec)
    if weights == RANDOM:
        warn_of_random_weights(spec)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = _build(spec, None)
        return model, _class_names(spec, model.roi_heads.box_predictor.cls_score.out_features)
    path = _weights_file(spec, weights)
    with errors_of(spec):
        given = read_weights(path)
    if CLASSES not in given or given[CLASSES].ndim != 2:
        raise UserError(f"{spec.text}: {path}: no {CLASSES} in it; expected the weights of {spec.model}")
    classes = len(given[CLASSES])
    model = _build(spec, classes)
    _fill(model, given, f"{spec.text}: {path}")
    if spec.model in EXACT_NORMS and _is_published(path, spec):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return model, _class_names(spec, classes)


def _check_model(spec: Spec) -> None:
    """Refuse what is no detector of torchvision, or has nothing that describes one region."""
    known = models.list_models(module=detection)
    suitable = [name for name in known if "rcnn" in name]
    if spec.model not in known:
        raise UserError(f"{spec.text}: torchvision has no detector {spec.model!r}; there are {', '.join(suitable)}")
    if spec.model not in suitable:
        raise UserError(
            f"{spec.text}: {spec.model} has no RoI head, so no feature per region; use one of {', '.join(suitable)}"
        )


def _build(spec: Spec, classes: int | None) -> Any:
    return models.get_model(
        spec.model,
        weights=None,
        weights_backbone=None,
        num_classes=classes,
        box_score_thresh=SCORE,
        box_detections_per_img=DETECTIONS,
    )


def published(model: str) -> Any:
    """torchvision's own weights of a model: where they are (`url`) and what they know (`meta`)."""
    return models.get_model_weights(model).DEFAULT


def _weights_file(spec: Spec, weights: str | None) -> Path:
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"{spec.text}: --weights {weights}: no such file; give a weights file, or {RANDOM}")
        return Path(weights)
    url = published(spec.model).url
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not cached.is_file():
        raise UserError(
            f"{spec.text}: no weights: {cached} is not there and is not fetched unasked; fetch {url} and put it there, "
            "or give it with --weights FILE"
        )
    return cached


def _is_published(path: Path, spec: Spec) -> bool:
    """Whether a file is torchvision's own: the file name in the URL ends in the start of the content's sha256."""
    expected = re.search(r"-([0-9a-f]{8,})\.", published(spec.model).url)
    if expected is None:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(expected[1])


def _fill(model: nn.Module, given: dict[str, Tensor], where: str) -> None:
    """Load weights; counters may be missing, for frozen BatchNorm, which detectors are trained with, has none."""
    try:
        missing, unexpected = model.load_state_dict(given, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{where}: doesn't fit: {reason}") from None
    missing = [name for name in missing if not name.endswith(COUNTER)]
    for names, what in ((missing, "is missing"), (unexpected, "has no place in the model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where}: {names[0]}{more} {what}")


def _class_names(spec: Spec, classes: int) -> tuple[str, ...]:
    """Names from the file that the specification gives, else torchvision's where the number is theirs, else numbers.

    Raises:
        UserError: the file can't be read, or its lines are not one per class (with or without the background).
    """
    if "classes" in spec.options:
        return _names_from(Path(spec.options["classes"]), classes, spec)
    names = published(spec.model).meta["categories"]
    if len(names) != classes:
        return ("", *(f"class {number}" for number in range(1, classes)))
    return tuple("" if name in NAMELESS else name for name in names)


def _names_from(path: Path, classes: int, spec: Spec) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{spec.text}: classes={path}: can't be read ({error})") from None
    if len(lines) == classes - 1:
        lines.insert(0, "")
    if len(lines) != classes:
        raise UserError(
            f"{spec.text}: classes={path}: expected a name a line, {classes - 1} without background, got {len(lines)}"
        )
    return ("", *lines[1:])
