"""What an image and a caption cost a loader process, against the way ALBEF's public code goes: CPU time, one thread.

The two take turns in one process, so that a busy machine slows both, and do some images before the other goes on, as
a loader process does with its caches warm. A round is one pass of both over all images; what is reported are medians
over the rounds, with the lowest and the highest.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from vlscale.config import Augmentation, Data, Tokenizer
from vlscale.data.augment import GREY, MAX_MAGNITUDE
from vlscale.data.images import ImageError, crop_box, load_image, normalize, training_image
from vlscale.data.open import read_data
from vlscale.data.sample import ImageFile, Sample, SampleError, TarMember
from vlscale.data.text import build_tokenizer
from vlscale.errors import UserError

RANDAUGMENT = (2, 7)
BATCH = 64
"""Captions tokenised, and images normalised, at once."""
TURN = 16
"""Images that one way does before it is the other's turn."""
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_WORDS = "a the two man woman dog child red small wooden ball bench street water plays runs sits holds near on in with"
_PLAIN, _AUGMENTED = "crop, flip", f"crop, flip, RandAugment{RANDAUGMENT}"

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """Over the rounds."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing the same, in milliseconds of CPU time for each image or caption."""

    what: str
    how: str
    theirs: Spread
    ours: Spread
    ratio: Spread
    """theirs / ours of each round."""


@dataclass(frozen=True)
class Report:
    """What `bench_data` measured."""

    size: int
    """Side of the square input in pixels."""
    images: int
    rounds: int
    pictures: list[Comparison]
    captions: Comparison
    normalize_device: str
    normalize_ms: Spread
    """Per image, uint8 to normalised float32: theirs does it in the worker, ours on the device."""
    largest_difference: dict[str, int]
    """Kind of picture → grey levels between our crop and resize and Pillow's, at most."""
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """As JSON, beside its place and renamed.

        Raises:
            UserError: it can't be written there.
        """
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror}); choose another --out") from None


def bench_data(
    data: str | None = None, size: int = 256, images: int = 100, rounds: int = 7, on_progress: Progress | None = None
) -> Report:
    """Measure the image path with and without RandAugment, the tokenizer, and normalisation on the device.

    Args:
        data: what `--data` takes, or a folder of images; none: photograph-like JPEGs made here.
        size: side of the square input in pixels.
        images: how many at most, evenly over the data.
        rounds: passes over them that count.
        on_progress: called with a stage, how much of it is done, and of how much.

    Raises:
        UserError: there is no image, or none can be read.
    """
    report = on_progress or (lambda stage, done, total: None)
    with TemporaryDirectory(prefix="vlscale-bench-") as folder, _one_thread():
        kinds, captions = _pictures(data, images, Path(folder))
        recipe = Data(image_size=size, augment=Augmentation(randaugment=RANDAUGMENT))
        plain = recipe.model_copy(update={"augment": Augmentation(randaugment=None)})
        pictures, difference = [], {}
        for kind, files in kinds.items():
            for how, variant in ((_PLAIN, plain), (_AUGMENTED, recipe)):
                theirs, ours = albef_transform(variant), _Ours(variant)
                tick = partial(report, f"{kind}, {how}")
                pictures.append(_compare(kind, how, theirs, ours, files, rounds, tick))
            difference[kind] = largest_difference(files, plain)
        return Report(
            size=size,
            images=len(next(iter(kinds.values()))),
            rounds=rounds,
            pictures=pictures,
            captions=_caption_times(captions, rounds),
            normalize_device="cuda" if torch.cuda.is_available() else "cpu",
            normalize_ms=_normalize_times(recipe, rounds),
            largest_difference=difference,
            versions={name: version(name) for name in ("torch", "torchvision", "pillow", "numpy", "tokenizers")},
        )


class _Ours:
    """File → uint8 [3, S, S], with a generator of its own as in the stream."""

    def __init__(self, data: Data) -> None:
        self._data, self._count = data, 0

    def __call__(self, file: ImageFile) -> Tensor:
        self._count += 1
        return training_image(file, self._data, np.random.default_rng((0, self._count)), allow_flip=True)


