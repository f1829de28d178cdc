"""Tuples of SPICE, the parser that MVPTR used: its JSON output is read, Java is not needed here.

SPICE writes, run with `-detailed`, a list of objects, one per image, with `image_id`, `test_tuples` and `ref_tuples`:
lists of `{"tuple": ["dog", "black"], "truth_value": true}`. Also read: objects in a mapping from image id to object,
tuples as bare lists, `truth_value` and either list left out, ids as numbers. SPICE's attribute tuples are (object,
attribute); they are turned round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any

from vlscale.data.phrases.base import MAX_TEXT, MAX_TUPLES, PhraseTuple, distinct
from vlscale.data.phrases.lexicon import lexicon
from vlscale.data.phrases.own import said
from vlscale.data.sample import Sample
from vlscale.data.sources.fields import FieldError, get, kind, read_json_array, read_json_members, record, text
from vlscale.errors import UserError

MAX_BYTES = 8 << 30
"""Of one file: it is held in memory while it is read. Several may be given."""
_EXPECTED = "SPICE's output, written with -detailed: a list of objects with image_id and test_tuples or ref_tuples"
_log = logging.getLogger(__name__)


class SpiceExtractor:
    """Looks tuples up by image id.

    An id `ID#N` is caption N, from 0, of sample ID: `write_spice_input` writes such ids. An id without `#` is a whole
    image (the sample's id, or the number in an alias such as `coco:391895`); each caption gets of its tuples those
    whose words it says, since SPICE merges the references of an image into one graph.
    """

    name = "spice"

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the files.

        Raises:
            UserError: a file can't be read, or a record is not what SPICE writes.
        """
        self._tuples: dict[str, list[PhraseTuple]] = {}
        self.missing = 0
        """Captions asked for that no file knows."""
        digest = hashlib.sha256()
        for path in paths:
            self._read(path)
            digest.update(_file_hash(path))
        self.version = f"sha256:{digest.hexdigest()[:16]}"

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        whole = self._of_image(sample)
        found = []
        for number, caption in enumerate(sample.captions):
            own = self._tuples.get(f"{sample.id}#{number}")
            if own is None and whole is not None:
                own = said(whole, caption, lexicon())
            self.missing += own is None
            found.append(own or [])
        return found

    def _of_image(self, sample: Sample) -> list[PhraseTuple] | None:
        names = (sample.id, *(alias.partition(":")[2] for alias in sample.aliases))
        return next((self._tuples[name] for name in names if name in self._tuples), None)

    def _read(self, path: Path) -> None:
        for where, row in _records(path):
            try:
                item = record(row)
                if "test_tuples" not in item and "ref_tuples" not in item:
                    raise FieldError("expected test_tuples or ref_tuples; run SPICE with -detailed")
                both = [words for key in ("test_tuples", "ref_tuples") for words in _tuples(item, key)]
                self._tuples[text(item, "image_id", "the image's id")] = distinct(both)
            except FieldError as error:
                raise UserError(f"{path}, {where}: {error}") from None


def write_spice_input(samples: Iterable[Sample], out: Path) -> int:
    """Write what SPICE reads, an entry per caption with an id that `SpiceExtractor` finds again; returns how many."""
    temporary = out.with_name(out.name + ".tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            for number, caption in enumerate(sample.captions):
                entry = {"image_id": f"{sample.id}#{number}", "test": caption, "refs": [caption]}
                file.write(("[\n" if count == 0 else ",\n") + json.dumps(entry))
                count += 1
        file.write("\n]\n" if count else "[]\n")
    os.replace(temporary, out)
    return count


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of each record, of a list or a mapping."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); expected {_EXPECTED}") from None
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes, more than {MAX_BYTES:,}; split it and give --spice several times")
    if start == b"{":
        for key, row in read_json_members(path, _EXPECTED):
            yield f"image {key[:60]}", {"image_id": key, **row} if isinstance(row, dict) else row
        return
    for number, row in enumerate(read_json_array(path, _EXPECTED), start=1):
        yield f"record {number}", row


def _tuples(item: dict[str, Any], key: str) -> list[PhraseTuple]:
    expected = 'a list of tuples, such as {"tuple": ["dog", "black"]}'
    entries = get(item, key, list, expected, default=[])
    if len(entries) > MAX_TUPLES:
        raise FieldError(f'field "{key}": expected at most {MAX_TUPLES} tuples, got {len(entries)}')
    return [_words(entry.get("tuple") if isinstance(entry, dict) else entry, key) for entry in entries]


def _words(words: Any, key: str) -> PhraseTuple:
    """One tuple; an attribute is put before its object."""
    if not isinstance(words, list) or not 1 <= len(words) <= 3:
        got = f"{len(words)} words" if isinstance(words, list) else kind(words)
        raise FieldError(f'field "{key}": expected tuples of one to three words, got {got}')
    for word in words:
        if not isinstance(word, str) or not word.strip() or len(word) > MAX_TEXT:
            got = kind(word) if not isinstance(word, str) or not word.strip() else f"a string of {len(word)} characters"
            raise FieldError(f'field "{key}": expected words of at most {MAX_TEXT} characters, got {got}')
    parts = tuple(intern(" ".join(word.lower().split())) for word in words)
    return (parts[1], parts[0]) if len(parts) == 2 else parts


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
