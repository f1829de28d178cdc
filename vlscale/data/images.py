"""Image files → uint8 tensors: decoding that survives what is on disk, crops, flips; normalisation on the device."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor
from torch.nn import functional as F

from vlscale.config import Aspect, Augmentation, Data
from vlscale.data.augment import rand_augment
from vlscale.data.blind import hide_images
from vlscale.data.sample import Batch, ImageFile, TarMember

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (Pillow's own limit: a quarter of a gigabyte of RGB)."""

# What matters becomes an ImageError that names the file; Pillow's warnings about size, EXIF and palettes don't.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""

_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Markers of baseline, extended and progressive JPEG."""
_JPEG_HARMLESS = frozenset({0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xED, 0xEE, 0xFE})
"""Tables, JFIF, colour profiles, Photoshop's and Adobe's notes, comments; not 0xE1, which may be EXIF."""
_JPEG_PIXELS = "RGBX" if features.check("libjpeg_turbo") else "RGB"
"""libjpeg-turbo can write pixels as Pillow keeps them in memory, which saves a copy."""

Transform = Callable[[Image.Image], Tensor]
"""RGB image → uint8 [3, H, W]: a square of image_size, or what `data.aspect` makes of the image."""


class ImageError(Exception):
    """An image that can't be used; says why, without the path."""


def load_image(file: ImageFile | str) -> Image.Image:
    """The file as upright 8-bit RGB: EXIF rotation applied, transparency over white, first frame of an animation.

    Raises:
        ImageError: missing, no image, truncated, broken or larger than MAX_PIXELS.
    """
    with _as_image_errors(), _opened(file) as stream:
        image = _plain_jpeg(stream)
        return _any_image(stream) if image is None else image


def _opened(file: ImageFile | str) -> IO[bytes]:
    return io.BytesIO(file.read()) if isinstance(file, TarMember) else open(file, "rb")


def upright_size(file: ImageFile | bytes) -> tuple[int, int]:
    """Width and height in pixels, EXIF rotation applied, from the header alone: of a file on disk little more is read.

    Args:
        file: where the image lies, or its bytes.

    Raises:
        ImageError: missing, no image, or larger than MAX_PIXELS.
    """
    with (
        _as_image_errors(),
        io.BytesIO(file) if isinstance(file, bytes) else _opened(file) as stream,
        Image.open(stream) as image,
    ):
        _check_size(image.width, image.height)
        turned = _orientation(image) >= 5  # the orientations that swap the sides
        return (image.height, image.width) if turned else (image.width, image.height)


