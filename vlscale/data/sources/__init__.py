"""Readers of annotation formats: files in, `Sample`s out; and which samples train and which evaluate."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from vlscale.config import Data
from vlscale.data.sample import Sample
from vlscale.data.sources.jsonl import read_jsonl
from vlscale.errors import UserError

CAPTIONS_FILE = "captions.jsonl"
"""Name of the annotations in a folder made by `vlscale data`."""
TRAINING_SPLITS = ("train", "restval")
VALIDATION_SPLITS = ("val", "dev")
"""Two names for one thing."""

_log = logging.getLogger(__name__)


def read_data(data: Data) -> list[Sample]:
    """All samples of the recipe's data, every split: a jsonl file, a folder of `vlscale data`, or the embedded scenes.

    Raises:
        UserError: nothing there, or a record is wrong.
    """
    if data.path is None:
        from vlscale.data.scenes import embedded_scenes

        return read_jsonl(embedded_scenes(data.scenes) / CAPTIONS_FILE)
    root = None if data.image_root is None else Path(data.image_root).expanduser()
    return read_jsonl(annotation_file(data.path), root)


def annotation_file(path: str | Path) -> Path:
    """The jsonl file that `path` means: itself, or the one in a folder made by `vlscale data`."""
    place = Path(path).expanduser()
    if place.is_dir():
        if not (place / CAPTIONS_FILE).is_file():
            raise UserError(
                f"data {place}: a folder without {CAPTIONS_FILE}; give a jsonl file or a folder of `vlscale data`"
            )
        return place / CAPTIONS_FILE
    if not place.exists():
        raise UserError(f"data {place}: no such file or folder; give a jsonl file or a folder made by `vlscale data`")
    return place


def training_split(samples: list[Sample]) -> list[Sample]:
    """Samples to train on: splits `train` and `restval`; those without caption are dropped and counted.

    Raises:
        UserError: none is left.
    """
    return _captioned([s for s in samples if s.split in TRAINING_SPLITS], "train", samples)


def evaluation_split(samples: list[Sample], split: str | None) -> tuple[str, list[Sample]]:
    """The split's name and its samples; without a name `test`, else validation (the name tells which was taken).

    `val` and `dev` mean the same. Samples without caption are dropped and counted.

    Raises:
        UserError: no such split, or it has no caption.
    """
    there = {sample.split for sample in samples}
    if split is None:
        split = next((name for name in ("test", *VALIDATION_SPLITS) if name in there), "test")
    names = VALIDATION_SPLITS if split in VALIDATION_SPLITS else (split,)
    if split not in there:
        split = next((name for name in names if name in there), split)
    return split, _captioned([s for s in samples if s.split in names], split, samples)


def _captioned(chosen: list[Sample], split: str, samples: list[Sample]) -> list[Sample]:
    """The chosen samples that have a caption; says how many have none."""
    kept = [sample for sample in chosen if any(caption.strip() for caption in sample.captions)]
    if not kept:
        counts = ", ".join(f"{name} ({n})" for name, n in Counter(s.split for s in samples).most_common()) or "none"
        why = f"its {len(chosen)} records have no captions" if chosen else "no record has it"
        raise UserError(f"data: split {split!r} is empty, {why}; splits there are: {counts}")
    if len(kept) < len(chosen):
        missing = len(chosen) - len(kept)
        _log.warning("split %s: %d of %d records have no caption and are left out", split, missing, len(chosen))
    return kept
