"""Conceptual Captions and CC12M."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import pytest

from tests.data.sources.published import CC3M, CC12M, put_images, read, write
from vlscale.data.sources.base import Notes
from vlscale.data.sources.naming import TAKEN
from vlscale.errors import UserError

URLS = [line.split("\t")[1] for line in CC3M.splitlines()]


def _downloads(row: int, url: str) -> list[str]:
    """What scripts call the row's image."""
    raw = url.encode()
    md5, sha1, file = hashlib.md5(raw).hexdigest(), hashlib.sha1(raw).hexdigest(), url.split("?")[0].split("/")[-1]
    return [
        f"{row}_{zlib.crc32(raw)}",
        f"{row}_{zlib.crc32(raw)}.jpg",
        f"{row:08d}.jpg",
        f"{row:09d}.jpg",
        f"{row:08d}",
        f"{md5}.jpg",
        md5,
        f"{sha1}.jpg",
        f"{zlib.crc32(raw)}",
        file,
        f"{file}.jpg",
    ]


@pytest.mark.parametrize("script", range(11))
def test_images_are_found_as_download_scripts_call_them(tmp_path: Path, script: int) -> None:
    names = [_downloads(row, url)[script] for row, url in enumerate(URLS)]
    put_images(tmp_path / "training", names)
    file = write(tmp_path / "Train_GCC-training.tsv", CC3M)
    samples = read("cc", file, images=str(tmp_path / "training"))
    assert [sample.image for sample in samples] == [tmp_path / "training" / name for name in names]
    assert [sample.id for sample in samples] == ["0", "1"]
    assert [sample.captions for sample in samples] == [
        ("a very typical bus station",),
        ("sierra looked stunning in this top",),
    ]
    assert {sample.split for sample in samples} == {"train"}
    assert [sample.extra for sample in samples] == [{"url": url} for url in URLS]


def test_validation_and_cc12m(tmp_path: Path) -> None:
    put_images(tmp_path, ["00000000.jpg", "00000001.jpg"])
    samples = read("cc", write(tmp_path / "Validation_GCC-1.1.0-Validation.tsv", CC3M))
    assert {sample.split for sample in samples} == {"val"}
    first, second = read("cc", write(tmp_path / "cc12m.tsv", CC12M))
    assert first.captions == ("Syrian refugees, <PERSON>, wait",)
    assert second.extra == {"url": "https://img.example.com/5/big.png"}


def test_the_header_for_img2dataset_is_no_row(tmp_path: Path) -> None:
    put_images(tmp_path, ["00000000.jpg", "00000001.jpg"])
    samples = read("cc", write(tmp_path / "cc12m.tsv", "url\tcaption\n" + CC12M))
    assert [(sample.id, sample.image) for sample in samples] == [
        ("0", tmp_path / "00000000.jpg"),
        ("1", tmp_path / "00000001.jpg"),
    ]


def test_a_caption_may_begin_as_a_url_does(tmp_path: Path) -> None:
    put_images(tmp_path, ["00000000.jpg"])
    (sample,) = read("cc", write(tmp_path / "cc12m.tsv", "https://a.org/1.jpg\thttps://a.org is nice\n"))
    assert (sample.captions, sample.extra) == (("https://a.org is nice",), {"url": "https://a.org/1.jpg"})


