"""What every reader of a public format is given, and what it gives: source in, notes beside, samples out."""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat

from vlscale.config import Section
from vlscale.data.sample import Sample
from vlscale.data.sources.fields import FieldError, json_object, read_lines
from vlscale.errors import UserError

_log = logging.getLogger(__name__)


class Source(Section):
    """A published data set: its files, and what to take of it. Written `FORMAT:PATH,key=value,…` or as a mapping."""

    format: str
    """Name of a reader; see `vlscale data formats`."""
    path: str
    """The annotation file or folder; for tars also a pattern such as `{00000..00012}.tar`."""
    images: str | None = None
    """Folder of the images; default: beside the annotations, or in images/ there."""
    questions: str | None = None
    """VQA v2: the question file that belongs to the annotations."""
    annotations: str | None = None
    """VQA v2: the annotations that belong to the question file."""
    attributes: str | None = None
    """Visual Genome: attributes.json."""
    image_data: str | None = None
    """Visual Genome and GQA: image_data.json, with image sizes and COCO ids."""
    classes: str | None = None
    """Open Images: class-descriptions CSV, from label to name."""
    labels: str | None = None
    """VinVL: labels.tsv; Open Images: image-level labels CSV."""
    sizes: str | None = None
    """VinVL: the TSV with heights and widths."""
    sentences: str | None = None
    """Flickr30k Entities: the Sentences folder, where it is not beside Annotations."""
    captions: str | None = None
    """SBU: the captions file that belongs to the URLs."""
    text: Literal["tags", "questions"] | None = None
    """Make captions where the source has none: one of the distinct tags, or one of each question with its answer."""
    name: str | None = None
    """Conceptual Captions, SBU: an image's file name, with {row}, {file}, {crc32}, {md5}, {sha1} of its URL."""
    split: str | None = None
    """Put every sample into this split."""
    splits: str | None = None
    """Take each image's split from this file (jsonl or Karpathy's JSON), matched by the image's file name."""
    boxes: str | None = None
    """Take boxes and tags from this file (COCO's instances, say), matched by the photograph's name (`coco:391895`)."""
    only: list[str] | None = None
    """Take samples of these splits only."""
    weight: PositiveFloat = 1.0
    """How often its samples come per epoch: 2 twice, 0.5 every other epoch."""

    def __str__(self) -> str:
        return f"{self.format}:{self.path}"

    def spec(self) -> str:
        """The source as it is written on the command line, with everything that was set."""
        rest = {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}
        options = [f",{key}={_written(value)}" for key, value in rest.items() if key not in ("format", "path")]
        return str(self) + "".join(options)


def _written(value: object) -> str:
    return "+".join(value) if isinstance(value, list) else str(value)


FILE_KEYS = (
    "path",
    "images",
    "questions",
    "annotations",
    "attributes",
    "image_data",
    "classes",
    "labels",
    "sizes",
    "sentences",
    "captions",
    "splits",
    "boxes",
)
"""Keys of `Source` that are paths."""

COMMON_KEYS = frozenset({"format", "path", "images", "split", "splits", "only", "weight", "text", "boxes"})
"""Keys of `Source` that every format has."""


@dataclass
class Notes:
    """What a reader noticed beside the samples. Strict notes end at the first wrong record, others collect them."""

    strict: bool = True
    need_images: bool = True
    """False: annotations are enough, images that are not there are neither missed nor looked for."""
    counts: Counter[str] = field(default_factory=Counter)
    """Name → number, such as "rows without caption": what was left out, and why."""
    missing: list[str] = field(default_factory=list)
    """Images that are not there; their samples were left out."""
    problems: list[str] = field(default_factory=list)
    """Wrong records, one line each: file, record, field, what was expected."""

    @contextmanager
    def record(self, file: Path | str, where: object) -> Iterator[None]:
        """Around the reading of one record: a FieldError becomes a line with file and record; the record is left out.

        Args:
            where: names the record: `record 17`, `line 3`, `image 25`.

        Raises:
            UserError: the record is wrong and the notes are strict.
        """
        try:
            yield
        except FieldError as error:
            line = f"{file}, {where}: {error}"
            if self.strict:
                raise UserError(line) from None
            self.problems.append(line)

    def say(self, source: object) -> None:
        """Log, once, what was left out."""
        for name, number in self.counts.items():
            _log.warning("%s: %s: %d", source, name, number)
        if self.missing:
            _log.warning("%s: %d images are missing, first: %s", source, len(self.missing), self.missing[0])


