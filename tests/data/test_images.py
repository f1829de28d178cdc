"""Whatever is on disk becomes upright RGB or one line; crops and augmentations are what they are called."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tests.data.corpus import picture, shared
from tests.data.pictures import JPEGS, array_of, jpeg_of, photograph
from vlscale.config import CLIP_MEAN, CLIP_STD, Augmentation, Data
from vlscale.data import images
from vlscale.data.augment import GREY, OPERATIONS, Operation, rand_augment
from vlscale.data.bench import PILLOW_OPERATIONS, largest_difference
from vlscale.data.images import (
    ImageError,
    crop_box,
    eval_transform,
    evaluation_image,
    load_image,
    normalize,
    train_transform,
    training_image,
)
from vlscale.data.sample import ImageFile, TarMember

CROPS = Augmentation(crop_scale=(0.2, 1.0), flip=True, randaugment=None)


def _apply(operation: Operation, image: Image.Image, level: float) -> np.ndarray:
    """An operation on planes, applied to an image: [H, W, 3]."""
    planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    before = planes.copy()
    result = operation(planes, level).transpose(1, 2, 0)
    assert np.array_equal(planes, before)
    return result


def _by_pillow(image: Image.Image, data: Data, seed: int) -> np.ndarray:
    """What `training_image` without RandAugment has to be near: the same crop and flip of an upright image."""
    generator = np.random.default_rng(seed)
    left, top, width, height = crop_box(image.width, image.height, data.augment, generator)
    size = (data.image_size, data.image_size)
    resized = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    pixels = array_of(resized).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if generator.random() < 0.5 else pixels


def test_modes_become_rgb(tmp_path: Path) -> None:
    image = picture(0)
    for mode, suffix in [("RGB", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("P", "png"), ("1", "png"), ("CMYK", "tif")]:
        path = tmp_path / f"{mode}.{suffix}"
        image.convert(mode).save(path)
        loaded = load_image(path)
        assert (loaded.mode, loaded.size) == ("RGB", image.size)
        difference = np.abs(array_of(loaded) - array_of(image.convert(mode).convert("RGB"))).mean()
        assert difference < 8, f"{mode}: {difference}"


def test_sixteen_bits_keep_their_grey(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).round().astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "float.tif"):
        grey = array_of(load_image(tmp_path / name))
        assert np.abs(grey - np.arange(256).reshape(16, 16, 1)).max() <= 1


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.save(tmp_path / "rgba.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("rgba.png", "palette.png"):
        loaded = load_image(tmp_path / name)
        assert loaded.getpixel((0, 0)) == (255, 0, 0)
        assert loaded.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    upright = picture(1, 32, 16)
    # What the camera stored: the inverse of what a viewer has to do.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        loaded = load_image(tmp_path / name)
        assert loaded.size == upright.size
        assert np.abs(array_of(loaded) - array_of(upright)).mean() < 10  # a wrong turn: above 40


def test_garbled_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    picture(2).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert load_image(tmp_path / "a.jpg").size == (40, 30)


def test_animations_show_their_first_frame(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for name in ("a.gif", "a.png", "a.webp"):
        red.save(tmp_path / name, save_all=True, append_images=[blue], duration=50)
        pixel = load_image(tmp_path / name).getpixel((4, 4))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 200 > 50 > pixel[2]


def test_what_can_not_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(3, 200, 200).save(tmp_path / "whole.jpg", quality=95)
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    picture(3, 200, 200).save(tmp_path / "whole.png")
    png = bytearray((tmp_path / "whole.png").read_bytes())
    png[60:80] = bytes(20)
    (tmp_path / "broken.png").write_bytes(png)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    for name, reason in [
        ("truncated.jpg", "truncated"),
        ("broken.png", "."),
        ("empty.jpg", "cannot identify"),
        ("text.jpg", "cannot identify"),
        ("missing.jpg", "no such file"),
        (".", "Is a directory"),
        ("x" * 5000, "too long"),
        ("zero\0byte", "null byte"),
    ]:
        with pytest.raises(ImageError, match=reason):
            load_image(f"{tmp_path}/{name}")
    monkeypatch.setattr(images, "MAX_PIXELS", 200 * 200 - 1)
    with pytest.raises(ImageError, match="200 × 200 pixels, more than the limit"):
        load_image(tmp_path / "whole.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    picture(0).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)  # the header chunk: width, height, …, its checksum
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ImageError, match="more than the limit"):
        load_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="more than the limit"):
        training_image(tmp_path / "bomb.png", Data(), np.random.default_rng(0), allow_flip=True)


def test_evaluation_resizes_like_pillow() -> None:
    for size, target in [((500, 375), 96), ((80, 80), 64), ((20, 33), 64), ((1, 1), 16)]:
        image = picture(4, *size)
        ours = eval_transform(Data(image_size=target))(image)
        assert (ours.shape, ours.dtype) == ((3, target, target), torch.uint8)
        theirs = array_of(image.resize((target, target), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(ours.numpy().astype(int) - theirs).max() <= 2


def test_crops_are_random_resized_crops() -> None:
    generator = np.random.default_rng(0)
    augment = Augmentation(crop_scale=(0.2, 1.0))
    areas, ratios, corners = [], [], []
    for _ in range(3000):
        left, top, width, height = crop_box(400, 300, augment, generator)
        assert left >= 0 <= top
        assert left + width <= 400
        assert top + height <= 300
        areas.append(width * height / (400 * 300))
        ratios.append(width / height)
        corners.append((left == 0, left + width == 400))
    assert 0.19 < min(areas) < 0.22
    assert 0.9 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.35
    whole = torch.empty(3, 300, 400, dtype=torch.uint8)
    theirs = [RandomResizedCrop.get_params(whole, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    assert np.mean(areas) == pytest.approx(np.mean([h * w for _, _, h, w in theirs]) / (400 * 300), abs=0.02)
    assert np.mean(ratios) == pytest.approx(np.mean([w / h for _, _, h, w in theirs]), abs=0.02)
    # Both edges are reached: an off-by-one would never touch the right one.
    assert np.mean(corners, axis=0).min() > 0.001


def test_no_crop_fits_a_very_long_image() -> None:
    box = crop_box(1000, 10, Augmentation(crop_scale=(0.9, 1.0)), np.random.default_rng(0))
    assert box == (493, 0, 13, 10)
    assert crop_box(1, 1, Augmentation(), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_whole_crop_without_augmentation_is_evaluation() -> None:
    data = Data(image_size=32, augment=Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), flip=False, randaugment=None))
    image = picture(5, 48, 48)
    trained = train_transform(data, np.random.default_rng(0), allow_flip=True)(image)
    assert torch.equal(trained, eval_transform(data)(image))


def test_flips_happen_half_the_time_and_never_where_forbidden() -> None:
    data = Data(image_size=16, augment=Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), randaugment=None))
    image = picture(6, 16, 16)
    plain = eval_transform(data)(image)
    flipped = 0
    for seed in range(200):
        tensor = train_transform(data, np.random.default_rng(seed), allow_flip=True)(image)
        flipped += torch.equal(tensor, plain.flip(-1))
        assert torch.equal(train_transform(data, np.random.default_rng(seed), allow_flip=False)(image), plain)
    assert 70 < flipped < 130


def test_forbidding_the_flip_leaves_the_other_draws() -> None:
    after = []
    for allow in (True, False):
        generator = np.random.default_rng(7)
        train_transform(Data(image_size=16), generator, allow_flip=allow)(picture(7))
        after.append(generator.random())
    assert after[0] == after[1]


def test_normalisation() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    for given in (pixels, pixels.float()):
        before = given.clone()
        torch.testing.assert_close(normalize(given, CLIP_MEAN, CLIP_STD), (pixels / 255 - mean) / std)
        assert torch.equal(given, before)


def _slow_warp(source: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Output pixel p shows input `matrix` · (p, 1), bilinear, grey outside: what OpenCV's warpAffine does."""
    height, width, _ = source.shape
    padded = np.full((height + 2, width + 2, 3), GREY, dtype=float)
    padded[1:-1, 1:-1] = source
    y, x = np.mgrid[:height, :width]
    u, v = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)]))
    u, v = (u + 1).clip(0, width + 0.999), (v + 1).clip(0, height + 0.999)
    i, j = u.astype(int), v.astype(int)
    a, b = (u - i)[..., None], (v - j)[..., None]
    top = padded[j, i] * (1 - a) + padded[j, i + 1] * a
    bottom = padded[j + 1, i] * (1 - a) + padded[j + 1, i + 1] * a
    return top * (1 - b) + bottom * b