def test_the_third_column_is_the_path(tmp_path: Path) -> None:
    put_images(tmp_path, ["part0/a.jpg", "00000000.jpg", "00000001.jpg"])
    first, second = CC3M.splitlines()
    samples = read("cc", write(tmp_path / "train.tsv", f"{first}\tpart0/a.jpg\r\n{second}\t\r\n"))
    assert [sample.image for sample in samples] == [tmp_path / "part0" / "a.jpg", tmp_path / "00000001.jpg"]


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    put_images(tmp_path, [f"train/{0:05d}-{zlib.crc32(URLS[0].encode()):08x}.png"])
    notes = Notes()
    file = write(tmp_path / "Train_GCC-training.tsv", CC3M)
    (sample,) = read("cc", file, notes, name="train/{row:05d}-{crc32:08x}.png")
    assert sample.id == "0"
    assert notes.missing == [f"train/00001-{zlib.crc32(URLS[1].encode()):08x}.png"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{row.__class__}.jpg", "no field {row.__class__}"),
        ("{row[0]}.jpg", "no field {row[0]}"),
        ("{url}.jpg", "no field {url}"),
        ("{}.jpg", "no field {}"),
        ("{folder}.jpg", "no field {folder}"),
        ("{row!r}.jpg", "can't format {row} so"),
        ("{row:999999999d}.jpg", "can't format {row} so"),
        ("{row:{row}d}.jpg", "can't format {row} so"),
        ("{md5:08d}.jpg", "Unknown format code 'd'"),
        ("{row.jpg", "expected '}'"),
        ("a}.jpg", "Single '}'"),
        ("image.jpg", "the same name for every image"),
        ("../{row}.jpg", "leads out of the image folder"),
        ("/data/{row}.jpg", "leads out of the image folder"),
    ],
)
def test_a_bad_template_says_what_there_is(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read("cc", write(tmp_path / "train.tsv", CC3M), name=template)
    message = str(caught.value)
    assert reason in message
    assert f"name={template}" in message
    assert "{row}, {file}, {crc32}, {md5}, {sha1}" in message
    assert "\n" not in message


def test_a_file_name_that_several_urls_share_is_the_first_ones(tmp_path: Path) -> None:
    put_images(tmp_path, ["image.jpg"])
    rows = [f"caption {i}\thttps://example.org/{i}/image.jpg\n" for i in range(3)]
    notes = Notes()
    (sample,) = read("cc", write(tmp_path / "train.tsv", "".join(rows)), notes)
    assert (sample.captions, notes.counts, notes.missing) == (("caption 0",), {TAKEN: 2}, [])


def test_names_with_escapes_and_urls_without_any_name(tmp_path: Path) -> None:
    put_images(tmp_path, ["a b.jpg"])
    urls = [
        "https://a.org/a%20b.jpg?x=1",
        "https://a.org/",
        "https://a.org",
        "https://a.org/..",
        "https://a.org/..%2f..%2fetc",
        "https://[a/%00",
    ]
    content = "".join(f"caption\t{url}\n" for url in urls)
    notes = Notes()
    (sample,) = read("cc", write(tmp_path / "train.tsv", content), notes)
    assert sample.image == tmp_path / "a b.jpg"
    assert len(notes.missing) == 5
    notes = Notes()
    assert len(read("cc", tmp_path / "train.tsv", notes, name="{file}")) == 1
    assert notes.missing[:3] == urls[1:4]


def test_rows_without_caption_are_counted_and_blank_lines_skipped(tmp_path: Path) -> None:
    put_images(tmp_path, ["00000000.jpg", "00000002.jpg"])
    notes = Notes()
    content = f"\t{URLS[0]}\n\nsierra\t{URLS[1]}\n"
    (sample,) = read("cc", write(tmp_path / "train.tsv", content), notes)
    assert (sample.id, notes.counts) == ("2", {"rows without caption": 1})


def test_flickr_photographs_are_known(tmp_path: Path) -> None:
    put_images(tmp_path, ["00000000.jpg"])
    content = "a dog\thttps://farm5.staticflickr.com/4116/4773457853_3b3ba2d1f6_o.jpg\n"
    (sample,) = read("cc", write(tmp_path / "train.tsv", content))
    assert sample.aliases == ("flickr:4773457853",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"a caption without tab", "expected two or three columns, caption<TAB>url"),
        (b"a\tb\tc\td", "expected two or three columns, caption<TAB>url"),
        (b"a caption\tftp://example.org/a.jpg", "got no http:// or https://"),
        (b"caf\xe9\thttp://example.org/a.jpg", "not UTF-8 at byte 3"),
        (b"a\thttp://example.org/a.jpg\t../../etc/passwd", "expected an image path inside the image folder"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    put_images(tmp_path, ["00000001.jpg"])
    good = CC3M.splitlines()[1].encode()
    file = write(tmp_path / "train.tsv", line + b"\n" + good + b"\n")
    with pytest.raises(UserError) as caught:
        read("cc", file)
    assert str(caught.value).startswith(f"{file}, line 1: ")
    assert expected in str(caught.value)
    notes = Notes(strict=False)
    assert [sample.id for sample in read("cc", file, notes)] == ["1"]
    assert notes.problems == [str(caught.value)]


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """Twelve million rows don't have to fit into memory, and what is wrong later doesn't matter earlier."""
    from tests.data.sources.published import FORMATS
    from vlscale.data.sources.base import Source

    put_images(tmp_path, ["00000000.jpg"])
    file = write(tmp_path / "train.tsv", CC3M.splitlines()[0] + "\nbroken\n")
    samples = FORMATS["cc"].read(Source(format="cc", path=str(file)), Notes())
    assert next(samples).id == "0"
    with pytest.raises(UserError, match="line 2"):
        next(samples)
