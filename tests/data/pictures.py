"""Photographs that no camera took, and JPEGs of every make."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from tests.data.corpus import picture


def array_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """`picture` with fine structure, which resizing has to average."""
    noise = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    return Image.fromarray((array_of(picture(seed, width, height)) + noise).clip(0, 255).astype(np.uint8))


def jpeg_of(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


JPEGS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:2:0": lambda image: jpeg_of(image, quality=90),
    "4:4:4": lambda image: jpeg_of(image, quality=95, subsampling="4:4:4"),
    "4:2:2": lambda image: jpeg_of(image, subsampling="4:2:2"),
    "progressive": lambda image: jpeg_of(image, progressive=True),
    "restarts": lambda image: jpeg_of(image, restart_marker_rows=1),
    "rgb": lambda image: jpeg_of(image, keep_rgb=True),
    "profile": lambda image: jpeg_of(
        image, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "comment": lambda image: jpeg_of(image, comment=b"\xff\xd8\xff\xc0" * 40),
    "grey": lambda image: jpeg_of(image.convert("L")),
    "cmyk": lambda image: jpeg_of(image.convert("CMYK")),
    "fill bytes": lambda image: jpeg_of(image).replace(b"\xff\xdb", b"\xff\xff\xff\xdb"),
    "after the end": lambda image: jpeg_of(image) + b"and more",
}
