"""Regions in shards: written and read back, refused where too large or broken, drawn, and absent in old shards."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from tests.data.corpus import picture, write_jsonl
from vlscale.config import Data
from vlscale.data import regions as regions_module
from vlscale.data import tar_index
from vlscale.data.corpus import without
from vlscale.data.open import read_data
from vlscale.data.regions import (
    MEMBER,
    Regions,
    object_tags,
    pack,
    problems,
    read_regions,
    strongest,
    unpack,
)
from vlscale.data.sample import Sample, SampleError, TarMember
from vlscale.data.shard_check import check_shards
from vlscale.data.shard_plan import plan_shards
from vlscale.data.shard_writer import write_shards
from vlscale.data.shards import Manifest, open_shards, read_manifest
from vlscale.data.sheet import contact_sheet
from vlscale.data.tar_index import BEFORE_REGIONS, INDEX, index_tar
from vlscale.data.validate import validate

WIDTH = 8


def some_regions(seed: int, count: int = 3) -> Regions:
    """Random features and confidences; the first box is the left half."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    if count:
        corners[0] = torch.tensor([0, 0, 0.5, 1])
    features = torch.randn(count, WIDTH, generator=generator).half()
    confidences = torch.rand(count, generator=generator).sort(descending=True).values
    return Regions(features, corners, confidences, tuple(f"tag {seed} {row}" for row in range(count)))


