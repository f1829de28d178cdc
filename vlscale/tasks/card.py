"""The part of the protocol card that every result file carries: which checkpoint, learned from what, asked what."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vlscale.config import Data
from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.interop.origin import describe_data, learned
from vlscale.interop.run import Run


def split_hash(samples: list[Sample]) -> str:
    """sha256 over ids and captions in order: equal exactly when the same questions were asked."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, *sample.captions], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def first_images(samples: list[Sample], first: int | None, what: str = "images") -> tuple[dict[str, int], list[Sample]]:
    """What the card says of `--first`, and the samples (`what` they are) that are evaluated.

    Raises:
        UserError: there are not so many.
    """
    if first is None:
        return {}, samples
    if not 1 <= first <= len(samples):
        raise UserError(f"--first {first}: expected a number of {what} from 1 to {len(samples)}, all of the split")
    return {"first": first, f"split_{what}": len(samples)}, samples[:first]


def origin(run: Run, data: str | None, split: str) -> dict[str, Any]:
    """Which checkpoint, what it learned from and what it was asked."""
    return {
        "checkpoint": str(run.checkpoint),
        "recipe": run.recipe.name,
        "step": run.step,
        **learned(run.folder, run.recipe, run.step),
        "data": data or describe_data(run.recipe),
        "split": split,
    }


def max_tokens(data: Data) -> int:
    """Positions of a text."""
    return data.tokenizer.max_tokens if data.concepts is None else data.concepts.max_words + data.concepts.max_phrases


def resolution(data: Data) -> int | str:
    """Side of the square input in pixels, or how inputs that keep their aspect ratio are resized and padded, or what
    is read in place of pixels, or that nothing is."""
    if data.blind:
        return "images hidden (data.blind)"
    if data.concepts is not None:
        side = data.concepts.pixels
        own = "" if side is None else f", of images without any the own boxes at {side} × {side} pixels"
        return f"up to {data.concepts.max_regions} regions{own}"
    if data.aspect is None:
        return data.image_size
    aspect = data.aspect
    return f"shorter side {aspect.short}, longer at most {aspect.long}, padded to multiples of {aspect.multiple}"