@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_against_a_slow_warp(sign: int) -> None:
    image = picture(8, 256, 256)
    level = 0.7 * sign
    angle = np.radians(30 * level)
    cos, sin = np.cos(angle), np.sin(angle)
    # OpenCV is given the map from input to output and inverts it.
    forward = {
        "shear_x": [[1, 0.3 * level, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [0.3 * level, 1, 0]],
        "translate_x": [[1, 0, 10 * level], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, 10 * level]],
        "rotate": [[cos, sin, (1 - cos) * 128 - sin * 128], [-sin, cos, sin * 128 + (1 - cos) * 128]],
    }
    geometric = [operation for operation, signed in OPERATIONS if signed]
    assert len(geometric) == len(forward) == 5
    for operation, (name, matrix) in zip(geometric, forward.items(), strict=True):
        inverse = np.linalg.inv(np.array([*matrix, [0, 0, 1]]))[:2]
        difference = np.abs(_apply(operation, image, level) - _slow_warp(np.asarray(image), inverse))
        assert np.median(difference) <= 0.5, name
        assert (difference > 3).mean() < 0.02, name  # the rim, which Pillow does not blend


def test_photometric_operations_against_their_formulas() -> None:
    image = picture(9, 64, 64)
    pixels = array_of(image)
    identity, contrast, equalize, brightness, sharpness = [operation for operation, signed in OPERATIONS if not signed]
    assert np.array_equal(_apply(identity, image, 0.7), pixels)
    assert np.abs(_apply(brightness, image, 0.7) - (pixels * 1.36).clip(0, 255)).max() <= 1
    stretched = _apply(contrast, image, 0.7)
    assert stretched.min() == 0
    assert stretched.max() == 255
    assert np.abs(np.histogram(_apply(equalize, image, 0.7), 4, (0, 256))[0] / pixels.size - 0.25).max() < 0.05
    assert _apply(sharpness, image, 0.7).std() > pixels.std()


