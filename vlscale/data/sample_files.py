"""A sample → the files that a shard holds of it: pictures, record, regions; many at a time, in order."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from vlscale.data.images import ImageError, load_image
from vlscale.data.records import to_record
from vlscale.data.regions import MEMBER, Regions, pack, read_regions
from vlscale.data.sample import ImageFile, Sample, SampleError, TarMember

T = TypeVar("T")

_BLOCK = 512
_AHEAD = 64
"""Samples that threads work on before they are asked for."""
_QUALITY = 95
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

Annotated = tuple[Sample, Regions] | SampleError
"""A sample as it goes into the shard, and its regions; or why it can't."""


class Annotator(Protocol):
    """Finds the regions of samples on their way into shards."""

    def options(self) -> dict[str, object]:
        """What it is and how it is set: goes into the manifest, and tells one writing from another."""
        ...

    def annotate(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Annotated]:
        """Of each sample and its decoded image, upright RGB, in this order."""
        ...


@dataclass(slots=True)
class Encoded:
    """A sample's files by their endings, or why it has none."""

    files: dict[str, bytes] = field(default_factory=dict)
    captions: int = 0
    """Those that are not blank."""
    error: str = ""

    def size(self) -> int:
        """Bytes that they take in a tar."""
        return sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for content in self.files.values())


def encoded_samples(
    samples: Iterable[Sample], resize: int | None, workers: int, annotator: Annotator | None = None, batch: int = 1
) -> Iterator[tuple[Sample, Encoded]]:
    """Samples, as the source has them, with their files, in order.

    Threads decode and encode, which lets go of the interpreter; annotators see batches in the calling thread meanwhile.

    Args:
        resize: shrink images to this shorter side; None: bytes as they are. Annotators see the image before.
        batch: samples an annotator is given at once, less those whose images can't be used.
    """
    with ThreadPoolExecutor(workers) as pool:
        if annotator is None:
            yield from _in_order(pool, lambda sample: (sample, _encode(sample, resize)), samples, _AHEAD)
            return
        loaded = _in_order(pool, lambda sample: _load(sample, resize), samples, max(batch, workers))
        while rows := list(islice(loaded, batch)):
            yield from _annotate(rows, annotator)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Sample], T], samples: Iterable[Sample], ahead: int
) -> Iterator[T]:
    """What `work` makes of each, at most `ahead` of them made before they are asked for."""
    waiting: deque[Future[T]] = deque()
    try:
        for sample in samples:
            waiting.append(pool.submit(work, sample))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@dataclass(frozen=True, slots=True)
class _Loaded:
    sample: Sample
    image: Image.Image | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    error: str = ""
    """Why there is no image."""


def _load(sample: Sample, resize: int | None) -> _Loaded:
    try:
        image, ending, content = _picture(sample.image, resize)
        pictures = {ending: content}
        if sample.second is not None:
            _, ending, content = _picture(sample.second, resize)
            pictures[f"second.{ending}"] = content
    except ImageError as error:
        return _Loaded(sample, error=str(error))
    return _Loaded(sample, image, pictures)


def _encode(sample: Sample, resize: int | None) -> Encoded:
    """The files of a sample as it is; regions that lie beside it come along."""
    loaded = _load(sample, resize)
    if loaded.error:
        return Encoded(error=loaded.error)
    try:
        regions = read_regions(sample)
    except SampleError as error:
        return Encoded(error=str(error))
    return _written(sample, loaded.pictures, regions)


def _annotate(rows: Sequence[_Loaded], annotator: Annotator) -> Iterator[tuple[Sample, Encoded]]:
    good = [(row.sample, row.image) for row in rows if row.image is not None]
    found = iter(annotator.annotate([sample for sample, _ in good], [image for _, image in good]) if good else [])
    for row in rows:
        outcome = SampleError(row.error) if row.image is None else next(found)
        if isinstance(outcome, SampleError):
            yield row.sample, Encoded(error=str(outcome))
        else:
            yield row.sample, _written(outcome[0], row.pictures, outcome[1])


def _written(sample: Sample, pictures: dict[str, bytes], regions: Regions | None) -> Encoded:
    record = json.dumps(to_record(sample), ensure_ascii=False, separators=(",", ":"))
    files = {**pictures, "json": record.encode("utf-8", "surrogatepass")}
    if regions is not None:
        files[MEMBER] = pack(regions)
    return Encoded(files, sum(1 for caption in sample.captions if caption.strip()))


def _picture(file: ImageFile, resize: int | None) -> tuple[Image.Image, str, bytes]:
    """The image, and ending and bytes: as they are, or shrunk to `resize` on the shorter side.

    Raises:
        ImageError: it can't be used.
    """
    image = load_image(file)  # upright RGB; whoever trains on the shard shall not be the first to find it broken
    if resize is not None and min(image.size) > resize:
        scale = resize / min(image.size)
        size = (max(resize, round(image.width * scale)), max(resize, round(image.height * scale)))
        smaller = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        smaller.save(buffer, format="JPEG", quality=_QUALITY)
        return image, "jpg", buffer.getvalue()
    content = file.read() if isinstance(file, TarMember) else Path(file).read_bytes()
    with Image.open(io.BytesIO(content)) as header:
        ending = _ENDINGS.get(header.format or "")
    if ending is None:  # a format that shards don't carry: kept without loss
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return image, "png", buffer.getvalue()
    return image, ending, content
