"""What `vlscale data shards` is about to write: sources, splits, and what is missing before it starts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlscale.data.open import load_sources
from vlscale.data.recipe import excluded_aliases, kept
from vlscale.data.sample import Sample
from vlscale.data.shard_writer import REGIONS, Plan
from vlscale.data.shards import read_manifest
from vlscale.data.sources.base import FILE_KEYS, Notes, Source
from vlscale.data.sources.registry import read_source
from vlscale.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SMALLEST = 1 << 16


def plan_shards(
    specs: Sequence[str], max_size: int, resize: int | None, image_root: str | None = None
) -> tuple[Plan, Counter[str], list[str]]:
    """The plan, samples per split, and the images that are missing. Reads every annotation once.

    Raises:
        UserError: a source is wrong, has a weight, or holds nothing.
    """
    sources: list[Source] = []
    excluded: frozenset[str] = frozenset()
    for spec in specs:
        more, unwanted = load_sources(spec, image_root)
        sources += more
        excluded |= excluded_aliases(unwanted)
    for source in sources:
        if source.weight != 1:
            raise UserError(
                f"{source}: weight {source.weight:g}: shards hold every sample once; make shards of each source, and "
                "give the weights in a data recipe of the shards"
            )

    def read(notes: Notes | None = None) -> Iterator[Sample]:
        for source in sources:
            own = notes or Notes()
            yield from kept(read_source(source, own), excluded, own)

    splits, missing, identity = _first_pass(sources, excluded)
    for split in splits:
        if not re.fullmatch(r"[\w-]+", split):
            raise UserError(f"split {split!r}: shards are named by it; use letters, digits, - and _, or split=NAME")
    described: list[dict[str, object]] = [_described(source) for source in sources]
    # Images that come or go between two runs move the samples: an interrupted writing must not go on then.
    described.append({"samples": splits.total(), "sha256 of their ids": identity})
    if excluded:
        names = hashlib.sha256("\n".join(sorted(excluded)).encode()).hexdigest()
        described.append({"excluded photographs": len(excluded), "sha256": names})
    return Plan(read, described, list(splits), max_size, resize), splits, missing


def parse_size(text: str) -> int:
    """`256MB`, `1GiB` or a number of bytes.

    Raises:
        UserError: it is none of them, or too small for a tar.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None:
        raise UserError(f"--max-size {text}: expected bytes or a size such as 256MB or 1GiB")
    size = int(float(match[1]) * _UNITS[match[2] or ""])
    if size < _SMALLEST:
        raise UserError(f"--max-size {text}: expected at least {_SMALLEST:,} bytes")
    return size


def _first_pass(sources: Sequence[Source], excluded: frozenset[str]) -> tuple[Counter[str], list[str], str]:
    """Samples per split, missing images, and a hash of which samples come in which order; says what is left out."""
    splits: Counter[str] = Counter()
    missing: list[str] = []
    digest = hashlib.sha256()
    for source in sources:
        notes = Notes()
        for sample in kept(read_source(source, notes), excluded, notes):
            splits[sample.split] += 1
            digest.update(f"{sample.split}\0{sample.id}\0".encode("utf-8", "surrogatepass"))
        notes.say(source)
        missing += notes.missing
    if not splits:
        hint = f"none of their {len(missing)} images is there, first: {missing[0]}" if missing else "they are empty"
        raise UserError(f"{', '.join(map(str, sources))}: no sample: {hint}; check the paths and images=")
    return splits, missing, digest.hexdigest()


def _described(source: Source) -> dict[str, object]:
    """What the manifest says of the source; of shards with regions also what found them."""
    found = read_manifest(Path(source.path)).options.get(REGIONS) if source.format == "shards" else None
    return {"source": source.spec(), "sha256": _digests(source)} | ({REGIONS: found} if found else {})


def _digests(source: Source) -> dict[str, str]:
    """sha256 of every annotation file of the source; of a folder, of its listing with sizes."""
    digests = {}
    for key in FILE_KEYS:
        value = getattr(source, key)
        if value is None or key == "images":
            continue
        path = Path(value)
        if path.is_file():
            with path.open("rb") as file:
                digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        elif path.is_dir():
            listing = sorted(f"{item.relative_to(path)} {item.stat().st_size}" for item in path.rglob("*"))
            digests[key] = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()
    return digests