@contextlib.contextmanager
def _as_image_errors() -> Iterator[None]:
    """Whatever goes wrong inside becomes an ImageError of one line."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except UnidentifiedImageError:
        raise ImageError("cannot identify image file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than the limit of {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on broken bytes, SyntaxError among them
        raise ImageError(str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}") from None


def _any_image(stream: IO[bytes]) -> Image.Image:
    """Whatever Pillow reads, as `load_image` describes it."""
    with Image.open(stream) as image:
        _check_size(image.width, image.height)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = image if image.mode == "RGB" and "transparency" not in image.info else _rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def _plain_jpeg(stream: IO[bytes]) -> Image.Image | None:
    """The common case without the detour through Pillow's plugins, the stream read only where it may be one.

    None, and the stream at its start: not a JPEG of three 8-bit colours without EXIF, or broken. The pixels are those
    that `_any_image` gives: Pillow's decoder does the work.
    """
    start = stream.read(2)
    if start == b"\xff\xd8":
        content = start + stream.read()
        size = _plain_jpeg_size(content)
        if size is not None:
            _check_size(*size)
            image = Image.new("RGB", size, None)  # not filled, for it will be
            with contextlib.suppress(ValueError):
                image.frombytes(content, "jpeg", (_JPEG_PIXELS, ""))
                return image
    stream.seek(0)
    return None


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG with three 8-bit colours and nothing before its frame header that matters."""
    at, end = 2, len(content) - 10
    while at < end and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _JPEG_FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", content, at + 4)
            return (width, height) if (bits, colours) == (8, 3) and width and height else None
        if marker not in _JPEG_HARMLESS:
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} × {height} pixels, more than the limit of {MAX_PIXELS:,}")


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format not in {"TIFF", "PNG", "MPO"}:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a picture with garbled EXIF is still a picture: it stays as it lies
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image)), "L").convert("RGB")
    if "transparency" in image.info or image.mode in {"RGBA", "LA", "PA", "La", "RGBa"}:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits, or floats in [0, 1], to 8 bits; what already lies in [0, 255] keeps its value."""
    values = np.nan_to_num(values.astype(np.float32))
    top = float(values.max(initial=0))
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 255 / 65535
    return (values * scale).round().clip(0, 255).astype(np.uint8)


def training_image(file: ImageFile | str, data: Data, generator: np.random.Generator, allow_flip: bool) -> Tensor:
    """The file through `train_transform`: uint8 [3, H, W], the same for the same generator.

    Raises:
        ImageError: as `load_image`.
    """
    return train_transform(data, generator, allow_flip)(load_image(file))


def evaluation_image(file: ImageFile | str, data: Data) -> Tensor:
    """The file through `eval_transform`: uint8 [3, H, W].

    Raises:
        ImageError: as `load_image`.
    """
    return eval_transform(data)(load_image(file))


def train_transform(data: Data, generator: np.random.Generator, allow_flip: bool) -> Transform:
    """RandomResizedCrop (bicubic), flip, RandAugment; draws as many numbers from `generator` whatever the flags.

    With `data.aspect` the whole image is resized instead of a crop, and its aspect ratio kept: SOHO's inputs are only
    flipped, RandAugment is there for who sets it.
    """
    augment = data.augment

    def transform(image: Image.Image) -> Tensor:
        if data.aspect is None:
            box, shape = crop_box(image.width, image.height, augment, generator), (data.image_size, data.image_size)
        else:
            box, shape = _whole(image, data)
        flip = generator.random() < 0.5 and augment.flip and allow_flip
        tensor = _resize(image, box, shape, flip)
        return tensor if augment.randaugment is None else rand_augment(tensor, *augment.randaugment, generator)

    return transform


def eval_transform(data: Data) -> Transform:
    """The whole image resized (bicubic) to image_size × image_size, or with `data.aspect` in its own aspect ratio."""
    return lambda image: _resize(image, *_whole(image, data))


def fitted_shape(width: int, height: int, aspect: Aspect) -> tuple[int, int]:
    """Height and width in pixels of an image resized in its aspect ratio.

    The shorter side is `aspect.short`, unless the longer would exceed `aspect.long`, which it then is. An image so long
    that nothing would be left of its shorter side keeps one pixel of it.
    """
    scale = min(aspect.short / min(width, height), aspect.long / max(width, height))
    return max(1, round(height * scale)), max(1, round(width * scale))


def normalize_batch(batch: Batch, data: Data) -> Batch:
    """The batch with images and second images normalised, on their device; padding is exactly 0, the mean colour.

    Padding is what lies right of and below `image_sizes`. With `data.blind` nothing of any image is left.
    """
    second, right = batch.second_images, batch.right
    normalized = replace(
        batch,
        images=_normalized(batch.images, batch.image_sizes, data),
        second_images=None if second is None else _normalized(second, batch.image_sizes, data),
        right=None if right is None else replace(right, images=_normalized(right.images, right.image_sizes, data)),
    )
    return hide_images(normalized) if data.blind else normalized


def _normalized(images: Tensor, sizes: Tensor | None, data: Data) -> Tensor:
    normalized = normalize(images, data.mean, data.std)
    if sizes is None:
        return normalized
    rows = torch.arange(images.shape[2], device=images.device) >= sizes[:, :1]  # [I, H]
    columns = torch.arange(images.shape[3], device=images.device) >= sizes[:, 1:]  # [I, W]
    return normalized.masked_fill_((rows[:, :, None] | columns[:, None, :])[:, None], 0.0)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, H, W] → float32 (x / 255 − mean) / std on the same device, without copying constants to it."""
    normalized = images.to(torch.float32, copy=True)
    for channel in range(3):
        normalized[:, channel].mul_(1 / (255 * std[channel])).sub_(mean[channel] / std[channel])
    return normalized


def crop_box(
    width: int, height: int, augment: Augmentation, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width, height of a random crop in pixels: torchvision's RandomResizedCrop, as the releases use it."""
    low, high = math.log(augment.crop_ratio[0]), math.log(augment.crop_ratio[1])
    smallest, largest = augment.crop_scale
    draws = generator.random(22).tolist()  # ten areas, ten aspect ratios, the place; Python's floats are faster here
    for area, aspect in zip(draws[:10], draws[10:20], strict=True):
        scale, ratio = smallest + (largest - smallest) * area, math.exp(low + (high - low) * aspect)
        w = round(math.sqrt(width * height * scale * ratio))
        h = round(math.sqrt(width * height * scale / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (width - w + 1)), int(draws[21] * (height - h + 1)), w, h
    # No draw fitted (a very long image): the largest central crop whose aspect ratio is allowed.
    ratio = min(max(width / height, augment.crop_ratio[0]), augment.crop_ratio[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _whole(image: Image.Image, data: Data) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box that is the whole image, and the height and width it is resized to."""
    square = (data.image_size, data.image_size)
    shape = square if data.aspect is None else fitted_shape(image.width, image.height, data.aspect)
    return (0, 0, image.width, image.height), shape


def _resize(image: Image.Image, box: tuple[int, int, int, int], shape: tuple[int, int], flip: bool = False) -> Tensor:
    """Crop, then antialiased bicubic on uint8: within two grey levels of Pillow's, two to three times as fast.

    Args:
        box: left, top, width, height of the crop.
        shape: height and width of the result [3, H, W].
    """
    left, top, width, height = box
    rows, columns = shape
    crop = image.crop((left, top, left + width, top + height))
    # Channels stay last, as they lie in memory: torch has fast code for it. Views are numpy's, which cost less.
    pixels = np.frombuffer(bytearray(crop.tobytes()), np.uint8).reshape(1, height, width, 3)
    tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    if height - rows > 2 * max(width - columns, 0):
        # Bytes are cut to [0, 255] between the passes, so their order shows. torch always resizes rows first; Pillow,
        # from version 13, columns where the height shrinks much more than the width.
        tensor = _bicubic(tensor, rows, width)
    planes = _bicubic(tensor, rows, columns).numpy()[0]
    result = np.empty((3, rows, columns), np.uint8)
    result[...] = planes[:, :, ::-1] if flip else planes
    return torch.from_numpy(result)


def _bicubic(pixels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
