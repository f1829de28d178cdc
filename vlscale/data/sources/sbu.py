"""SBU Captions: a million Flickr photographs, as one JSON file of lists or as two text files side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlscale.data.sample import Sample
from vlscale.data.sources.base import Format, Images, Notes, Source, file_split
from vlscale.data.sources.fields import FieldError, kind, read_json_members, read_lines, utf8
from vlscale.data.sources.naming import DownloadNames, flickr_alias
from vlscale.errors import UserError

_JSON = "SBU's sbu-captions-all.json: an object with the lists image_urls and captions"
_LISTS = ("image_urls", "captions")
_TEXT = "SBU's text files: a URL a line, and a caption a line in the other"
_URLS_FILE = "SBU_captioned_photo_dataset_urls.txt"
_NAMES = ("{file}", "m_{folder}_{file}")
"""As most scripts call what they download, and as the data set's own does."""

Row = tuple[int, str, str]
"""Number from 0, URL and caption."""


def _read(source: Source, notes: Notes) -> Iterator[Sample]:
    path = Path(source.path)
    if path.is_dir():
        path /= _URLS_FILE
    images = Images(source, notes, path)
    names = DownloadNames(source, notes, images, _NAMES)
    split = file_split(path)
    rows = _from_json(path, notes) if path.suffix == ".json" else _from_text(path, _captions_file(path, source), notes)
    for row, url, caption in rows:
        if not caption:
            notes.counts["rows without caption"] += 1
            continue
        image = names.find(row, url)
        if image is not None:
            yield Sample(str(row), image, (caption,), split, aliases=flickr_alias(url), extra={"url": url})


def _from_json(path: Path, notes: Notes) -> Iterator[Row]:
    lists: dict[str, list[Any]] = {key: [] for key in _LISTS}
    for key, value in read_json_members(path, _JSON, _LISTS):
        if key in lists:
            lists[key].append(value)
    urls, captions = lists["image_urls"], lists["captions"]
    if not urls or len(urls) != len(captions):
        found = f"{len(urls)} image_urls and {len(captions)} captions"
        raise UserError(f"{path}: {found}; expected as many of one as of the other in {_JSON}")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True), start=1):
        row = None
        with notes.record(path, f"record {number}"):
            for key, value in (("image_urls", url), ("captions", caption)):
                if not isinstance(value, str):
                    raise FieldError(f'field "{key}": expected a list of strings, got {kind(value)} in it')
            row = (number - 1, _url(url), caption.strip())
        if row is not None:
            yield row


def _from_text(urls: Path, captions: Path, notes: Notes) -> Iterator[Row]:
    counts = [sum(1 for _ in read_lines(file, _TEXT)) for file in (urls, captions)]
    if counts[0] != counts[1]:
        raise UserError(f"{urls}: {counts[0]} lines, but {captions} has {counts[1]}; expected {_TEXT}")
    for (number, url), (_, caption) in zip(read_lines(urls, _TEXT), read_lines(captions, _TEXT), strict=True):
        link = words = None
        with notes.record(urls, f"line {number}"):
            link = _url(utf8(url))
        with notes.record(captions, f"line {number}"):
            words = utf8(caption).strip()
        if link is not None and words is not None:
            yield number - 1, link, words


def _captions_file(urls: Path, source: Source) -> Path:
    """The file that the source names (relative to the working directory, or else to the URLs), or that beside them."""
    if source.captions is not None:
        given = Path(source.captions).expanduser()
        return given if given.is_file() else urls.parent / given
    if "_urls" not in urls.name:
        raise UserError(f"{urls}: expected {_URLS_FILE}, or the file with the captions in captions=")
    return urls.with_name(urls.name.replace("_urls", "_captions"))


def _url(content: str) -> str:
    url = content.strip()
    if not url.startswith(("http://", "https://")):
        raise FieldError(f"expected the URL of an image, got {url[:60]!r}")
    return url


FORMATS = (
    Format(
        "sbu",
        "SBU Captions: sbu-captions-all.json or SBU_captioned_photo_dataset_urls.txt (or its folder), with images",
        _read,
        suffixes=(".json", ".txt"),
        signs=(r'\A\ufeff?\s*(?:\{\s*"(?:image_urls|user_ids)"\s*:|https?://[^\s/]*flickr\.com/\S+\s*\n)',),
        keys=frozenset({"captions", "name"}),
    ),
)
