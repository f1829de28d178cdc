"""Grounding by Grad-CAM, for systems that see cells and no regions: how much of a phrase's map a box holds.

As ALBEF's release grounds (paper, section 6.2): a box scores the sum of the map inside it over the square root of its
area. The release knows one expression per image and averages the maps of its tokens; here a phrase is read within its
caption, and the maps of its own tokens are added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.data.regions import read_regions
from vlscale.data.sample import Batch, Box, Sample, SampleError
from vlscale.errors import UserError
from vlscale.systems.gradcam import gradcam, word_layers
from vlscale.systems.protocol import System

SCORE = (
    "Grad-CAM of the caption's match, maps of the phrase's words added up; sum of the map in a box over the square "
    "root of its area (ALBEF's release)"
)
FINER = 8
"""Places a side of a cell between which the map is bicubic."""
SCALES, SHAPES = (0.25, 0.4, 0.6, 0.8), (0.5, 1.0, 2.0)
"""Of the grid of boxes: square roots of their areas, and widths over heights."""
_NO_AREA = 1e-6


class CamScores:
    """A system whose words attend to cells, asked as one that scores regions; see `phrase_scores.ScoresRegions`."""

    def __init__(self, system: System) -> None:
        """
        Raises:
            UserError: its words attend to no cells.
        """
        self.system, self.layers = system, len(word_layers(system))

    @property
    def grounding_layer(self) -> int:
        """The middle one, which of six is the release's (BERT's layer 8)."""
        return (self.layers - 1) // 2

    def phrase_region_scores(self, batch: Batch, spans: Tensor, layer: int | None = None) -> Tensor:
        """[B, S, R] fp32, −inf where a region is padding.

        Args:
            batch: B captions, each with its image, `region_boxes` and `region_mask`.
            spans: [B, S, L] bool: the tokens of each phrase.

        Raises:
            UserError: there is no such layer.
        """
        assert batch.region_boxes is not None
        assert batch.region_mask is not None
        maps = gradcam(self.system, batch, layer).maps  # [B, L, rows, columns]
        of_phrases = torch.einsum("bsl,blrc->bsrc", spans.to(maps.dtype), maps)
        scores = box_scores(of_phrases, _on_canvas(batch), batch.region_boxes)
        return scores.masked_fill(batch.region_mask[:, None] == 0, -torch.inf)


def box_scores(maps: Tensor, on_canvas: Tensor, boxes: Tensor) -> Tensor:
    """Sum of a map inside a box over the square root of the box's area.

    Args:
        maps: [B, S, rows, columns] fp32.
        on_canvas: [B, R, 4]: the boxes as shares of what the map covers, which may have padding.
        boxes: [B, R, 4]: as shares of the image.

    Returns:
        [B, S, R] fp32; 0 for a box without area.
    """
    rows, columns = maps.shape[2] * FINER, maps.shape[3] * FINER
    fine = F.interpolate(maps, size=(rows, columns), mode="bicubic", align_corners=False) / FINER**2
    sums = F.pad(fine.cumsum(2).cumsum(3), (1, 0, 1, 0))  # [B, S, rows + 1, columns + 1]
    x1, y1, x2, y2 = (on_canvas * on_canvas.new_tensor([columns, rows, columns, rows])).unbind(2)  # [B, R]
    inside = _at(sums, y2, x2) - _at(sums, y1, x2) - _at(sums, y2, x1) + _at(sums, y1, x1)
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return inside / sides.prod(2).clamp(min=_NO_AREA).sqrt()[:, None]


def with_candidates(batch: Batch, samples: Sequence[Sample], grid: bool) -> Batch:
    """The batch with the boxes that phrases of its images may mean, one sample an image.

    Args:
        grid: a grid of boxes, whatever the samples have.

    Raises:
        UserError: stored regions can't be read.
    """
    chosen = [box_grid() if grid else candidates(sample) for sample in samples]
    boxes = [torch.tensor(own, dtype=torch.float32) for own in chosen]  # [R, 4] each
    mask = [torch.ones(len(own), dtype=torch.int64) for own in boxes]
    padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    there = nn.utils.rnn.pad_sequence(mask, batch_first=True)
    device = batch.images.device
    return replace(batch, region_boxes=padded.to(device), region_mask=there.to(device))


def candidates(sample: Sample) -> Sequence[Box]:
    """Boxes of the stored regions, else the data's own, else a grid."""
    try:
        stored = read_regions(sample)
    except SampleError as error:
        raise UserError(f"sample {sample.id}: its regions can't be read: {error}") from None
    if stored is not None and len(stored):
        return [(x1, y1, x2, y2) for x1, y1, x2, y2 in stored.boxes.tolist()]
    return sample.boxes or box_grid()


def box_grid() -> list[Box]:
    """Boxes of several sizes and shapes all over an image, each moved by half of itself, and the whole image."""
    boxes: list[Box] = [(0.0, 0.0, 1.0, 1.0)]
    for scale, shape in itertools.product(SCALES, SHAPES):
        width, height = min(1.0, scale * shape**0.5), min(1.0, scale / shape**0.5)
        for y, x in itertools.product(_starts(height), _starts(width)):
            boxes.append((x, y, x + width, y + height))
    return boxes


def _starts(side: float) -> list[float]:
    """Evenly from 0 to 1 − side, at most half a side apart."""
    steps = -int(-(1 - side) // (side / 2))
    return [place * (1 - side) / steps for place in range(steps + 1)] if steps else [0.0]


def _on_canvas(batch: Batch) -> Tensor:
    """Boxes [B, R, 4] as shares of the padded canvas."""
    assert batch.region_boxes is not None
    if batch.image_sizes is None:
        return batch.region_boxes
    height, width = batch.images.shape[2:]
    shares = batch.image_sizes.flip(1) / batch.image_sizes.new_tensor([width, height])  # [B, 2]: of x and of y
    return batch.region_boxes * shares.repeat(1, 2)[:, None].to(batch.region_boxes.dtype)


def _at(sums: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sums [B, S, H + 1, W + 1] above and left of the points y, x [B, R], which may lie between places → [B, S, R]."""
    batch, slots, height, width = sums.shape
    top, left = (value.floor().clamp(0, side - 2).long() for value, side in ((y, height), (x, width)))
    down, right = (y - top).clamp(0, 1)[:, None], (x - left).clamp(0, 1)[:, None]

    def corner(row: Tensor, column: Tensor) -> Tensor:
        place = (row * width + column)[:, None].expand(batch, slots, -1)
        return sums.flatten(2).gather(2, place)

    above = corner(top, left) * (1 - right) + corner(top, left + 1) * right
    below = corner(top + 1, left) * (1 - right) + corner(top + 1, left + 1) * right
    return above * (1 - down) + below * down
