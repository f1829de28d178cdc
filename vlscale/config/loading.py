"""How a recipe is found, overridden, checked and written beside a run."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlscale.config.recipe import Recipe
from vlscale.config.systems import LOSSES
from vlscale.errors import UserError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with vlscale."""
    folder = resources.files("vlscale.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path and apply `KEY=VALUE` overrides.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key or wrong value; one line that names the key.
    """
    tree, source = _read(name_or_path)
    for override in overrides or []:
        apply_override(tree, override)
    return parse_recipe(tree, source)


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's tree; `source` names it in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {first_error(error)}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree in place: `train.lr=1e-4`. The value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, such as train.lr=1e-4")
    node = tree
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = _number_or(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML; put quotes around it") from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe beside a run, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def cache_dir() -> Path:
    """Folder for rendered data: `VLSCALE_CACHE`, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlscale"
    return Path(os.environ.get("VLSCALE_CACHE", default)).expanduser()


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        text, source = path.read_text(encoding="utf-8"), str(path)
    elif name_or_path in recipe_names():
        text = (resources.files("vlscale.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        source = f"recipe {name_or_path}"
    else:
        raise UserError(
            f"no recipe {name_or_path!r}: use one of {', '.join(recipe_names())}, or a path ending in .yaml"
        )
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected a mapping of sections (system, data, train, …)")
    tree.setdefault("name", path.stem)
    to_numbers(tree)
    return tree, source


def to_numbers(node: Any) -> None:
    """Turn YAML 1.1's string readings of 1e-4 into numbers, everywhere."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        if isinstance(value, dict | list):
            to_numbers(value)
        else:
            node[key] = _number_or(value)


def _number_or(value: Any) -> Any:
    """`1e-4` is a string to YAML 1.1 and a number to everyone who types it."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE") and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def first_error(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as `key: reason`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in LOSSES)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; see `vlscale pretrain --dry-run` for the keys there are"
    elif first["type"] not in {"value_error", "missing"}:
        message = f"{message}, got {first['input']!r}"
    return f"{where}: {message}" if where else message
