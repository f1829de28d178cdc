"""From what a user writes after --data to a corpus; and which of its samples train and which evaluate."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vlscale.config import Data
from vlscale.data.corpus import Corpus, Joined, SampleList, as_corpus, without
from vlscale.data.recipe import EXCLUDED, excluded_aliases, is_recipe, kept, load_data_recipe
from vlscale.data.sample import Sample
from vlscale.data.shards import is_shards
from vlscale.data.sources import stored
from vlscale.data.sources.base import Notes, Source
from vlscale.data.sources.registry import make_source, parse_source, read_source
from vlscale.data.sources.stored import open_stored
from vlscale.errors import UserError

CAPTIONS_FILE, PAIRS_FILE = "captions.jsonl", "pairs.jsonl"
"""Names of the annotations in a folder made by `vlscale data scenes`: of pictures, and of pairs of them."""
TRAINING_SPLITS = ("train", "restval")
VALIDATION_SPLITS = ("val", "dev")
"""Two names for one thing."""
STORED = frozenset(entry.name for entry in stored.FORMATS)
"""Formats that are read by index, not into memory."""

_log = logging.getLogger(__name__)


def read_data(data: Data) -> Corpus:
    """All of the recipe's data, every split: a source, a data recipe, shards, or the embedded scenes.

    Raises:
        UserError: nothing there, or a record is wrong.
    """
    if data.path is None:
        from vlscale.data.scenes import embedded_scenes

        return _in_memory(parse_source(f"jsonl:{embedded_scenes(data.scenes) / CAPTIONS_FILE}"), frozenset())
    sources, excluded = load_sources(data.path, data.image_root)
    names = excluded_aliases(excluded)
    corpora = [_open(source, names, data.skip_broken_shards) for source in sources]
    if len(corpora) == 1 and sources[0].weight == 1:
        return corpora[0]
    return Joined(corpora, [source.weight for source in sources])


def read_pairs(data: Data) -> Corpus:
    """What tasks over two images read: the pairs of the embedded scenes, or of a folder made by `vlscale data scenes`;
    of other data, which are pairs themselves (NLVR2), what `read_data` gives.

    Raises:
        UserError: see read_data.
    """
    if data.path is None:
        from vlscale.data.scenes import embedded_scenes

        return _in_memory(parse_source(f"jsonl:{embedded_scenes(data.scenes) / PAIRS_FILE}"), frozenset())
    pairs = os.path.join(os.path.expanduser(data.path), PAIRS_FILE)
    return read_data(data.model_copy(update={"path": pairs}) if os.path.isfile(pairs) else data)


def load_sources(spec: str, root: str | None = None) -> tuple[list[Source], list[Source]]:
    """The sources that `--data` means, and those whose photographs it excludes.

    Args:
        spec: `FORMAT:PATH,key=value,…`, a path whose format the file tells, or a data recipe.
        root: --image-root: a recipe's root, or a source's `images`.

    Raises:
        UserError: nothing there, or it is not what it should be.
    """
    if is_recipe(spec):
        return load_data_recipe(spec, root)
    place = os.path.expanduser(spec)
    if os.path.isfile(os.path.join(place, CAPTIONS_FILE)) and not is_shards(Path(place)):
        spec = os.path.join(place, CAPTIONS_FILE)
    source = parse_source(spec)
    if root is not None:
        if source.images is not None:
            raise UserError(f"source {spec}: images= and --image-root both name the image folder; leave one out")
        keys = source.model_dump(exclude_unset=True)
        source = make_source({**keys, "images": root}, f"source {spec} with --image-root")
    return [source], []


def is_here(spec: str) -> bool:
    """Whether there is something to read; what is wrong with it tells reading."""
    return is_recipe(spec) or ":" in spec or "{" in spec or os.path.exists(os.path.expanduser(spec))


def absolute(spec: str) -> str:
    """The same data, written so that it is found from any directory."""
    if is_recipe(spec) and not os.path.exists(spec):
        return spec  # a shipped corpus
    if is_recipe(spec) or os.path.exists(os.path.expanduser(spec)):
        return os.path.abspath(os.path.expanduser(spec))
    return parse_source(spec, Path.cwd()).spec()


def training_split(samples: Sequence[Sample]) -> Corpus:
    """Samples to train on: splits `train` and `restval`; those without caption are dropped and counted.

    Raises:
        UserError: none is left.
    """
    return _captioned(as_corpus(samples), TRAINING_SPLITS, "train")


def evaluation_split(samples: Sequence[Sample], split: str | None) -> tuple[str, list[Sample]]:
    """The split's name and its samples; without a name `test`, else validation (the name tells which was taken).

    `val` and `dev` mean the same. Samples without caption are dropped and counted.

    Raises:
        UserError: no such split, or it has no caption.
    """
    corpus = as_corpus(samples)
    split, names = split_to_read(corpus, split)
    return split, list(_captioned(corpus, names, split).readable())


def split_to_read(corpus: Corpus, split: str | None) -> tuple[str, tuple[str, ...]]:
    """The split that evaluation means, and the names that it may have; whether it is there tells reading it."""
    there = corpus.splits()
    if split is None:
        split = next((name for name in ("test", *VALIDATION_SPLITS) if name in there), "test")
    names = VALIDATION_SPLITS if split in VALIDATION_SPLITS else (split,)
    if split not in there:
        split = next((name for name in names if name in there), split)
    return split, names


def _open(source: Source, excluded: frozenset[str], skip_broken: bool) -> Corpus:
    if source.format not in STORED:
        return _in_memory(source, excluded)
    corpus = open_stored(source, skip_broken)
    if source.only is not None:
        corpus = corpus.select(source.only, captioned=False)
    if not excluded:
        return corpus
    chosen, dropped = without(corpus, lambda sample: not excluded.isdisjoint(sample.aliases))
    _log.warning("%s: %s: %d", source, EXCLUDED, dropped)
    return chosen


def _in_memory(source: Source, excluded: frozenset[str]) -> SampleList:
    notes = Notes()
    samples = SampleList.packed(kept(read_source(source, notes), excluded, notes))
    notes.say(source)
    if not len(samples):
        hint = f"none of its {len(notes.missing)} images is there" if notes.missing else "it holds no record"
        raise UserError(f"{source}: no sample: {hint}; check the path, images= and only=")
    return samples


def _captioned(corpus: Corpus, names: Sequence[str], split: str) -> Corpus:
    """The samples of the splits that have a caption; says how many have none."""
    there = corpus.splits()
    chosen = sum(there.get(name, 0) for name in names)
    kept_ones = corpus.select(names)
    if not len(kept_ones):
        counts = ", ".join(f"{name} ({n})" for name, n in there.items()) or "none"
        why = f"its {chosen} records have no captions" if chosen else "no record has it"
        raise UserError(f"data: split {split!r} is empty, {why}; splits there are: {counts}")
    if len(kept_ones) < chosen:
        missing = chosen - len(kept_ones)
        _log.warning("split %s: %d of %d records have no caption and are left out", split, missing, chosen)
    return kept_ones
