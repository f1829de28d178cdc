"""Region extractors by specification: detectors, grids and given boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlscale.data.regions import RegionExtractor
from vlscale.errors import UserError
from vlscale.nn.extraction import Spec, parse_spec
from vlscale.nn.grids import GridExtractor, load_backbone
from vlscale.nn.query_detector import QueryDetector
from vlscale.nn.roi_detector import RoiDetector, load_detector

Colour = Sequence[float] | None
"""Three numbers, of pixels in [0, 1]; None: the model's own."""

KINDS = {
    "torchvision": "torchvision:MODEL[,classes=FILE]: a detector of torchvision with an RoI head",
    "detr": "detr:FOLDER: a DETR or one of its kin, as transformers saves it",
    "grid": "grid:MODEL[@RxC][,size=PIXELS]: cells of the feature map of a timm network",
    "boxes": "boxes:MODEL[,size=PIXELS]: the boxes that the data has, on the feature map of a timm network",
    "boxes+grid": "boxes+grid:MODEL[@RxC][,size=PIXELS]: those boxes, then the cells",
}
"""How each kind is written."""


def make_extractor(
    spec: str,
    weights: str | None,
    device: torch.device,
    *,
    mean: Colour = None,
    std: Colour = None,
) -> RegionExtractor:
    """The extractor that `spec` names, on `device`, in evaluation mode.

    Args:
        spec: see KINDS.
        weights: a file (torch or safetensors); `random`, which warns; for timm networks also `pretrained`, timm's own,
            fetched where it isn't there yet. None: what torchvision fetched earlier, or what lies in a DETR's folder.
        mean, std: instead of the model's own.

    Raises:
        UserError: the specification is wrong, or the weights are missing or don't fit.
    """
    parsed = parse_spec(spec)
    if parsed.kind not in KINDS:
        raise UserError(f"{spec}: no kind {parsed.kind!r}; there are {', '.join(KINDS)}")
    for name, colour in (("mean", mean), ("std", std)):
        if colour is not None and len(colour) != 3:
            raise UserError(f"{spec}: {name}: expected three numbers, got {len(colour)}")
    return _make(parsed, weights, device, mean, std)


def _make(spec: Spec, weights: str | None, device: torch.device, mean: Colour, std: Colour) -> RegionExtractor:
    if spec.kind == "torchvision":
        spec.check_options({"classes"})
        model, tags = load_detector(spec, weights)
        return RoiDetector(spec, model, tags, device, mean=mean, std=std)
    if spec.kind == "detr":
        spec.check_options(())
        if weights is not None:
            raise UserError(f"{spec.text}: the weights lie in the model's folder; leave --weights out")
        return QueryDetector(spec, device, mean=mean, std=std)
    spec.check_options({"size"})
    return GridExtractor(spec, load_backbone(spec, weights), device, mean=mean, std=std)
