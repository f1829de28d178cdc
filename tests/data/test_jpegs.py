"""The short way to a JPEG gives the pixels of Pillow's plugins, and refuses what they refuse."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.corpus import picture
from tests.data.pictures import JPEGS, array_of, jpeg_of, photograph
from vlscale.config import Data
from vlscale.data.images import (
    ImageError,
    evaluation_image,
    load_image,
    training_image,
)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_are_decoded_as_pillow_opens_them(tmp_path: Path, kind: str) -> None:
    for number, size in enumerate([(1, 1), (1, 50), (70, 1), (17, 33), (223, 121)]):
        content = JPEGS[kind](photograph(number, *size))
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(content)
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(array_of(load_image(path)), array_of(image.convert("RGB")))


def test_broken_jpegs_are_what_they_are_to_pillow(tmp_path: Path) -> None:
    """The short way must not take what the long way refuses, nor the reverse."""
    path, generator, seen = tmp_path / "a.jpg", np.random.default_rng(0), set()
    for progressive in (False, True):
        whole = jpeg_of(photograph(13, 61, 47), quality=90, progressive=progressive)
        contents = [whole[:length] for length in range(0, len(whole), 97)]
        for number in range(300):
            content = bytearray(whole)
            for _ in range(1 + number % 3):  # half of them in the headers
                content[generator.integers(700 if number % 2 else len(content))] = generator.integers(256)
            contents.append(bytes(content))
        frame = whole.index(b"\xff\xc2" if progressive else b"\xff\xc0")
        contents.append(whole[: frame + 5] + bytes(2) + whole[frame + 7 :])  # no height
        for damaged in contents:
            path.write_bytes(damaged)
            try:
                with Image.open(path) as image:
                    expected = array_of(image.convert("RGB"))
            except Exception:
                seen.add(False)
                with pytest.raises(ImageError):
                    load_image(path)
            else:
                seen.add(True)
                assert np.array_equal(array_of(load_image(path)), expected)
    assert seen == {False, True}


def test_truncated_jpegs_are_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "a.jpg", Data(image_size=32)
    for progressive in (False, True):
        whole = jpeg_of(photograph(14, 120, 90), progressive=progressive)
        for length in (2, 30, 400, len(whole) // 2, len(whole) - 40, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ImageError):
                training_image(path, data, np.random.default_rng(0), allow_flip=True)
            with pytest.raises(ImageError):
                evaluation_image(path, data)


def test_a_jpeg_that_claims_too_much_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for exif in (b"", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"):  # without and with the detour through Pillow
        content = bytearray(jpeg_of(picture(0), exif=exif))
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
        (tmp_path / "bomb.jpg").write_bytes(content)

        def allocate(*_: object) -> None:
            raise AssertionError("allocated")

        with monkeypatch.context() as patched:
            patched.setattr(Image, "new", allocate)
            with pytest.raises(ImageError, match="more than the limit"):
                training_image(tmp_path / "bomb.jpg", Data(image_size=32), np.random.default_rng(0), allow_flip=True)
