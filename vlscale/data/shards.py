"""Reading WebDataset tars by index: vlscale's own shards with their manifest, and tars from elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import braceexpand
import numpy as np
from pydantic import NonNegativeInt, ValidationError

from vlscale.config import Section, cache_dir
from vlscale.config.loading import first_error
from vlscale.data.corpus import Corpus
from vlscale.data.files import read_span
from vlscale.data.order import Part
from vlscale.data.records import from_record
from vlscale.data.regions import MEMBER
from vlscale.data.sample import Sample, SampleError, TarMember
from vlscale.data.sources.fields import FieldError
from vlscale.data.tar_index import BEFORE_REGIONS, INDEX, captions_of, index_tar, member_name, read_record
from vlscale.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "vlscale-shards"
VERSION = 1

_log = logging.getLogger(__name__)


class ShardEntry(Section):
    """A tar and what it holds."""

    name: str
    """File name of the tar, in the manifest's folder."""
    split: str
    samples: NonNegativeInt
    captioned: NonNegativeInt
    """Samples with a caption."""
    captions: NonNegativeInt
    bytes: NonNegativeInt
    """Size of the tar."""
    sha256: str
    """Of the tar."""


class Manifest(Section):
    """What a folder of shards holds and how it was made."""

    format: str
    version: int
    samples: NonNegativeInt
    captions: NonNegativeInt
    bytes: NonNegativeInt
    splits: dict[str, int]
    """Samples per split."""
    sources: list[dict[str, object]]
    """What was read, with the sha256 of each annotation file."""
    options: dict[str, object]
    left_out: dict[str, int]
    """Reason → number of samples of the sources that are not in the shards; names stand in left_out.txt."""
    shards: list[ShardEntry]


