"""Tars from elsewhere: img2dataset's layout without a manifest, and everything that can be wrong with a tar."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.corpus import picture
from vlscale.config import Data
from vlscale.data import shards
from vlscale.data.open import read_data
from vlscale.data.sample import SampleError, TarMember
from vlscale.data.tar_index import index_tar
from vlscale.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))


def png(seed: int, width: int = 30, height: int = 20, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def img2dataset(path: Path, first: int, count: int) -> Path:
    """As img2dataset writes: jpg, txt and json of one key, in this order."""
    files = []
    for number in range(first, first + count):
        facts = {
            "url": f"http://x/{number}",
            "caption": f"caption {number}",
            "key": f"{number:09d}",
            "status": "success",
        }
        files += [
            (f"{number:09d}.jpg", png(number)),
            (f"{number:09d}.txt", f"caption {number}".encode()),
            (f"{number:09d}.json", json.dumps({**facts, "height": 20, "status": "success", "id": None}).encode()),
        ]
    return write_tar(path, files)


def test_img2dataset(tmp_path: Path) -> None:
    for number in range(3):
        img2dataset(tmp_path / f"{number:05d}.tar", 10 * number, 4)
    for spec in (str(tmp_path), f"tars:{tmp_path}", f"{tmp_path}/{{00000..00002}}.tar"):
        corpus = read_data(Data(path=spec))
        assert [sample.id for sample in corpus] == [f"{10 * a + b:09d}" for a in range(3) for b in range(4)]
        assert [sample.captions for sample in corpus][5] == ("caption 11",)
        assert corpus[5].extra["url"] == "http://x/11"
        assert corpus.splits() == {"train": 12}
    image = corpus[5].image
    assert isinstance(image, TarMember)
    assert image.read() == png(11)
    assert str(image) == f"{tmp_path / '00001.tar'}:000000011.jpg"
    assert read_data(Data(path=f"tars:{tmp_path / '00001.tar'},split=val")).splits() == {"val": 4}


def test_the_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, built = img2dataset(tmp_path / "a.tar", 0, 3), []
    monkeypatch.setattr(shards, "index_tar", lambda tar: built.append(tar) or index_tar(tar))
    assert [len(read_data(Data(path=str(path)))) for _ in range(3)] == [3, 3, 3]
    assert built == [path]
    img2dataset(path, 0, 5)
    assert len(read_data(Data(path=str(path)))) == 5
    assert len(built) == 2


def test_captions_in_json_or_text_or_nowhere(tmp_path: Path) -> None:
    files = [
        ("a/x.one.png", b"not an image of its own"),
        ("a/json.png", png(0)),
        ("a/json.json", b'{"caption": "from json"}'),
        ("a/text.png", png(1)),
        ("a/text.txt", "from text é".encode()),
        ("b/both.png", png(2)),
        ("b/both.txt", b"from text"),
        ("b/both.json", b'{"caption": "from json"}'),
        ("b/none.png", png(3)),
        ("b/null.png", png(4)),
        ("b/null.json", b'{"caption": null}'),
        ("b/many.png", png(5)),
        ("b/many.json", b'{"captions": ["one", "two"], "id": 7, "split": "test"}'),
        ("c/notes.md", b"# nothing"),
        ("c/alone.txt", b"no picture"),
    ]
    corpus = read_data(Data(path=str(write_tar(tmp_path / "a.tar", files))))
    captions = {sample.id: sample.captions for sample in corpus}
    assert captions == {
        "json": ("from json",),
        "text": ("from text é",),
        "both": ("from text",),
        "none": (),
        "null": (),
        "7": ("one", "two"),
    }
    rows, problems = index_tar(tmp_path / "a.tar")
    assert rows["captions"].tolist() == [1, 1, 1, 0, 0, 2]
    assert problems == [f"{tmp_path / 'a.tar'}: c/alone: no image among its files"]
    assert corpus[5].split == "train", "a tar has one split"
    assert len(corpus.select(["train"])) == 4


def test_paths_and_links_that_leave_the_tar_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("good.png", "../escaped.png", "/etc/absolute.png", "a/../../b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
        for kind, name in (
            (tarfile.SYMTYPE, "soft.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.FIFOTYPE, "fifo.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    corpus = read_data(Data(path=str(path)))
    assert [sample.id for sample in corpus] == ["good"]
    assert len([record for record in caplog.records if "the path leaves the tar" in record.message]) == 3
    assert len([record for record in caplog.records if "a link or device" in record.message]) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "evil.tar", "secret.png"]


@pytest.mark.parametrize("cut", [512, 700, 5000, 12_000, -10_240, -20_000])
def test_a_tar_that_breaks_off_gives_what_is_whole(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    whole = img2dataset(tmp_path / "whole.tar", 0, 20)
    expected, problems = index_tar(whole)
    assert (len(expected), problems) == (20, [])
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole.read_bytes()[:cut])
    rows, problems = index_tar(broken)
    # All that is left is the beginning of what there was; the last sample may lack its text.
    assert np.array_equal(rows[:-1], expected[: max(0, len(rows) - 1)])
    assert len(problems) in (1, 2)
    assert "breaks off" in problems[0] or "damaged or cut off" in problems[0]


def test_a_damaged_header_ends_the_tar(tmp_path: Path) -> None:
    path = img2dataset(tmp_path / "a.tar", 0, 5)
    rows, _ = index_tar(path)
    content = bytearray(path.read_bytes())
    header = int(rows["image"][3]) - 512
    content[header : header + 512] = b"\xff" * 512
    path.write_bytes(bytes(content))
    damaged, problems = index_tar(path)
    assert np.array_equal(damaged, rows[:3])
    assert problems == [f"{path}: damaged or cut off at byte {header:,}; the samples before it are used"]


def test_one_broken_tar_among_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    img2dataset(tmp_path / "0.tar", 0, 3)
    (tmp_path / "1.tar").write_bytes(b"this is no tar")
    (tmp_path / "2.tar").write_bytes(b"")
    img2dataset(tmp_path / "3.tar", 30, 3)
    with pytest.raises(UserError, match=r"1\.tar: no uncompressed tar .*data\.skip_broken_shards=true"):
        read_data(Data(path=str(tmp_path)))
    assert len(read_data(Data(path=str(tmp_path), skip_broken_shards=True))) == 6
    assert len([record for record in caplog.records if "no uncompressed tar" in record.message]) == 2


def test_samples_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    files = [
        ("a.png", png(0)[:20]),
        ("b.png", png(1)),
        ("b.json", b"{broken"),
        ("c.png", png(2)),
        ("c.json", b"[1, 2]"),
        ("d.png", png(3)),
        ("d.json", b'{"captions": "one string"}'),
        ("e.png", png(4)),
        ("e.json", b"[" * 100_000),
        ("f.png", png(5)),
        ("f.txt", b"fine"),
    ]
    path = write_tar(tmp_path / "a.tar", files)
    rows, problems = index_tar(path)
    assert len(rows) == 1
    assert [problem.split(": ")[1] for problem in problems] == ["a", "b", "c", "d", "e"]
    # The index was made before the record broke: reading says so.
    index_of = read_data(Data(path=str(path)))
    content = bytearray(path.read_bytes())
    content[int(rows["text"][0]) - 512 : int(rows["text"][0]) + 4] = b"\0" * 516
    assert index_of[0].captions == ("fine",)


def test_a_record_that_breaks_later_is_a_sample_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.json", b'{"caption": "fine"}')])
    corpus = read_data(Data(path=str(path)))
    assert corpus[0].captions == ("fine",)
    path.write_bytes(path.read_bytes().replace(b'{"caption"', b'{"captio\xff\xff'))
    with pytest.raises(SampleError, match="JSON record can't be read"):
        corpus[0]


def test_long_names(tmp_path: Path) -> None:
    names = ["x" * 180, "folder/" * 20 + "y", "é" * 70]
    path = write_tar(tmp_path / "a.tar", [(f"{name}.png", png(seed)) for seed, name in enumerate(names)])
    corpus = read_data(Data(path=str(path)))
    assert len({sample.id for sample in corpus}) == 3
    images = [sample.image for sample in corpus]
    assert [image.read() for image in images if isinstance(image, TarMember)] == [png(0), png(1), png(2)]


def test_sizes_are_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0, 30, 20, exif=exif)), ("b.png", png(1, 30, 20))])
    corpus = read_data(Data(path=str(path)))
    assert isinstance(corpus, shards.Shards)
    assert [corpus.size_of(0), corpus.size_of(1)] == [(20, 30), (30, 20)]


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    bomb = bytearray(png(0))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    path = write_tar(tmp_path / "a.tar", [("bomb.png", bytes(bomb)), ("good.png", png(1))])
    rows, problems = index_tar(path)
    assert len(rows) == 1
    assert "more than the limit" in problems[0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{dir}/{{0..2}}.tar", "0.tar: no such tar"),
        ("tars:{dir}/{{0..2.tar", "braces don't match"),
        ("tars:{dir}/empty", "no .tar in this folder"),
        ("{dir}/none.tar", "no such tar"),
    ],
)
def test_patterns_that_match_nothing(tmp_path: Path, spec: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        read_data(Data(path=spec.format(dir=tmp_path)))
    assert expected in str(caught.value)


def test_a_compressed_tar_says_what_to_do(tmp_path: Path) -> None:
    import gzip

    path = img2dataset(tmp_path / "a.tar", 0, 3)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="no uncompressed tar"):
        read_data(Data(path=str(path)))