def test_rand_augment_is_driven_by_its_generator_and_sometimes_does_nothing() -> None:
    image = torch.from_numpy(np.array(picture(10, 32, 32))).permute(2, 0, 1)
    results = [rand_augment(image, 2, 7, np.random.default_rng(seed)) for seed in range(300)]
    again = [rand_augment(image, 2, 7, np.random.default_rng(seed)) for seed in range(300)]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert all(result.shape == (3, 32, 32) and result.dtype == torch.uint8 for result in results)
    unchanged = sum(torch.equal(result, image) for result in results) / 300
    # Each operation is skipped with ½ and is Identity with 1/10: (½ + ½·1/10)² = 0.30.
    assert 0.22 < unchanged < 0.40


@pytest.mark.parametrize("size", [256, 224, 97])
def test_operations_give_what_pillow_gives(size: int) -> None:
    flat = Image.new("RGB", (size, size), (7, 7, 200))
    for image in (photograph(11, size, size), picture(12, size, size), flat):
        for (operation, signed), (twin, twin_signed) in zip(OPERATIONS, PILLOW_OPERATIONS, strict=True):
            assert signed == twin_signed
            for level in (0.7, -0.7, 0.1, -1.0) if signed else (0.7, 0.0, 1.0, 2.0):
                difference = np.abs(_apply(operation, image, level) - array_of(twin(image, level)))
                assert difference.max() <= 2, (operation, level)


