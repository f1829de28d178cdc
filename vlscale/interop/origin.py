"""What a run learned from: its own data, and the run whose weights it began with (`origin.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlscale.config import Recipe, load_recipe
from vlscale.interop import layout

_NOTHING = {"trained_on": "nothing (task.from_scratch)", "samples_seen": 0, "tuned_on": None}


def note_origin(run: Path, weights: Path, from_scratch: bool = False) -> None:
    """Write into a run's folder which checkpoint it began with, and what that one had learned.

    Args:
        weights: the checkpoint.
        from_scratch: nothing but its tokenizer and vocabularies was taken.
    """
    before, weights = weights.resolve().parent.parent, weights.resolve()
    recipe, step = load_recipe(str(before / layout.RECIPE)), layout.step_of(weights) or 0
    told = _NOTHING if from_scratch else learned(before, recipe, step)
    begun = {"tokenizer_of" if from_scratch else "checkpoint": str(weights), "recipe": recipe.name, "step": step}
    layout.write_json(run / layout.ORIGIN, begun | told)


def learned(run: Path, recipe: Recipe, step: int) -> dict[str, Any]:
    """What a checkpoint was trained on, and then tuned on.

    Returns:
        `trained_on` and `samples_seen` of the pre-training (None where its folder did not keep them), and `tuned_on`:
        None, or the task, its data, the samples of it that were seen, the checkpoint `from` which the tuning began and,
        where that one was tuned itself, what it was tuned on (`before`).
    """
    own, seen = describe_data(recipe), step * recipe.train.global_batch
    if recipe.task is None:
        return {"trained_on": own, "samples_seen": seen, "tuned_on": None}
    path = run / layout.ORIGIN
    begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tuned = {"task": recipe.task.name, "data": own, "samples_seen": seen, "from": begun.get("checkpoint")}
    if begun.get("tuned_on"):
        tuned["before"] = begun["tuned_on"]
    return {"trained_on": begun.get("trained_on"), "samples_seen": begun.get("samples_seen"), "tuned_on": tuned}


def describe_data(recipe: Recipe) -> str:
    """The run's own data in words."""
    scenes = recipe.data.scenes
    return recipe.data.path or f"embedded scenes (train {scenes.train}, test {scenes.test}, seed {scenes.seed})"
