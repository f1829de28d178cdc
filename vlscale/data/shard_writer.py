"""Sources → shards: the same bytes for the same input and options, however often the writing was interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from vlscale.data.sample import Sample
from vlscale.data.sample_files import Annotator, Encoded, encoded_samples
from vlscale.data.shards import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    ShardEntry,
    index_path,
    is_shards,
    read_manifest,
    write_index,
)
from vlscale.data.tar_index import index_tar
from vlscale.errors import UserError

LEFT_OUT = "left_out.txt"
REGIONS = "regions"
"""Key of a manifest's options: how its regions were found."""
_PROGRESS = ".progress.jsonl"
"""Options of an unfinished writing, then a line per finished shard."""
_TAR_END = 10240
"""What closing a tar adds at most."""

Report = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write and where from. `read` gives all samples anew at every call, in one order."""

    read: Callable[[], Iterable[Sample]]
    sources: list[dict[str, object]]
    """Goes into the manifest, and tells whether an interrupted writing was of the same thing."""
    splits: list[str]
    max_size: int
    """Largest tar in bytes; a single sample may be larger."""
    resize: int | None = None
    """Shrink images to this shorter side; smaller ones, and all without it, keep their bytes."""
    annotator: Annotator | None = None
    """Finds regions to lie beside the images; None: those that the samples have already."""
    batch: int = 1
    """Samples that the annotator is given at once. Not among the options: who ran out of memory may go on with less."""

    def options(self) -> dict[str, object]:
        found = {} if self.annotator is None else {REGIONS: self.annotator.options()}
        return {"max_size": self.max_size, "resize": self.resize, **found}


@dataclass(slots=True)
class _Done:
    """A finished shard and how far its split has been read when it was."""

    entry: ShardEntry
    consumed: int
    left_out: list[str]


def write_shards(plan: Plan, out: Path, missing: Sequence[str], workers: int, report: Report | None = None) -> Manifest:
    """Write one set of shards per split, an index beside each, and the manifest last of all.

    Goes on after the last finished shard where `out` holds an interrupted writing of the same plan; finished ones are
    not written again; where it holds the finished shards of the same plan, nothing is. `report(split, samples done)`
    is called on the way.

    Args:
        missing: images that the sources name and that are not there.

    Raises:
        UserError: `out` holds something else, or nothing could be written.
    """
    try:
        finished = _finished(plan, out)
        if finished is not None:
            return finished
        with closing(_Progress(plan, out)) as progress:
            for split in plan.splits:
                _write_split(plan, split, progress, workers, report)
            return _finish(plan, progress, missing)
    except OSError as error:
        raise UserError(
            f"{out}: can't be written ({error.strerror or error}); the same command goes on after the finished shards"
        ) from None


def _finished(plan: Plan, out: Path) -> Manifest | None:
    """The manifest of shards that this plan has written already."""
    if not (out / MANIFEST).exists():
        return None
    if is_shards(out):
        manifest = read_manifest(out)
        here = {"sources": _plain(plan.sources), "options": _plain(plan.options())}
        there = {"sources": manifest.sources, "options": manifest.options}
        if there == here:
            return manifest
        raise UserError(
            f"{out}: holds a {MANIFEST} of something else{_difference(there, here)}; choose another --out, or remove "
            "the folder"
        )
    raise UserError(f"{out}: holds a {MANIFEST} of something else; choose another --out, or remove the folder")


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first value of two trees of options that differs: ` (options.resize: 32 there, 64 now)`; empty: none does."""
    if isinstance(there, dict) and isinstance(here, dict):
        inside = (
            _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in {**there, **here}
        )
        return next(filter(None, inside), "")
    if there == here or isinstance(there, list) or isinstance(here, list):
        return ""
    return f" ({name}: {_short(there)} there, {_short(here)} now)"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _plain(tree: Any) -> Any:
    """As it looks once written as JSON."""
    return json.loads(json.dumps(tree))


class _Progress:
    """The finished shards of a folder, on disk after each."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.out, self.file = out, out / _PROGRESS
        self.done: list[_Done] = []
        head = _plain({"sources": plan.sources, "options": plan.options(), "splits": plan.splits})
        if out.exists() and not self.file.exists() and any(out.iterdir()):
            raise UserError(f"{out}: is not empty and holds no unfinished shards; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._lock = self.file.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing there; wait for it, or choose another --out") from None
        if not self._read(head):
            self._append(head)

    def close(self) -> None:
        """Let others write there."""
        self._lock.close()

    def of(self, split: str) -> list[_Done]:
        return [done for done in self.done if done.entry.split == split]

    def add(self, done: _Done) -> None:
        self.done.append(done)
        self._append({"entry": done.entry.model_dump(), "consumed": done.consumed, "left_out": done.left_out})

    def _append(self, row: dict[str, Any]) -> None:
        self._lock.write(json.dumps(row).encode() + b"\n")
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def _read(self, head: dict[str, Any]) -> bool:
        """What an interrupted writing finished; False where there is none."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # what follows was not written to its end
        os.truncate(self.file, len(whole))
        rows = [json.loads(line) for line in whole.splitlines()]
        if not rows:
            return False
        if rows[0] != head:
            raise UserError(
                f"{self.out}: holds unfinished shards of other sources or options, or other images are there by now"
                f"{_difference(rows[0], head)}; use the same again, or another --out"
            )
        for row in rows[1:]:
            self.done.append(_Done(ShardEntry(**row["entry"]), row["consumed"], row["left_out"]))
        for done in self.done:
            tar = self.out / done.entry.name
            if not tar.is_file() or tar.stat().st_size != done.entry.bytes or not index_path(tar).is_file():
                raise UserError(f"{tar}: finished before and now missing or changed; remove {self.out} and start anew")
        return True


