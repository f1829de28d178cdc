"""Masked patches as the system predicts them from the visible ones and the caption (CB-ViLA, section IV-H, Fig. 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlscale.data.sample import Batch, Sample
from vlscale.errors import UserError
from vlscale.inspect import pictures, report
from vlscale.inspect.usage import normalized_batches, some_samples
from vlscale.interop.layout import write_json
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.objectives.patches import draw_patch_mask
from vlscale.systems.protocol import Reconstruction, offers

PICTURE = "reconstructions.png"
SEED = 0
SIDE = 168
"""Pixels of each panel."""
PANELS = ("original", "masked", "predicted")


class Reconstructs(Protocol):
    """A system with a pixel objective."""

    @property
    def grid(self) -> tuple[int, int]: ...

    def reconstruct(self, batch: Batch, patch_mask: Tensor) -> Reconstruction:
        """Pictures in normalised image space; patch_mask [B, N] bool."""
        ...


def inspect_reconstructions(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    count: int = 8,
    out: Path | None = None,
    image_root: str | None = None,
) -> Path:
    """Draw `count` images of a split: original, masked, predicted, with the caption that conditioned the prediction.

    Args:
        source: run folder or checkpoint folder.
        out: folder of the picture and its page, default `codebook/` in the run folder.

    Returns:
        The PNG.

    Raises:
        UserError: the system predicts no pixels, or nothing in the split can be drawn.
    """
    run = load_run(source)
    if not offers(run.system, Reconstructs):
        raise UserError(f"{source}: its system predicts no pixels, so there is nothing to reconstruct")
    split_name, samples = run_samples(run, data, split, image_root)
    captioned = [sample for sample in samples if sample.captions]
    if not captioned:
        raise UserError(f"split {split_name}: no image has a caption, and predictions are conditioned on one")
    rows, unexplained = _rows(run, some_samples(captioned, count))
    folder = out or run.folder / "codebook"
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save_png(_sheet(rows), folder / PICTURE)
    facts = {"run": run.folder.name, "checkpoint": run.checkpoint.name, "step": run.step, "split": split_name}
    content = {"picture": PICTURE, "caption": _caption(run, unexplained), "unexplained": unexplained, "facts": facts}
    write_json(folder / report.RECONSTRUCTIONS, content)
    report.write_page(folder)
    return folder / PICTURE


def unexplained_variance(pictures_of: Reconstruction, mask: Tensor, grid: tuple[int, int]) -> float:
    """Squared error over the masked patches, as a share of their variance about each patch's own mean colour.

    1 is what flat patches of the true mean brightness reach: the mean and deviation that `norm_pix` gives away are
    not counted as a merit.

    Args:
        pictures_of: [B, 3, H, W] each.
        mask: [B, N] bool.
    """
    true, predicted = (_cells(images, grid)[mask] for images in (pictures_of.original, pictures_of.predicted))  # [M, P]
    spread = (true - true.mean(dim=1, keepdim=True)).square().sum()
    return float((predicted - true).square().sum() / spread.clamp(min=1e-12))


def _cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] → [B, N, 3·p·p], cells row by row."""
    rows = torch.stack(images.float().cpu().chunk(grid[0], dim=2), dim=1)  # [B, R, 3, p, W]
    cells = torch.stack(rows.chunk(grid[1], dim=4), dim=2)  # [B, R, C, 3, p, p]
    return cells.flatten(3).flatten(1, 2)


@torch.inference_mode()
def _rows(run: Run, samples: list[Sample]) -> tuple[list[tuple[list[np.ndarray], str]], float]:
    """(three panels uint8 [H, W, 3], caption) per image, and the share of the variance left unexplained."""
    system = cast(Reconstructs, run.system)
    mim: Any = run.recipe.system.mim  # type: ignore[union-attr]  # whoever predicts pixels has this section
    generator = torch.Generator().manual_seed(SEED)
    rows: list[tuple[list[np.ndarray], str]] = []
    parts: list[tuple[float, int]] = []
    for loaded, images in normalized_batches(samples, run.recipe.data, run.recipe.eval.batch_size, run.device):
        if not len(loaded):
            continue
        captions = [samples[index].captions[0] for index in loaded.image_ids.tolist()]
        ids, attention = run.tokenizer.encode(captions)
        batch = replace(images, input_ids=ids.to(run.device), attention_mask=attention.to(run.device), texts=captions)
        mask = draw_patch_mask(len(captions), system.grid, mim.ratio, mim.block, generator)
        found = system.reconstruct(batch, mask.to(run.device))
        parts.append((unexplained_variance(found, mask, system.grid), len(captions)))
        panels = [_pixels(images, run.recipe.data.mean, run.recipe.data.std) for images in found]
        rows += [([panel[row] for panel in panels], caption) for row, caption in enumerate(captions)]
    if not rows:
        raise UserError("none of the images drawn for reconstruction can be read; check --image-root")
    return rows, sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts)


def _pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Normalised [B, 3, H, W] → uint8 [B, H, W, 3]."""
    shape = (1, 3, 1, 1)
    plain = images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (plain * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _sheet(rows: list[tuple[list[np.ndarray], str]]) -> Image.Image:
    """Panels side by side, the caption under each row; two columns of rows where there are many."""
    blocks = [_block(panels, caption, header=index == 0) for index, (panels, caption) in enumerate(rows)]
    columns = 2 if len(rows) > 3 else 1
    if columns == 2:
        half = -(-len(rows) // 2)
        blocks[half] = _block(*rows[half], header=True)
        left, right = (pictures.stack(part, 14) for part in (blocks[:half], blocks[half:]))
        sheet = Image.new("RGB", (left.width + right.width + 36, max(left.height, right.height)), pictures.PAPER)
        sheet.paste(left, (0, 0))
        sheet.paste(right, (left.width + 36, 0))
    else:
        sheet = pictures.stack(blocks, 14)
    return pictures.framed(sheet, 16)


def _block(panels: list[np.ndarray], caption: str, header: bool) -> Image.Image:
    tiles = [Image.fromarray(pictures.enlarge(panel, SIDE, SIDE)) for panel in panels]
    row = pictures.grid_of(tiles, len(tiles), 6)
    parts = [row, pictures.text_block([(caption, pictures.INK)], row.width, 13)]
    if header:
        heads = [pictures.text_block([(name, pictures.FAINT)], SIDE, 13) for name in PANELS]
        parts.insert(0, pictures.grid_of(heads, len(heads), 6))
    return pictures.stack(parts, 5)


def _caption(run: Run, unexplained: float) -> str:
    mim: Any = run.recipe.system.mim  # type: ignore[union-attr]
    undone = " Predicted patches are given the true patch's mean and deviation (norm_pix)." if mim.norm_pix else ""
    return (
        f"Original, masked ({100 * mim.ratio:.0f} %) and predicted, at step {run.step}; the caption below each row "
        f"conditions the prediction.{undone} Over these images {100 * unexplained:.0f} % of the variance within the "
        "masked patches is left unexplained (100 %: flat patches of the true mean)."
    )
