"""Are shards still what their manifest says, byte for byte?"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlscale.data.shards import ShardEntry, index_path, read_manifest
from vlscale.data.tar_index import index_tar, same_rows


def check_shards(folder: Path, on_progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """What differs from the manifest: sizes, hashes, indices, counts; tars it does not name. A line each.

    Raises:
        UserError: there is no manifest.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    for done, entry in enumerate(manifest.shards, start=1):
        problems += _check(folder / entry.name, entry)
        if on_progress is not None:
            on_progress("hashing", done, len(manifest.shards))
    named = {entry.name for entry in manifest.shards}
    problems += [
        f"{path}: not in the manifest, nobody reads it"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in named
    ]
    for name in ("samples", "captions", "bytes"):
        total = sum(getattr(entry, name) for entry in manifest.shards)
        if total != getattr(manifest, name):
            problems.append(f"{folder}: the manifest counts {getattr(manifest, name):,} {name}, its shards {total:,}")
    return problems


def _check(path: Path, entry: ShardEntry) -> list[str]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{path}: can't be read ({error.strerror})"]
    if digest != entry.sha256:
        return [f"{path}: its sha256 is not the manifest's: the file was changed or damaged"]
    try:
        rows, problems = index_tar(path)
        stored = np.load(index_path(path), allow_pickle=False)
    except (OSError, ValueError, tarfile.TarError) as error:
        return [f"{index_path(path)}: the index can't be read ({error})"]
    if not same_rows(rows, stored):
        problems.append(f"{index_path(path)}: the index does not fit the tar")
    captions = rows["captions"]
    for name, found in (
        ("samples", len(rows)),
        ("captions", int(captions.sum())),
        ("captioned", int((captions > 0).sum())),
    ):
        if found != getattr(entry, name):
            problems.append(f"{path}: {found:,} {name}, the manifest says {getattr(entry, name):,}")
    return problems
