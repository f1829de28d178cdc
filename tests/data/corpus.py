"""Small data sets for the tests of this folder, and where the shared ones lie."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import Stream
from vlscale.data.text import TextTokenizer, build_tokenizer

_ROOT = Path(__file__).parents[2]
WORDS = (
    "a dog runs over green grass",
    "two children play with a red ball",
    "an old man on a bench",
    "a cat on the left",
)


def shared(relative: str) -> Path:
    """A file of the shared folder (`VLSCALE_SHARED`); the test is skipped where it is absent."""
    return _present(Path(os.environ.get("VLSCALE_SHARED", _ROOT.parent / "shared")) / relative)


def reference(relative: str) -> Path:
    """A recording (`VLSCALE_REFERENCE`); the test is skipped where it is absent."""
    return _present(Path(os.environ.get("VLSCALE_REFERENCE", _ROOT.parent / "shared" / "reference")) / relative)


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth colours that differ by seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def take(source: Stream, count: int) -> list[Batch]:
    """The first batches of a stream, which is closed then."""
    batches = list(itertools.islice(source, count))
    source.close()
    return batches


def ids(batches: list[Batch]) -> list[str]:
    return [identity for batch in batches for identity in batch.sample_ids]


def assert_equal(a: list[Batch], b: list[Batch], but: tuple[str, ...] = ()) -> None:
    """Equal samples, texts and tensors (`but` some)."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert (left.sample_ids, left.texts) == (right.sample_ids, right.texts)
        for name in {"images", "input_ids", "attention_mask", "image_ids"} - set(but):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def make_samples(folder: Path, count: int) -> list[Sample]:
    """PNG files and one to three captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(count):
        path = folder / f"{index:03d}.png"
        picture(index).save(path)
        captions = tuple(f"{WORDS[(index + k) % len(WORDS)]} number {index}" for k in range(1 + index % 3))
        samples.append(Sample(f"sample-{index}", path, captions))
    return samples


def make_tokenizer(samples: list[Sample], **options: Any) -> TextTokenizer:
    from vlscale.config import Tokenizer

    return build_tokenizer(Tokenizer(**options), (caption for sample in samples for caption in sample.captions))