class Images:
    """Finds image files; folders are listed once: asking a shared file system for each of millions takes hours."""

    def __init__(self, source: Source, notes: Notes, annotations: Path) -> None:
        """`annotations`: the file or folder beside which images are looked for where the source names no folder."""
        near = annotations if annotations.is_dir() else annotations.parent
        if source.images is not None and not Path(source.images).is_dir():
            raise UserError(f"{source}: images={source.images}: no such folder; give the folder that holds the images")
        roots = [near, near / "images"] if source.images is None else [Path(source.images)]
        self.roots = [str(root) for root in roots]
        self._notes = notes
        self._listings: dict[str, frozenset[str]] = {}
        self._sorted: dict[str, list[str]] = {}

    def find(self, *names: str, prefix: str = "") -> Path | None:
        """The first of `names` (relative paths, best first) that is there; None, and a note, where none is.

        Args:
            prefix: last resort, as in `starting_with`; empty: none.

        Raises:
            FieldError: a name leaves the folder.
        """
        for name in names:
            if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise FieldError(f"expected an image path inside the image folder, got {name!r}")
            folder, _, file = name.rpartition("/")
            for root in self.roots:
                place = f"{root}/{folder}" if folder else root
                if file in self._listing(place):
                    return Path(place, file)
        found = self._any_with(prefix, "") if prefix else None
        return found or self._nowhere(names[0])

    def starting_with(self, prefix: str, folder: str = "") -> Path | None:
        """The one file directly in a root's `folder` whose name starts so (Flickr8k: photo id, then a secret)."""
        return self._any_with(prefix, folder) or self._nowhere(os.path.join(folder, prefix))

    def _any_with(self, prefix: str, folder: str) -> Path | None:
        for root in self.roots:
            place = os.path.join(root, folder) if folder else root
            found = self._by_prefix(place, prefix)
            if found is not None:
                return Path(place, found)
        return None

    def _nowhere(self, name: str) -> Path | None:
        """What to make of an image that is not there."""
        if not self._notes.need_images:
            return Path(self.roots[0], name)
        self._notes.missing.append(name)
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):  # ValueError: no file system can hold such a name
                self._listings[folder] = frozenset()
        return self._listings[folder]

    def _by_prefix(self, folder: str, prefix: str) -> str | None:
        if folder not in self._sorted:
            self._sorted[folder] = sorted(self._listing(folder))
        names = self._sorted[folder]
        place = bisect_left(names, prefix)
        return names[place] if place < len(names) and names[place].startswith(prefix) else None


def json_lines(path: Path, notes: Notes, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one a line, each with its name (`line 3`); what is none goes to the notes.

    Raises:
        UserError: the file can't be read, or (strict notes) a line is no object.
    """
    for number, line in read_lines(path, expected):
        row = None
        if line.strip():
            with notes.record(path, f"line {number}"):
                row = json_object(line)
        if row is not None:
            yield f"line {number}", row


_SPLIT = re.compile(r"(?<![a-z])(train|(?:mini)?val(?:id(?:ation)?)?|test-?dev|dev|test|challenge|submission)(?![a-z])")


def file_split(path: Path) -> str:
    """The split as the published file's name has it, `val` of v2_mscoco_val2014_annotations.json; else `train`."""
    found = _SPLIT.search(path.name.lower())
    if found is None:
        return "train"
    return "val" if found[1].removeprefix("mini").startswith("val") else found[1]


Reader = Callable[[Source, Notes], Iterator[Sample]]


@dataclass(frozen=True, slots=True)
class Format:
    """A public annotation format."""

    name: str
    help: str
    """What it is, in half a line."""
    read: Reader
    suffixes: tuple[str, ...] = ()
    """File endings it comes with; empty: a folder."""
    signs: tuple[str, ...] = ()
    """Regular expressions that all occur in the first or last 64 KB of its file, and in no other format's."""
    keys: frozenset[str] = frozenset()
    """Keys of `Source` that it reads besides COMMON_KEYS."""
    unused: frozenset[str] = frozenset()
    """Those of COMMON_KEYS that mean nothing for it."""

    def known_keys(self) -> frozenset[str]:
        """All keys that a source of this format may have."""
        return (COMMON_KEYS | self.keys) - self.unused