class Shards(Corpus):
    """Tars with one split each. Holds paths and counts only; indices are memory-mapped where they are needed."""

    def __init__(self, tars: Sequence[tuple[str, str, ShardEntry]], captioned: bool = False) -> None:
        """
        Args:
            tars: path of the tar, path of its index (.npy of dtype INDEX), what it holds.
            captioned: only samples with a caption.
        """
        self._tars = [tar for tar in tars if tar[2].samples]
        self._captioned = captioned
        counts = [entry.captioned if captioned else entry.samples for _, _, entry in self._tars]
        self._counts = np.array(counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int) -> Sample:
        tar, place, entry, row = self._find(index)
        try:
            return _sample(tar, _index(place)[row], entry.split)
        except (OSError, FieldError) as error:
            raise SampleError(str(error)) from None

    def where(self, index: int) -> str:
        tar, _, _, row = self._find(index)
        return f"{tar}, sample {row + 1}"

    def size_of(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the upright image, without reading it."""
        _, place, _, row = self._find(index)
        entry = _index(place)[row]
        return int(entry["width"]), int(entry["height"])

    def parts(self) -> list[Part]:
        return [Part(self._counts[self._counts > 0])]

    def aspects(self) -> np.ndarray:
        """From the indices: no tar is read."""
        ratios = [np.empty(0, np.float32)]
        for _, place, entry in self._tars:
            rows = _index(place)
            if self._captioned and entry.captioned < entry.samples:
                rows = rows[_captioned_rows(place)]
            ratios.append((rows["width"] / rows["height"]).astype(np.float32))
        return np.concatenate(ratios)

    def splits(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (_, _, entry), count in zip(self._tars, self._counts.tolist(), strict=True):
            counts[entry.split] = counts.get(entry.split, 0) + count
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def select(self, splits: Collection[str], captioned: bool = True) -> Shards:
        chosen = [tar for tar in self._tars if tar[2].split in splits]
        return Shards(chosen, captioned or self._captioned)

    def _find(self, index: int) -> tuple[str, str, ShardEntry, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        tar, place, entry = self._tars[number]
        row = index - int(self._ends[number] - self._counts[number])
        if self._captioned and entry.captioned < entry.samples:
            row = int(_captioned_rows(place)[row])
        return tar, place, entry, row


def is_shards(folder: Path) -> bool:
    """Whether the folder has a manifest of vlscale's shards."""
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest.

    Raises:
        UserError: there is none, or it is not what `vlscale data shards` writes.
    """
    path = folder / MANIFEST
    again = "make the shards again with `vlscale data shards`"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {again}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}; {again}") from None
    if (manifest.format, manifest.version) != (FORMAT, VERSION):
        raise UserError(f"{path}: {manifest.format} version {manifest.version}, expected {FORMAT} {VERSION}; {again}")
    for entry in manifest.shards:
        if not re.fullmatch(r"[\w.-]+\.tar", entry.name):
            raise UserError(f"{path}: shard {entry.name!r}: expected the name of a tar in the same folder; {again}")
    return manifest


def open_shards(folder: Path, skip_broken: bool = False) -> Shards:
    """The shards of a manifest, each there and of the size it says.

    Args:
        skip_broken: leave out shards that are missing or of another size, and say so, instead of an error.

    Raises:
        UserError: no manifest, or a shard is missing or damaged.
    """
    tars = []
    for entry in read_manifest(folder).shards:
        path = folder / entry.name
        problem = _damage(path, entry)
        if problem is None:
            tars.append((str(path), str(index_path(path)), entry))
        elif skip_broken:
            _log.warning("%s; its %d samples are left out", problem, entry.samples)
        else:
            raise UserError(
                f"{problem}; copy it again, make the shards again, or go on without it: data.skip_broken_shards=true"
            )
    return Shards(tars)


def open_tars(pattern: str, split: str = "train", skip_broken: bool = False) -> Shards:
    """Tars without manifest, such as img2dataset's: a tar, a folder of tars or a brace pattern `{00000..00012}.tar`.

    Each tar is indexed once; the index is kept in the user's cache until the tar changes.

    Args:
        split: what their samples count as.
        skip_broken: leave out what is no tar at all, and say so, instead of an error.

    Raises:
        UserError: no tar there, or one that is no tar.
    """
    tars = []
    for path in tar_files(pattern):
        try:
            place, problems = _cached_index(path)
        except (OSError, tarfile.TarError) as error:
            if not skip_broken:
                raise UserError(
                    f"{path}: no uncompressed tar ({error}); remove it, or go on without: data.skip_broken_shards=true"
                ) from None
            _log.warning("%s: no uncompressed tar (%s); left out", path, error)
            continue
        for problem in problems:
            _log.warning("%s", problem)
        rows = np.load(place, mmap_mode="r")
        captions = rows["captions"]
        entry = ShardEntry(
            name=path.name,
            split=split,
            samples=len(rows),
            captioned=int((captions > 0).sum()),
            captions=int(captions.sum()),
            bytes=path.stat().st_size,
            sha256="",
        )
        tars.append((str(path), str(place), entry))
    return Shards(tars)


def tar_files(pattern: str) -> list[Path]:
    """The tars that a path or brace pattern means.

    Raises:
        UserError: one of them is not there.
    """
    folder = Path(pattern)
    if folder.is_dir():
        found = sorted(folder.glob("*.tar"))
        if not found:
            raise UserError(f"{pattern}: no .tar in this folder; give the folder or pattern of the tars")
        return found
    try:
        paths = [Path(name) for name in braceexpand.braceexpand(pattern)]
    except ValueError:  # unbalanced braces
        raise UserError(f"{pattern}: braces don't match; expected a pattern such as {{00000..00012}}.tar") from None
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such tar; expected a tar, a folder of tars or a pattern of tars that exist")
    return paths


def index_path(tar: Path) -> Path:
    """Where a shard's index lies beside it."""
    return tar.with_suffix(".idx.npy")


def write_index(rows: np.ndarray, path: Path) -> None:
    """Write rows of dtype INDEX, beside the place and renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    os.replace(temporary, path)


def _damage(path: Path, entry: ShardEntry) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path}: the shard is missing"
    if size != entry.bytes:
        return f"{path}: the shard has {size:,} bytes, the manifest says {entry.bytes:,}"
    try:
        rows = len(_index(str(index_path(path))))
    except (OSError, ValueError) as error:
        return f"{index_path(path)}: the shard's index can't be read ({error})"
    return None if rows == entry.samples else f"{index_path(path)}: {rows:,} rows for {entry.samples:,} samples"


def _cached_index(tar: Path) -> tuple[Path, list[str]]:
    """The index of a tar from elsewhere, made at the first use; and what was left out of it.

    Raises:
        OSError, tarfile.TarError: it can't be read, or is no tar.
    """
    state = tar.stat()
    identity = json.dumps([str(tar.resolve()), state.st_size, state.st_mtime_ns, INDEX.descr])
    folder = cache_dir() / "tar-index"
    place = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    notes = place.with_suffix(".txt")
    if not (place.is_file() and notes.is_file()):
        rows, problems = index_tar(tar)
        folder.mkdir(parents=True, exist_ok=True)
        notes.write_text("\n".join(problems), encoding="utf-8")
        write_index(rows, place)
    return place, notes.read_text(encoding="utf-8").splitlines()


@lru_cache(maxsize=256)
def _index(place: str) -> np.ndarray:
    rows = np.load(place, mmap_mode="r", allow_pickle=False)
    if rows.dtype not in (INDEX, BEFORE_REGIONS):
        raise ValueError(f"rows of {rows.dtype}, expected another layout")
    return rows


@lru_cache(maxsize=256)
def _captioned_rows(place: str) -> np.ndarray:
    return np.flatnonzero(_index(place)["captions"] > 0)


def _sample(tar: str, row: np.void, split: str) -> Sample:
    """Raises OSError or FieldError."""
    name = member_name(read_span(tar, int(row["image"]) - 512, 512))
    key = name.rpartition("/")[2].partition(".")[0]
    record = read_record(read_span(tar, int(row["record"]), int(row["record_length"])))
    text = read_span(tar, int(row["text"]), int(row["text_length"])) if row["text_length"] else b""
    second = None
    if row["second_length"]:
        second = TarMember(tar, f"{key}.second", int(row["second"]), int(row["second_length"]))
    image = TarMember(tar, name, int(row["image"]), int(row["image_length"]))
    sample = from_record({**record, "captions": list(captions_of(record, text)), "split": split}, key, image, second)
    if row.dtype == BEFORE_REGIONS or not row["regions_length"]:
        return sample
    regions = TarMember(tar, f"{key}.{MEMBER}", int(row["regions"]), int(row["regions_length"]))
    return replace(sample, regions=regions)