def albef_transform(data: Data) -> Callable[[ImageFile], Tensor]:
    """File → float32 [3, S, S] by ALBEF's pipeline, one image at a time.

    Its RandAugment is written with OpenCV; here are Pillow's operations of the same names and magnitudes.
    """
    from torchvision import transforms

    augment, steps = data.augment, []
    if augment.randaugment is not None:
        steps.append(PillowRandAugment(*augment.randaugment))
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                data.image_size, augment.crop_scale, augment.crop_ratio, transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            *steps,
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )

    def load(file: ImageFile) -> Tensor:
        image = Image.open(io.BytesIO(file.read()) if isinstance(file, TarMember) else file)
        return pipeline(image.convert("RGB"))

    return load


class PillowRandAugment:
    """ALBEF's RandomAugment: `count` operations drawn, each applied with probability ½ at `magnitude` of 10."""

    def __init__(self, count: int, magnitude: float) -> None:
        self._count, self._level = count, magnitude / MAX_MAGNITUDE
        self._generator = np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> Image.Image:
        for index in self._generator.integers(len(PILLOW_OPERATIONS), size=self._count):
            operation, signed = PILLOW_OPERATIONS[index]
            if self._generator.random() < 0.5:
                negative = signed and self._generator.random() < 0.5
                image = operation(image, -self._level if negative else self._level)
        return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Output pixel (x, y) shows input (a·x + b·y + c, d·x + e·y + f), the origin in the upper left pixel's centre."""
    a, b, c, d, e, f = matrix
    # Pillow puts the origin at the upper left corner and samples at pixel centres.
    corner = (a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e))
    return image.transform(
        image.size, Image.Transform.AFFINE, corner, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _rotate(image: Image.Image, level: float) -> Image.Image:
    cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    x, y = image.width / 2, image.height / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


PILLOW_OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], bool], ...] = (
    (lambda image, _: image, False),
    (lambda image, _: ImageOps.autocontrast(image), False),
    (lambda image, _: ImageOps.equalize(image), False),
    (lambda image, level: ImageEnhance.Brightness(image).enhance(level * 1.8 + 0.1), False),
    (lambda image, level: ImageEnhance.Sharpness(image).enhance(level * 1.8 + 0.1), False),
    (lambda image, level: _affine(image, (1, -0.3 * level, 0, 0, 1, 0)), True),
    (lambda image, level: _affine(image, (1, 0, 0, -0.3 * level, 1, 0)), True),
    (lambda image, level: _affine(image, (1, 0, -level * 10 * image.width / 256, 0, 1, 0)), True),
    (lambda image, level: _affine(image, (1, 0, 0, 0, 1, -level * 10 * image.width / 256)), True),
    (_rotate, True),
)
"""Pillow's twins of `vlscale.data.augment.OPERATIONS`, in its order."""


def largest_difference(files: Sequence[ImageFile], data: Data, crops: int = 4) -> int:
    """Grey levels between `training_image` without RandAugment and Pillow's crop and bicubic resize, at most."""
    side, largest = data.image_size, 0
    for seed, file in enumerate(file for file in files for _ in range(crops)):
        ours = training_image(file, data, np.random.default_rng(seed), allow_flip=False).permute(1, 2, 0).numpy()
        image = load_image(file)
        left, top, w, h = crop_box(image.width, image.height, data.augment, np.random.default_rng(seed))
        crop = image.crop((left, top, left + w, top + h))
        theirs = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC))
        largest = max(largest, int(np.abs(ours.astype(np.int16) - theirs).max()))
    return largest


def _compare(
    what: str,
    how: str,
    theirs: Callable[[Item], object],
    ours: Callable[[Item], object],
    items: Sequence[Item],
    rounds: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
    per_item: int = 1,
) -> Comparison:
    """Both ways in turns, who comes first alternating; a first round that does not count warms both up."""
    costs: list[tuple[float, float]] = []
    blocks = [items[start : start + TURN] for start in range(0, len(items), TURN)]
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(0)
        for turn in range(rounds + 1):
            spent = {theirs: 0.0, ours: 0.0}
            for number, block in enumerate(blocks):
                for way in (theirs, ours) if (number + turn) % 2 else (ours, theirs):
                    start = time.process_time()
                    for item in block:
                        way(item)
                    spent[way] += time.process_time() - start
            if turn:
                costs.append((spent[theirs], spent[ours]))
            tick(turn, rounds)
    unit = 1000 / (len(items) * per_item)
    return Comparison(
        what,
        how,
        theirs=Spread.of([their * unit for their, _ in costs]),
        ours=Spread.of([our * unit for _, our in costs]),
        ratio=Spread.of([their / our for their, our in costs]),
    )


