"""Regions without a detector: cells of a grid, and the boxes that the data has, on a timm network's feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from vlscale.config import Backbone
from vlscale.data.images import normalize
from vlscale.data.regions import MAX_REGIONS, Regions
from vlscale.data.sample import Box, Sample
from vlscale.errors import UserError
from vlscale.nn.cnn import CnnEncoder
from vlscale.nn.extraction import RANDOM, Spec, errors_of, to_regions, warn_of_random_weights, weights_hash

SIDE = 224
"""Pixels of the square that an image is resized to, unless the specification says otherwise."""
CELLS = (7, 7)
"""Rows and columns where the map has too many cells to be a grid itself."""
BINS = 7
SAMPLES = 2
"""A box is cut into BINS × BINS parts, each read at SAMPLES × SAMPLES points."""

NO_NAME = "other"
"""Flickr30k Entities' kind of a phrase that fits no other kind."""


class GridExtractor:
    """Kinds `grid`, `boxes` and `boxes+grid`.

    The whole image is squeezed to a square, without regard to its aspect ratio: boxes are shares of the sides, so that
    nothing has to be undone. A cell's feature is the mean of the map there, a box's the mean over its RoIAlign.
    """

    def __init__(
        self,
        spec: Spec,
        encoder: CnnEncoder,
        device: torch.device,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Take over `encoder`.

        Args:
            mean, std: instead of those that timm knows of the network, of pixels in [0, 1].

        Raises:
            UserError: a wrong `size`.
        """
        self._side = _side(spec, encoder.reduction)
        self._cells = spec.cells or _own_cells(-(-self._side // encoder.reduction))
        parts = spec.kind.split("+")
        self._with_boxes, self._with_grid = "boxes" in parts, "grid" in parts
        cells = "@{}x{}".format(*self._cells) if self._with_grid else ""
        self.name = f"{spec.kind}:{spec.model}{cells}" + (f",size={self._side}" if self._side != SIDE else "")
        self.weights_hash = weights_hash(encoder.net.state_dict())
        self.width = encoder.width
        known = encoder.net.pretrained_cfg
        self._mean, self._std = tuple(mean or known["mean"]), tuple(std or known["std"])
        self._spec, self._device = spec, device
        self._encoder = encoder.to(device).eval()

    @torch.no_grad()
    def extract(self, images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        """The boxes (confidence as the data has it, else 1), then the cells row by row (confidence 0, no tag)."""
        if not images:
            return []
        pixels = torch.stack([squeezed(image, self._side) for image in images]).to(self._device)
        maps = self._encoder(normalize(pixels, self._mean, self._std))  # [I, d, h, w]
        given = [given_boxes(sample) if self._with_boxes else _Given.none() for sample in samples]
        of_boxes = box_means(maps, [one.boxes.to(self._device) for one in given])
        of_cells = cell_means(maps, self._cells) if self._with_grid else maps.new_zeros(len(images), 0, self.width)
        tiles = cell_boxes(self._cells) if self._with_grid else torch.zeros(0, 4)
        return [
            to_regions(
                torch.cat([of_boxes[index], of_cells[index]]),
                torch.cat([one.boxes, tiles]),
                torch.cat([one.confidences, torch.zeros(len(tiles))]),
                (*one.tags, *[""] * len(tiles)),
                self._spec,
                samples[index],
            )
            for index, one in enumerate(given)
        ]


class _Given:
    """Boxes [R, 4] as shares, confidences [R] and R tags that came with the data."""

    def __init__(self, entries: dict[Box, tuple[float, str]]) -> None:
        self.boxes = torch.tensor(list(entries), dtype=torch.float32).reshape(-1, 4)
        self.confidences = torch.tensor([confidence for confidence, _ in entries.values()], dtype=torch.float32)
        self.tags = tuple(tag for _, tag in entries.values())

    @classmethod
    def none(cls) -> _Given:
        return cls({})


def given_boxes(sample: Sample) -> _Given:
    """The boxes of a sample, then those of its phrases; a box that comes again is one region, with its first tag.

    A phrase's box is called by the phrase's kind (`people`, `animals`): its words are words of the caption, and as a
    tag they would give away which image a caption belongs to.
    """
    tags = sample.tags if len(sample.tags) == len(sample.boxes) else ("",) * len(sample.boxes)
    sure = sample.confidences if len(sample.confidences) == len(sample.boxes) else (1.0,) * len(sample.boxes)
    entries: dict[Box, tuple[float, str]] = {}
    for box, confidence, tag in zip(sample.boxes, sure, tags, strict=True):
        _add(entries, box, confidence, tag)
    for phrase in sample.phrases:
        kind = next((kind for kind in phrase.kinds if kind != NO_NAME), "")
        for box in phrase.boxes:
            _add(entries, box, 1.0, kind)
    return _Given(entries)


def _add(entries: dict[Box, tuple[float, str]], box: Box, confidence: float, tag: str) -> None:
    known, name = entries.get(box, (confidence, ""))
    entries[box] = max(known, confidence), name or tag


def squeezed(image: Tensor, side: int) -> Tensor:
    """uint8 [3, H, W] → uint8 [3, side, side] on the CPU, antialiased bicubic as `vlscale.data.images` resizes."""
    return F.interpolate(image[None].cpu(), size=(side, side), mode="bicubic", antialias=True)[0]


def cell_means(maps: Tensor, cells: tuple[int, int]) -> Tensor:
    """[I, d, h, w] → means [I, R · C, d], row by row; where R or C doesn't divide the map, neighbours overlap."""
    return F.adaptive_avg_pool2d(maps, cells).flatten(2).transpose(1, 2)


def cell_boxes(cells: tuple[int, int]) -> Tensor:
    """R × C equal cells that tile the image, row by row: [R · C, 4] as shares."""
    rows, columns = cells
    top, left = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows], dim=-1).reshape(-1, 4)


def box_means(maps: Tensor, boxes: list[Tensor]) -> list[Tensor]:
    """Mean of the map in each box, by RoIAlign (the bilinear one, without rounding).

    Args:
        maps: [I, d, h, w].
        boxes: I of [R, 4] as shares.

    Returns:
        I of [R, d].
    """
    height, width = maps.shape[2:]
    scaled = [box.clamp(0, 1) * box.new_tensor([width, height, width, height]) for box in boxes]
    pooled = roi_align(maps, scaled, output_size=BINS, sampling_ratio=SAMPLES, aligned=True)  # [ΣR, d, BINS, BINS]
    return list(pooled.mean((2, 3)).split([len(box) for box in boxes]))


def load_backbone(spec: Spec, weights: str | None) -> CnnEncoder:
    """The network of a grid.

    Raises:
        UserError: timm can't build it, it has no feature map, or the weights are missing or don't fit.
    """
    if weights is None:
        raise UserError(
            f"{spec.text}: no weights; give --weights FILE, --weights pretrained (timm fetches its own), or for trials "
            f"--weights {RANDOM}"
        )
    if weights == RANDOM:
        warn_of_random_weights(spec)
    with errors_of(spec), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return CnnEncoder(Backbone(model=spec.model, init=weights, frozen_stages=0))


def _side(spec: Spec, reduction: int) -> int:
    text = spec.options.get("size", str(SIDE))
    if not text.isascii() or not text.isdigit() or not reduction <= int(text) <= 4096:
        raise UserError(f"{spec.text}: size={text}: expected pixels, {reduction} to 4096")
    return int(text)


def _own_cells(side: int) -> tuple[int, int]:
    """The map's own cells, unless they are more than the regions that are kept of an image."""
    return (side, side) if side * side <= MAX_REGIONS else CELLS