def _write_split(plan: Plan, split: str, progress: _Progress, workers: int, report: Report | None) -> None:
    """The shards of one split that are not finished yet."""
    before = progress.of(split)
    consumed = before[-1].consumed if before else 0
    number, key = len(before), sum(done.entry.samples for done in before)
    # What is found in an image may depend, in the last digit, on the batch it came in: batches are cut where they are
    # in a writing without interruption.
    again = consumed % plan.batch
    samples = islice((sample for sample in plan.read() if sample.split == split), consumed - again, None)
    files = encoded_samples(samples, plan.resize, workers, plan.annotator, plan.batch)
    shard: _Shard | None = None
    for sample, encoded in islice(files, again, None):
        if shard is not None and shard.size + encoded.size() + _TAR_END > plan.max_size and shard.entries:
            progress.add(shard.close(consumed))
            number, shard = number + 1, None
        shard = shard or _Shard(progress.out, split, number)
        consumed += 1
        if encoded.error:
            shard.left_out.append(f"{sample.image}: {encoded.error}")
        else:
            shard.add(f"{key:09d}", encoded)
            key += 1
        if report is not None:
            report(split, consumed)
    if shard is not None:
        progress.add(shard.close(consumed))


class _Shard:
    """A tar being written: under another name until it is whole."""

    def __init__(self, out: Path, split: str, number: int) -> None:
        self.path = out / f"{split}-{number:05d}.tar"
        self.split = split
        self.temporary = self.path.with_suffix(".tar.tmp")
        self.file = self.temporary.open("wb")
        self.tar = TarWriter(self.file, user="", group="", mtime=0, encoder=False)
        self.size = self.entries = self.captioned = self.captions = 0
        self.left_out: list[str] = []

    def add(self, key: str, encoded: Encoded) -> None:
        self.tar.write({"__key__": key, **encoded.files})
        self.size += encoded.size()
        self.entries += 1
        self.captions += encoded.captions
        self.captioned += encoded.captions > 0

    def close(self, consumed: int) -> _Done:
        """Finish, index and rename; the tar counts once its line is in the progress file."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        rows, problems = index_tar(self.temporary)
        if problems or len(rows) != self.entries:
            raise RuntimeError(f"{self.temporary}: not as it was written: {problems[:1] or len(rows)}")
        with self.temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_index(rows, index_path(self.path))
        os.replace(self.temporary, self.path)
        size = self.path.stat().st_size
        entry = ShardEntry(
            name=self.path.name,
            split=self.split,
            samples=self.entries,
            captioned=self.captioned,
            captions=self.captions,
            bytes=size,
            sha256=digest,
        )
        return _Done(entry, consumed, self.left_out)


def _finish(plan: Plan, progress: _Progress, missing: Sequence[str]) -> Manifest:
    """Write the list of what was left out and the manifest."""
    unreadable = [line for done in progress.done for line in done.left_out]
    entries = [done.entry for done in progress.done if done.entry.samples]
    if not entries:
        first = (unreadable or [f"{name}: missing" for name in missing] or ["the sources hold no sample"])[0]
        raise UserError(f"{progress.out}: no sample could be written; first: {first}")
    splits: Counter[str] = Counter()
    for entry in entries:
        splits[entry.split] += entry.samples
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        samples=sum(entry.samples for entry in entries),
        captions=sum(entry.captions for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        splits=dict(splits),
        sources=plan.sources,
        options=plan.options(),
        left_out={"missing": len(missing), "unreadable": len(unreadable)},
        shards=entries,
    )
    lines = [*(f"{name}: missing" for name in missing), *unreadable]
    _write(progress.out / LEFT_OUT, "".join(f"{line}\n" for line in lines))
    _write(progress.out / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    progress.file.unlink()
    for done in progress.done:
        if not done.entry.samples:  # all of its samples were unreadable
            (progress.out / done.entry.name).unlink()
            index_path(progress.out / done.entry.name).unlink()
    return manifest


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)