def _caption_times(captions: Sequence[str], rounds: int) -> Comparison:
    """One at a time against BATCH at a time, by the same tokenizer."""
    tokenizer = build_tokenizer(Tokenizer(), captions)
    enough = (list(captions) * (BATCH * 8 // len(captions) + 1))[: BATCH * 8]
    batches = [enough[start : start + BATCH] for start in range(0, len(enough), BATCH)]

    def singly(texts: list[str]) -> None:
        for text in texts:
            tokenizer.encode([text], pad_to=tokenizer.max_tokens)

    def together(texts: list[str]) -> None:
        tokenizer.encode(texts, pad_to=tokenizer.max_tokens)

    return _compare("captions", f"one by one, {BATCH} at once", singly, together, batches, rounds, per_item=BATCH)


def _normalize_times(data: Data, rounds: int) -> Spread:
    """Milliseconds per image of a batch: of CPU time on the CPU, of the device's time on CUDA."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = torch.zeros(BATCH, 3, data.image_size, data.image_size, dtype=torch.uint8, device=device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(rounds + 1):
        start = clock()
        normalize(batch, data.mean, data.std)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((clock() - start) * 1000 / BATCH)
    return Spread.of(times[1:])


def _pictures(spec: str | None, count: int, folder: Path) -> tuple[dict[str, list[ImageFile]], list[str]]:
    """Files by kind, and captions."""
    if spec is None:
        shapes = ((224, 224), (480, 640))
        return {f"made, {h} × {w}": photographs(folder, count, h, w) for h, w in shapes}, _sentences()
    files, captions = _readable(spec, count)
    sizes = [load_image(file).size for file in files]
    width, height = (round(median(size[axis] for size in sizes)) for axis in (0, 1))
    kinds = {f"as they are, {height} × {width}": files, "enlarged, 480 × 640": enlarged(files, folder)}
    return kinds, captions or _sentences()


def _readable(spec: str, count: int) -> tuple[list[ImageFile], list[str]]:
    """`count` images evenly over a folder of images or a data set, without what can't be read, and their captions."""
    folder = Path(spec).expanduser()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS) if folder.is_dir() else []
    samples = [Sample(path.name, path) for path in paths] or read_data(Data(path=spec))
    files: list[ImageFile] = []
    captions: list[str] = []
    for number in range(min(count, len(samples))):
        with suppress(ImageError, SampleError):
            sample = samples[number * len(samples) // min(count, len(samples))]
            load_image(sample.image)
            files.append(sample.image)
            captions += [caption for caption in sample.captions if caption.strip()]
    if not files:
        raise UserError(f"{spec}: none of its images can be read; give a folder of images or what --data takes")
    return files, captions


def photographs(folder: Path, count: int, height: int, width: int) -> list[ImageFile]:
    """JPEGs (quality 90, 4:2:0) with a photograph's spectrum, edges and grain; the same ones every time."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width) + 1
    files: list[ImageFile] = []
    for number in range(count):
        noise = np.fft.rfft2(generator.normal(size=(4, height, width))) / frequency**1.7
        smooth = np.fft.irfft2(noise, s=(height, width))
        smooth /= smooth.std(axis=(1, 2), keepdims=True)
        grey = 128 + 45 * smooth[0] + 20 * smooth[1:]  # [3, H, W]
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        draw = ImageDraw.Draw(image)
        for _ in range(8):
            x, y, w, h = (generator.random(4) * (width, height, width / 3, height / 3)).tolist()
            draw.ellipse((x, y, x + w, y + h), fill=tuple(generator.integers(256, size=3).tolist()))
        files.append(_photograph(image, folder / f"{height}-{number}.jpg", 2, generator))
    return files


def enlarged(files: Sequence[ImageFile], folder: Path) -> list[ImageFile]:
    """The images as JPEGs of 480 × 640, with the grain that enlarging lacks."""
    generator = np.random.default_rng(0)
    images = (load_image(file).resize((640, 480), Image.Resampling.BICUBIC) for file in files)
    return [_photograph(image, folder / f"{number}.jpg", 4, generator) for number, image in enumerate(images)]


def _photograph(image: Image.Image, path: Path, grain: float, generator: np.random.Generator) -> Path:
    noise = generator.normal(0, grain, (image.height, image.width, 1))
    pixels = (np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90, subsampling="4:2:0")
    return path


def _sentences() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(_WORDS.split(), size=11)) for _ in range(BATCH)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a loader process runs: one thread for torch, none of the tokenizer's own."""
    threads, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if parallel is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