def test_crops_stay_what_they_were() -> None:
    """Numbers of earlier releases: a training that goes on sees the crops it would have seen."""
    expected = [(2, 4, 320, 266), (82, 14, 291, 251), (60, 42, 226, 218), (0, 112, 174, 185)]
    after = [0.6706244146936303, 0.48519097443163506, 0.8912094095005791, 0.29840122301687566]
    for seed, (box, number) in enumerate(zip(expected, after, strict=True)):
        generator = np.random.default_rng(seed)
        assert crop_box(400, 300, Augmentation(), generator) == box
        assert generator.random() == number
    assert crop_box(37, 900, Augmentation(), np.random.default_rng(0)) == (0, 425, 37, 49)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_turned_images(tmp_path: Path, orientation: int) -> None:
    """The box is drawn on the upright image, whatever way it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(15, 90, 60).save(tmp_path / "a.jpg", exif=exif, quality=90)
    upright, data = load_image(tmp_path / "a.jpg"), Data(image_size=48, augment=CROPS)
    assert upright.size == ((90, 60) if orientation < 5 else (60, 90))
    for seed in range(6):
        ours = training_image(tmp_path / "a.jpg", data, np.random.default_rng(seed), allow_flip=True)
        assert np.abs(ours.numpy() - _by_pillow(upright, data, seed)).max() <= 4


SIZES = [(1, 1), (1, 90), (90, 1), (33, 17), (47, 300), (300, 47), (101, 103), (640, 480), (480, 640), (223, 331)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes_are_cropped_and_resized_like_pillow(tmp_path: Path, size: tuple[int, int]) -> None:
    photograph(16, *size).save(tmp_path / "a.jpg", quality=90)
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255
    Image.fromarray(noise).save(tmp_path / "a.png")
    for path, side in [(tmp_path / "a.jpg", 64), (tmp_path / "a.png", 64), (tmp_path / "a.png", 256)]:
        data, image = Data(image_size=side, augment=CROPS), load_image(path)
        for seed in range(6):
            ours = training_image(path, data, np.random.default_rng(seed), allow_flip=True)
            assert (ours.shape, ours.dtype, ours.is_contiguous()) == ((3, side, side), torch.uint8, True)
            assert np.abs(ours.numpy() - _by_pillow(image, data, seed)).max() <= 4
        whole = array_of(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(evaluation_image(path, data).numpy() - whole).max() <= 4


def test_photographs_are_cropped_and_resized_like_pillow() -> None:
    flickr = sorted(shared("data/flickr8k/images").iterdir())[::350]
    coco = sorted(shared("data/coco/images").iterdir())[::20]
    for size, files in [(256, flickr), (96, flickr), (256, coco), (96, coco)]:
        chosen: list[ImageFile] = [*files]
        data = Data(image_size=size, augment=CROPS)
        assert largest_difference(chosen, data) <= 4
        for file in chosen:
            whole = array_of(load_image(file).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert np.abs(evaluation_image(file, data).numpy() - whole).max() <= 4


def test_every_kind_of_file_can_be_trained_on(tmp_path: Path) -> None:
    image, data = photograph(17, 50, 40), Data(image_size=32, augment=CROPS)
    Image.fromarray((np.arange(2000).reshape(40, 50) * 32).astype(np.uint16)).save(tmp_path / "deep.png")
    image.save(tmp_path / "moves.gif", save_all=True, append_images=[picture(0, 50, 40)])
    image.save(tmp_path / "moves.webp", save_all=True, append_images=[picture(0, 50, 40)])
    image.convert("P").save(tmp_path / "palette.png", transparency=3)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    for kind, encode in JPEGS.items():
        (tmp_path / f"{kind.replace(':', '')}.jpg").write_bytes(encode(image))
    for path in sorted(tmp_path.iterdir()):
        upright = load_image(path)
        for seed in range(4):
            ours = training_image(path, data, np.random.default_rng(seed), allow_flip=True)
            assert np.abs(ours.numpy() - _by_pillow(upright, data, seed)).max() <= 4, path.name


def test_the_generator_decides_everything_and_the_source_nothing(tmp_path: Path) -> None:
    path, data = tmp_path / "a.jpg", Data(image_size=64)
    content = jpeg_of(photograph(18, 120, 90), quality=90)
    path.write_bytes(content)
    (tmp_path / "a.tar").write_bytes(b"before" + content + b"after")
    member = TarMember(str(tmp_path / "a.tar"), "a.jpg", 6, len(content))
    seen = set()
    for seed in range(20):
        files: list[ImageFile | str] = [path, str(path), member]
        results = [training_image(file, data, np.random.default_rng(seed), allow_flip=True) for file in files]
        assert all(torch.equal(result, results[0]) for result in results)
        transform = train_transform(data, np.random.default_rng(seed), allow_flip=True)
        assert torch.equal(transform(load_image(path)), results[0])
        seen.add(results[0].numpy().tobytes())
    assert len(seen) == 20
    assert torch.equal(evaluation_image(member, data), evaluation_image(path, data))
    with pytest.raises(ImageError, match="early"):
        training_image(TarMember(member.tar, "a.jpg", 6, 10**6), data, np.random.default_rng(0), allow_flip=True)
