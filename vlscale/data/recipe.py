"""Data recipes: several sources joined into one corpus, without the photographs that others are evaluated on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from vlscale.config import Section
from vlscale.config.loading import first_error
from vlscale.data.sample import Sample
from vlscale.data.sources.base import Notes, Source
from vlscale.data.sources.registry import make_source, parse_source, read_source
from vlscale.errors import UserError

ROOT_VARIABLE = "VLSCALE_DATA"
EXCLUDED = "images of an excluded set, dropped"
_PACKAGE = "vlscale.recipes.corpora"


class DataRecipe(Section):
    """A corpus: sources with weights and splits, and what must not be in it."""

    root: str | None = None
    """Folder that the paths are relative to; default: --image-root, else for a shipped corpus VLSCALE_DATA, else the
    recipe's own folder."""
    sources: list[str | dict[str, Any]] = Field(min_length=1)
    """Each as `FORMAT:PATH,key=value,…` or as a mapping of the same keys; a folder of shards is a source too."""
    exclude: list[str | dict[str, Any]] = Field(default_factory=list)
    """Sources whose photographs (of the splits in `only`) are dropped from the corpus: test sets, for example."""


def corpus_names() -> list[str]:
    """Names of the corpora that ship with vlscale."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files(_PACKAGE).iterdir()
        if entry.name.endswith(".yaml")
    )


def is_recipe(spec: str) -> bool:
    """Whether `spec` means a data recipe: a YAML file, or a shipped corpus unless a file has its name."""
    return spec.endswith((".yaml", ".yml")) or (spec in corpus_names() and not os.path.exists(spec))


def load_data_recipe(spec: str, root: str | None = None) -> tuple[list[Source], list[Source]]:
    """Sources and exclusions of a data recipe, their paths resolved.

    Raises:
        UserError: no such recipe, an unknown key, a wrong source, or no root for a shipped corpus.
    """
    text, where, folder = _text(spec)
    try:
        recipe = DataRecipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error)}") from None
    base = Path(root or recipe.root or folder or "").expanduser()
    if recipe.root and not root and folder:
        base = Path(folder) / base
    if folder is None and not (root or recipe.root):
        raise UserError(f"{where}: where are its data sets? give --image-root, or set {ROOT_VARIABLE}")
    if not base.is_dir():
        raise UserError(f"{where}: root {base}: no such folder; give the one that the sources' paths are relative to")
    made = partial(_source, root=base)
    return (
        [made(item, f"{where}, source {number}") for number, item in enumerate(recipe.sources, start=1)],
        [made(item, f"{where}, exclude {number}") for number, item in enumerate(recipe.exclude, start=1)],
    )


def excluded_aliases(sources: list[Source]) -> frozenset[str]:
    """What the photographs of these sources are called, here and elsewhere.

    Raises:
        UserError: a source can't be read, or its samples have no name that another source could know them by.
    """
    names: set[str] = set()
    for source in sources:
        before = len(names)
        for sample in read_source(source, Notes(need_images=False)):
            names.update(sample.aliases)
        if len(names) == before:
            raise UserError(f"exclude {source}: names no photograph that another source could share")
    return frozenset(names)


def kept(samples: Iterator[Sample], excluded: frozenset[str], notes: Notes) -> Iterator[Sample]:
    """The samples whose photograph is not excluded; counts the others, also where there are none."""
    if excluded:
        notes.counts[EXCLUDED] += 0
    for sample in samples:
        if excluded.isdisjoint(sample.aliases):
            yield sample
        else:
            notes.counts[EXCLUDED] += 1


def _source(item: str | dict[str, Any], where: str, root: Path) -> Source:
    if isinstance(item, dict):
        return make_source(item, where, root)
    return parse_source(item, root, where)


def _text(spec: str) -> tuple[str, str, str | None]:
    """Text of a recipe, its name for errors, and the folder that its paths are relative to."""
    if spec in corpus_names() and not os.path.exists(spec):
        text = (resources.files(_PACKAGE) / f"{spec}.yaml").read_text(encoding="utf-8")
        return text, f"corpus {spec}", os.environ.get(ROOT_VARIABLE)
    path = Path(spec)
    try:
        return path.read_text(encoding="utf-8"), str(path), str(path.parent)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"{path}: can't be read ({reason}); expected a data recipe, or one of {', '.join(corpus_names())}"
        ) from None
