"""SBU Captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sources.published import SBU_CAPTIONS, SBU_URLS, put_images, read, sbu_json, write
from vlscale.data.sample import Sample
from vlscale.data.sources.base import Notes
from vlscale.errors import UserError

NAMES = [url.rsplit("/", 1)[1] for url in SBU_URLS.split()]


def _pair(folder: Path) -> Path:
    write(folder / "SBU_captioned_photo_dataset_captions.txt", SBU_CAPTIONS)
    return write(folder / "SBU_captioned_photo_dataset_urls.txt", SBU_URLS)


def _check(samples: list[Sample], images: Path) -> None:
    assert [sample.image for sample in samples] == [images / name for name in NAMES]
    assert [sample.captions for sample in samples] == [(caption,) for caption in SBU_CAPTIONS.splitlines()]
    assert [sample.aliases for sample in samples] == [("flickr:4385058960",), ("flickr:3183472382",)]
    assert [sample.extra for sample in samples] == [{"url": url} for url in SBU_URLS.split()]
    assert {sample.split for sample in samples} == {"train"}


def test_json_pair_and_folder_say_the_same(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NAMES)
    from_json = read("sbu", write(tmp_path / "sbu-captions-all.json", sbu_json()))
    _check(from_json, tmp_path / "images")
    assert read("sbu", _pair(tmp_path)) == from_json
    assert read("sbu", tmp_path) == from_json


def test_names_of_the_data_sets_own_script_and_templates(tmp_path: Path) -> None:
    put_images(tmp_path / "own", ["m_2723_4385058960_b0f291553e.jpg"])
    put_images(tmp_path / "rows", ["00001.jpg"])
    file, notes = write(tmp_path / "sbu-captions-all.json", sbu_json()), Notes()
    (first,) = read("sbu", file, notes, images=str(tmp_path / "own"))
    assert (first.id, notes.missing) == ("0", [NAMES[1]])
    (second,) = read("sbu", file, images=str(tmp_path / "rows"), name="{row:05d}.jpg")
    assert second.aliases == ("flickr:3183472382",)
    with pytest.raises(UserError, match=r"\{row\}, \{file\}, \{crc32\}, \{md5\}, \{sha1\}"):
        read("sbu", file, name="{id}.jpg")


def test_captions_under_another_name(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NAMES)
    urls = write(tmp_path / "links.txt", SBU_URLS)
    write(tmp_path / "words.txt", SBU_CAPTIONS)
    _check(read("sbu", urls, captions="words.txt"), tmp_path / "images")
    _check(read("sbu", urls, captions=str(tmp_path / "words.txt")), tmp_path / "images")
    with pytest.raises(UserError, match=r"links\.txt: expected SBU_captioned_photo_dataset_urls\.txt"):
        read("sbu", urls)
    with pytest.raises(UserError, match=r"none\.txt: can't be read"):
        read("sbu", urls, captions="none.txt")
    with pytest.raises(UserError, match="can't be read"):
        read("sbu", tmp_path)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    urls = _pair(tmp_path)
    captions = write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", SBU_CAPTIONS + "one more\n")
    with pytest.raises(UserError, match=r"urls\.txt: 2 lines, but .*captions\.txt has 3"):
        read("sbu", urls)
    assert captions.is_file()
    content = sbu_json()
    content["captions"].pop()
    with pytest.raises(UserError, match=r"all\.json: 2 image_urls and 1 captions; expected as many"):
        read("sbu", write(tmp_path / "sbu-captions-all.json", content))


def test_wrong_lines_are_named_in_their_file(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NAMES)
    urls = _pair(tmp_path)
    captions = write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", b"caf\xe9\n" + SBU_CAPTIONS.encode())
    write(urls, "no link\n" + SBU_URLS)
    with pytest.raises(UserError) as caught:
        read("sbu", urls)
    assert str(caught.value) == f"{urls}, line 1: expected the URL of an image, got 'no link'"
    notes = Notes(strict=False)
    assert [sample.id for sample in read("sbu", urls, notes)] == ["1", "2"]
    assert notes.problems == [
        str(caught.value),
        f"{captions}, line 1: not UTF-8 at byte 3; save the file as UTF-8",
    ]


def test_rows_without_caption_are_counted(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NAMES)
    content = sbu_json()
    content["captions"][0] = " "
    notes = Notes()
    (sample,) = read("sbu", write(tmp_path / "sbu-captions-all.json", content), notes)
    assert (sample.id, notes.counts, notes.missing) == ("1", {"rows without caption": 1}, [])
