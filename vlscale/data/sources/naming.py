"""What published names tell: the photograph behind a URL, a COCO image's number, and what downloads are called."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path
from string import Formatter
from urllib.parse import unquote

from vlscale.data.sources.base import Images, Notes, Source
from vlscale.data.sources.fields import FieldError
from vlscale.errors import UserError

FIELDS = ("row", "file", "crc32", "md5", "sha1")
"""What an image's file name can be made of: the row's number (from 0), or the URL's last part, CRC-32 or hash."""
TAKEN = "rows whose image file belongs to an earlier row"

_FLICKR = re.compile(r"https?://[\w.-]*flickr\.com/(?:[^?#]*/)?(\d+)_[0-9a-f]+(?:_\w+)?\.\w+(?:[?#].*)?")
_COCO = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d{4}_)?(\d{12})\.jpg")
_COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017", "test2014", "test2015", "test2017")
_SPEC = re.compile(r"(?:.?[<>=^])?0?\d{0,2}[dxXs]?")
"""Format specs that make file names; wider ones could ask for gigabytes."""


def flickr_alias(url: str) -> tuple[str, ...]:
    """`flickr:` and the photograph's number, where the URL is one of Flickr's: …/6255196340_da26cf2c9e_z.jpg."""
    match = _FLICKR.fullmatch(url)
    return () if match is None else (f"flickr:{match[1]}",)


def coco_number(name: str) -> str:
    """The image's number in a COCO file name (COCO_val2014_000000000009.jpg, 000000000009.jpg); else nothing."""
    match = _COCO.fullmatch(name)
    return "" if match is None else str(int(match[1]))


def coco_files(name: str) -> list[str]:
    """Where a COCO image may lie: as named, in its folder, or called as the other year calls the same image."""
    names = [name, *(f"{folder}/{name}" for folder in _COCO_FOLDERS)]
    if number := coco_number(name):
        digits = number.zfill(12)
        names += [f"{digits}.jpg", *(f"{folder}/{digits}.jpg" for folder in ("train2017", "val2017"))]
        for folder in ("train2014", "val2014"):
            names += [f"{folder}/COCO_{folder}_{digits}.jpg", f"COCO_{folder}_{digits}.jpg"]
    return list(dict.fromkeys(names))


class DownloadNames:
    """Finds what a URL was downloaded to: by the source's `name` template, else by what download scripts use."""

    def __init__(self, source: Source, notes: Notes, images: Images, defaults: tuple[str, ...]) -> None:
        """`defaults`: templates to try where the source gives none, each with and without `.jpg`.

        Raises:
            UserError: the source's template is none.
        """
        self._notes, self._images = notes, images
        if source.name is None:
            templates = [name for default in defaults for name in _with_and_without_jpg(default)]
        else:
            templates = [_checked(source.name, f"{source}: name={source.name}")]
        self._templates = [(template, _fields(template)) for template in templates]
        self._owners: dict[str, int] = {}

    def find(self, row: int, url: str) -> Path | None:
        """The URL's image; None, and a note, where it is not there.

        Only the URL's last part can be another URL's too (image.jpg): such a file is its first row's.

        Raises:
            FieldError: the template leads out of the image folder.
        """
        names, loose = self._names(row, url)
        if not names:
            self._notes.missing.append(url)
            return None
        path = self._images.find(*names)
        if path is not None and path.name in loose and not flickr_alias(url):
            owner = zlib.crc32(url.encode("utf-8", "surrogatepass"))
            if self._owners.setdefault(str(path), owner) != owner:
                self._notes.counts[TAKEN] += 1
                return None
        return path

    def _names(self, row: int, url: str) -> tuple[list[str], set[str]]:
        """Names to try, and those of them that tell of nothing but the URL's last part."""
        names, loose = [], set()
        files = _last_parts(url)
        values = _Values(row, url)
        for template, fields in self._templates:
            for values.file in files if "file" in fields else [""]:
                name = template.format_map(values)
                names.append(name)
                if fields == {"file"}:
                    loose.add(name.rpartition("/")[2])
        return names, loose


class _Values:
    """A row's fields, worked out when a template asks for them."""

    def __init__(self, row: int, url: str, file: str = "") -> None:
        self._row, self.file = row, file
        self._url = url.encode("utf-8", "surrogatepass")

    def __getitem__(self, field: str) -> int | str:
        match field:
            case "row":
                return self._row
            case "file":
                return self.file
            case "folder":  # for SBU's own download script alone
                return self._url.decode("utf-8", "surrogatepass").rpartition("/")[0].rpartition("/")[2]
            case "crc32":
                return zlib.crc32(self._url)
            case "md5":
                return hashlib.md5(self._url, usedforsecurity=False).hexdigest()
            case "sha1":
                return hashlib.sha1(self._url, usedforsecurity=False).hexdigest()
        raise KeyError(field)


def _with_and_without_jpg(template: str) -> tuple[str, str]:
    return template, template.removesuffix(".jpg") if template.endswith(".jpg") else f"{template}.jpg"


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(template) if field}


def _last_parts(url: str) -> list[str]:
    """The last part of the URL's path, as written and with %20 and the like resolved; none where it is no file name."""
    path = re.split(r"[?#]", url.partition("://")[2], maxsplit=1)[0]
    _, slash, file = path.rpartition("/")
    names = dict.fromkeys((file, unquote(file))) if slash else {}
    return [name for name in names if name not in {"", ".", ".."} and "/" not in name and "\0" not in name]


def _checked(template: str, where: str) -> str:
    """The template, if it is one.

    Raises:
        UserError: says why it is none, and which fields there are.
    """
    try:
        parts = list(Formatter().parse(template))
        for _, field, spec, conversion in parts:
            if field is not None and field not in FIELDS:
                raise FieldError(f"no field {{{field}}}")
            if conversion or not _SPEC.fullmatch(spec or ""):
                raise FieldError(f"can't format {{{field}}} so")
        if not _fields(template):
            raise FieldError("the same name for every image")
        if template.startswith("/") or ".." in template.split("/"):
            raise FieldError("leads out of the image folder")
        template.format_map(_Values(0, "", "a"))
    except (FieldError, ValueError) as error:
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise UserError(f"{where}: {error}; expected a file name with {known} in it, such as {{row:08d}}.jpg") from None
    return template
