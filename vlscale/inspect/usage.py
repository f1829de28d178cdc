"""What a data set makes of a codebook over patches: the code of every cell, counts, entropy, dead codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.codebooks.health import count_codes, entropy
from vlscale.config import Data
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import evaluation_batches
from vlscale.errors import UserError
from vlscale.inspect.cells import CutImage
from vlscale.systems.protocol import Cells, System

MAX_IMAGES = 1000
"""Images that are looked at; from larger splits so many are drawn with `SEED`."""
SEED = 0
PADDING = -1
"""The code of a cell that is padding, and of those that fill up the rows of images with fewer cells than others."""
NEAR_ZERO = 1e-3
"""Of the mean norm of the codes: what is shorter counts as zero."""


@dataclass(slots=True)
class Assigned:
    """A data set and the code of every cell."""

    samples: list[Sample]
    images: list[CutImage]
    """As the system saw them; batches may differ in their grid."""
    codes: dict[str, np.ndarray]
    """[I, N] int64 per codebook, N the most cells of an image: each image's row by row, else `PADDING`."""
    skipped: list[str]
    """Images that can't be read: `path: reason`."""

    def of(self, name: str, image: int) -> np.ndarray:
        """Codes of one image's cells, [rows · columns] int64."""
        return self.codes[name][image, : len(self.images[image])]


@dataclass(slots=True)
class Usage:
    """Counts of one codebook over a data set."""

    counts: np.ndarray
    """[K] int64."""
    entropy: float
    """Of the code frequencies, in nats."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.entropy))

    @property
    def dead(self) -> list[int]:
        """Codes that no patch chose."""
        return np.flatnonzero(self.counts == 0).tolist()

    @property
    def order(self) -> np.ndarray:
        """Used codes, most used first, equal ones by number."""
        ranked = np.argsort(-self.counts, kind="stable")
        return ranked[self.counts[ranked] > 0]


def some_samples(samples: list[Sample], limit: int) -> list[Sample]:
    """All samples, or `limit` of them drawn with `SEED`, in their order."""
    if len(samples) <= limit:
        return samples
    chosen = np.random.default_rng(SEED).choice(len(samples), size=limit, replace=False)
    return [samples[index] for index in np.sort(chosen)]


@torch.inference_mode()
def assign_codes(
    system: System, samples: list[Sample], data: Data, batch_size: int, device: torch.device, name: str
) -> Assigned:
    """The code of every cell of every readable image; features and search in fp32.

    Args:
        name: of the run, for errors.

    Raises:
        UserError: the system has no codebook over patches, or no image can be read.
    """
    books = system.codebooks()
    nothing = f"{name}: its system has no codebook over image patches, so there is nothing to inspect"
    if not books:
        raise UserError(nothing)
    kept: list[int] = []
    images: list[CutImage] = []
    codes: dict[str, list[Tensor]] = {}
    skipped: list[str] = []
    for loaded, batch in normalized_batches(samples, data, batch_size, device):
        skipped += loaded.skipped
        if not len(loaded.images):
            continue
        cells = system.cells(batch)
        cut = cut_images(loaded, cells)
        # A system may take a cell for valid (SOHO's release does) in which nothing of the image is.
        valid = cells.valid.cpu() & torch.from_numpy(np.stack([image.visible() for image in cut]))  # [B, N]
        kept += loaded.image_ids.tolist()
        images += cut
        for book, features in system.codebook_features(batch).items():
            found = books[book].assign(features).cpu()  # [B, N]
            codes.setdefault(book, []).append(torch.where(valid, found, PADDING))
    if not kept:
        raise UserError(f"none of the {len(samples)} images can be read, the first is {skipped[0]}; check --image-root")
    if not codes:
        raise UserError(nothing)
    return Assigned([samples[index] for index in kept], images, {b: _joined(codes[b]) for b in codes}, skipped)


def cut_images(loaded: Batch, cells: Cells) -> list[CutImage]:
    """Every image of a batch of uint8 images, its padding cut off."""
    height, width = loaded.images.shape[2:]
    whole = [[height, width]] * len(loaded.images)
    sizes = whole if loaded.image_sizes is None else loaded.image_sizes.tolist()
    pixels = loaded.images.permute(0, 2, 3, 1).numpy()  # [B, H, W, 3]
    return [
        CutImage(image[:h, :w].copy(), cells.rows, cells.columns, (height, width))
        for image, (h, w) in zip(pixels, sizes, strict=True)
    ]


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    """Codes [B, N] of batches with different numbers of cells, below one another; shorter rows end in `PADDING`."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=PADDING) for part in parts]).numpy()


def normalized_batches(
    samples: Sequence[Sample], data: Data, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, Batch]]:
    """Readable images as loaded (uint8, on the CPU) and as the system takes them (float32, on `device`)."""
    for loaded in evaluation_batches(samples, data, batch_size):
        yield loaded, normalize_batch(loaded.to(device), data)


def usage_of(codes: np.ndarray, size: int) -> Usage:
    """Counts of codes [I, N] in a codebook of `size`; `PADDING` counts nowhere."""
    counts = count_codes(torch.from_numpy(codes[codes != PADDING]), size)
    return Usage(counts.long().numpy(), max(0.0, entropy(counts).item()))  # no “-0.00” where all have one code


def zero_codes(vectors: np.ndarray) -> list[int]:
    """Codes [K, d] of (almost) zero norm: shorter than `NEAR_ZERO` of the mean norm."""
    norms = np.linalg.norm(vectors, axis=1)
    return np.flatnonzero(norms <= NEAR_ZERO * norms.mean()).tolist()


def pick_codes(usage: Usage, count: int) -> list[int]:
    """The `count` most used codes and, drawn with `SEED`, a quarter as many of the others."""
    order = usage.order
    rare = order[count:]
    extra = min(len(rare), max(1, count // 4))
    drawn = np.random.default_rng(SEED).choice(rare, size=extra, replace=False) if extra else rare
    return [*order[:count].tolist(), *sorted(drawn.tolist(), key=lambda code: -usage.counts[code])]


def pick_patches(codes: np.ndarray, code: int, count: int) -> list[tuple[int, int]]:
    """At most `count` cells of a code as (image, cell): a seeded draw, each from another image while there are any."""
    places = np.random.default_rng([SEED, code]).permutation(np.argwhere(codes == code))
    first = np.sort(np.unique(places[:, 0], return_index=True)[1])  # the first draw of each image, in drawn order
    order = np.concatenate([first, np.setdiff1d(np.arange(len(places)), first)])[:count]
    return [(int(image), int(cell)) for image, cell in places[order]]