def assert_same(one: Regions | None, other: Regions) -> None:
    assert one is not None
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.confidences, other.confidences)
    assert one.tags == other.tags


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 60, 40).save(buffer, format="PNG")
    return buffer.getvalue()


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_files(number: int, **record: Any) -> dict[str, bytes]:
    row = {"id": f"s{number}", "captions": [f"picture {number}"], **record}
    return {f"{number}.png": png(number), f"{number}.json": json.dumps(row).encode()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A tar from elsewhere: samples 0 to 3, the last one without regions."""
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= sample_files(number, aliases=[f"coco:{number}"], regions="a key of somebody else")
        if number < 3:
            files[f"{number}.{MEMBER}"] = pack(some_regions(number, number))
    return make_tar(tmp_path / "a.tar", files)


def write(source: Path | str, out: Path, **options: Any) -> Manifest:
    plan, _, missing = plan_shards([str(source)], 1 << 16, options.pop("resize", None))
    return write_shards(plan, out, missing, 2)


def test_shards_carry_regions(tars: Path, tmp_path: Path) -> None:
    write(tars, tmp_path / "out")
    write(tmp_path / "out", tmp_path / "again", resize=20)  # boxes are shares: they stay right
    for folder in (tars, tmp_path / "out", tmp_path / "again"):
        corpus = read_data(Data(path=str(folder)))
        for number in range(3):
            assert_same(read_regions(corpus[number]), some_regions(number, number))
        assert corpus[3].regions is None
        assert read_regions(corpus[3]) is None
        assert corpus[0].extra == {"regions": "a key of somebody else"}
    out = tmp_path / "out"
    assert check_shards(out) == []
    assert validate(out).problems == []
    with tarfile.open(out / "train-00000.tar") as tar:
        assert f"000000001.{MEMBER}" in tar.getnames()
    rows, _ = index_tar(out / "train-00000.tar")
    assert np.array_equal(rows, np.load(out / "train-00000.idx.npy"))


def test_samples_in_memory_keep_their_regions(tars: Path) -> None:
    kept, dropped = without(read_data(Data(path=str(tars))), lambda sample: sample.id == "s0")
    assert dropped == 1
    assert_same(read_regions(kept[1]), some_regions(2, 2))
    assert kept[2].regions is None
    assert kept[2].extra == {"regions": "a key of somebody else"}


def test_shards_of_before_are_read(tmp_path: Path) -> None:
    files = sample_files(0) | sample_files(1)
    write(make_tar(tmp_path / "a.tar", files), tmp_path / "out")
    index = tmp_path / "out" / "train-00000.idx.npy"
    rows = np.load(index)
    assert rows.dtype == INDEX
    np.save(index, rows[list(BEFORE_REGIONS.names or ())].astype(BEFORE_REGIONS))
    assert [sample.captions for sample in open_shards(tmp_path / "out")] == [("picture 0",), ("picture 1",)]
    assert check_shards(tmp_path / "out") == []
    older = np.load(index)
    older["width"][0] += 1
    np.save(index, older)
    assert check_shards(tmp_path / "out") == [f"{index}: the index does not fit the tar"]


def test_an_index_of_before_does_not_hide_regions(tars: Path, tmp_path: Path) -> None:
    write(tars, tmp_path / "out")
    index = tmp_path / "out" / "train-00000.idx.npy"
    np.save(index, np.load(index)[list(BEFORE_REGIONS.names or ())].astype(BEFORE_REGIONS))
    assert check_shards(tmp_path / "out") == [f"{index}: the index does not fit the tar"]


def test_a_file_that_is_too_large_is_not_read(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = read_data(Data(path=str(tars)))[2]
    assert sample.regions is not None
    vast = replace(sample, regions=replace(sample.regions, length=regions_module.LARGEST + 1))
    monkeypatch.setattr(TarMember, "read", lambda member: pytest.fail("read"))
    with pytest.raises(SampleError, match="67,108,865 bytes, more than 67,108,864"):
        read_regions(vast)
    monkeypatch.setattr(tar_index, "LARGEST", len(pack(some_regions(1, 1))))
    rows, found = index_tar(tars)
    assert len(rows) == 3
    assert len(found) == 1
    assert "a.tar: 2: its regions have" in found[0]


BROKEN = {
    "no file of regions": b"garbage",
    "empty": b"",
    "cut": pack(some_regions(1, 2))[:-1],
    "other tensors": save({"x": torch.zeros(2)}, {"tags": "[]"}),
    "boxes without a dimension": save(
        {"features": torch.zeros(1, 2), "boxes": torch.tensor(1.0), "confidences": torch.zeros(1)}, {"tags": '["a"]'}
    ),
    "tags nested deep": save(
        {"features": torch.zeros(1, 2), "boxes": torch.zeros(1, 4), "confidences": torch.zeros(1)},
        {"tags": "[" * 100_000},
    ),
    "a tag too few": save(
        {"features": torch.zeros(1, 2), "boxes": torch.zeros(1, 4), "confidences": torch.zeros(1)}, {"tags": "[]"}
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_regions(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SampleError, match="regions: "):
        unpack(BROKEN[kind])
    tar = make_tar(tmp_path / "a.tar", sample_files(0) | {f"0.{MEMBER}": BROKEN[kind]} | sample_files(1))
    if kind != "empty":  # an empty file counts as none
        assert len(validate(f"tars:{tar}").problems) == 1
        manifest = write(tar, tmp_path / "out")
        assert manifest.left_out == {"missing": 0, "unreadable": 1}
        assert "regions: " in (tmp_path / "out" / "left_out.txt").read_text()


def test_what_would_spoil_a_training() -> None:
    good = some_regions(0)
    assert list(problems(good)) == []
    assert list(problems(some_regions(0, 0))) == []
    bad = Regions(good.features / 0, good.boxes + 1, good.confidences + 1, good.tags)
    assert len(list(problems(bad))) == 3
    turned = Regions(good.features, good.boxes.flip(1), good.confidences, good.tags)
    assert len(list(problems(turned))) == 1


def test_strongest_and_tags() -> None:
    boxes, features = torch.rand(4, 4), torch.arange(4.0)[:, None]
    regions = Regions(features, boxes, torch.tensor([0.1, 0.9, 0.5, 0.9]), ("dim", "dog", "", "cat"))
    best = strongest(regions, 3)
    assert best.tags == ("dog", "cat", "")
    assert best.features.flatten().tolist() == [1, 3, 2]
    assert object_tags(strongest(regions)) == ("dog", "cat")
    assert object_tags(strongest(regions), threshold=0.1) == ("dog", "cat", "dim")
    assert object_tags(strongest(regions), limit=1) == ("dog",)


def test_a_manifest_passes_on_what_found_the_regions(tars: Path, tmp_path: Path) -> None:
    write(tars, tmp_path / "out")
    place = tmp_path / "out" / "manifest.json"
    tree = json.loads(place.read_text())
    tree["options"]["regions"] = {"extractor": "fake:one", "tags": "detector"}
    place.write_text(json.dumps(tree))
    write(tmp_path / "out", tmp_path / "again")
    first: Any = read_manifest(tmp_path / "again").sources[0]
    assert first["regions"]["extractor"] == "fake:one"


def red(path: Path) -> np.ndarray:
    """Places in the first cell's picture that have the first box's colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)[12:252, 12:252]
    return np.argwhere((np.abs(pixels - (0xE6, 0x19, 0x4B)).sum(axis=2)) < 10)


def test_regions_are_drawn(tmp_path: Path) -> None:
    black = io.BytesIO()
    Image.new("RGB", (100, 50), "black").save(black, format="PNG")
    for boxes, flag, edge in (([], False, 119), ([[0, 0, 0.25, 1]], False, 59), ([[0, 0, 0.25, 1]], True, 119)):
        record = json.dumps({"captions": ["x"], "boxes": boxes, "tags": ["own"] * len(boxes)}).encode()
        files = {"0.png": black.getvalue(), "0.json": record, f"0.{MEMBER}": pack(some_regions(0, 1))}
        tar = make_tar(tmp_path / "a.tar", files)
        found = red(contact_sheet(str(tar), tmp_path / "sheet.png", regions=flag))
        right = found[found[:, 0] > 100][:, 1]  # below the name
        assert (found.min(axis=0)[1], right.max()) == (0, edge)
    with Image.open(contact_sheet(str(tar), tmp_path / "sheet.jpg", regions=True)) as sheet:
        assert sheet.format == "JPEG"


def test_samples_without_regions_are_drawn_without(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "c.jsonl", [{"image": "a.png", "captions": ["x"]}])
    assert contact_sheet(str(source), tmp_path / "sheet.png", regions=True).is_file()
    assert read_regions(Sample("a", tmp_path / "a.png")) is None
