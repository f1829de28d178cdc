"""The recipe of a fine-tuning: that of the pre-trained run, changed as the task's recipe says."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlscale.config.loading import apply_override, parse_recipe, to_numbers
from vlscale.config.recipe import Recipe
from vlscale.config.tasks import TASKS
from vlscale.errors import UserError

_PACKAGE = "vlscale.recipes.tasks"
_SECTIONS = ("system", "weights", "data", "train", "checkpoint", "eval", "task")


def tuning_recipe(base: Recipe, task: str, changes: str | None = None, overrides: list[str] | None = None) -> Recipe:
    """Resolve a fine-tuning.

    What is learned and how fast starts from the schema's defaults; system, tokenizer and inputs are the run's own.

    Args:
        base: the pre-trained run's recipe.
        task: one of `TASKS`.
        changes: a YAML file with sections of a recipe; none: what ships for the run's recipe.
        overrides: `KEY=VALUE`, last.

    Raises:
        UserError: no such task or recipe, an unknown key or a wrong value; one line that names it.
    """
    if task not in TASKS:
        raise UserError(f"task {task}: use one of {', '.join(TASKS)}")
    tree, source = _changes(base, task, changes)
    whole = _starting_point(base, task)
    merge(whole, tree)
    for override in overrides or []:
        apply_override(whole, override)
    if whole["task"].get("name") != task:
        raise UserError(f"{source}: task.name is {whole['task'].get('name')}, but {task} is to be learned")
    return parse_recipe(whole, source)


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put the changes into the tree: sections key by key, everything else whole."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def _starting_point(base: Recipe, task: str) -> dict[str, Any]:
    tree = base.model_dump(mode="json", exclude={"train", "weights", "checkpoint"})
    tree["data"] |= {"texts": {}, "second_view": False}
    for book in {"codebook", "dictionary"} & tree["system"].keys():
        tree["system"][book]["init"] = "random"  # its codes start from the run's: no k-means throws them away
    return {**tree, "name": f"{base.name}-{task}", "task": {"name": task}, "train": {}, "weights": {}, "checkpoint": {}}


def _changes(base: Recipe, task: str, changes: str | None) -> tuple[dict[str, Any], str]:
    """The task's recipe as a tree, and its name for errors."""
    if changes is not None:
        path = Path(changes)
        if not path.is_file():
            raise UserError(f"--recipe {changes}: no such file; leave it out to take what ships for {base.name}")
        return _tree(path.read_text(encoding="utf-8"), str(path)), str(path)
    source = f"recipe of {task}"
    shipped = _tree((resources.files(_PACKAGE) / f"{task}.yaml").read_text(encoding="utf-8"), source, shipped=True)
    if base.name not in shipped:
        names = ", ".join(sorted(shipped))
        raise UserError(f"{source}: there is none for {base.name}, only for {names}; give --recipe FILE")
    return shipped[base.name], f"{source} for {base.name}"


def _tree(text: str, source: str, shipped: bool = False) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not (shipped or tree.keys() <= set(_SECTIONS)):
        raise UserError(f"{source}: expected a mapping of sections: {', '.join(_SECTIONS)}")
    to_numbers(tree)
    return tree
