"""From a run folder, or one of its checkpoints, to the system ready to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlscale import distributed
from vlscale.config import Recipe, load_recipe
from vlscale.data.captions import vocabulary_of
from vlscale.data.open import evaluation_split, read_data
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.export import load_weights, read_tensors
from vlscale.systems.registry import build_system


@dataclass(frozen=True, slots=True)
class Run:
    """A trained system and where it came from."""

    folder: Path
    checkpoint: Path
    step: int
    recipe: Recipe
    tokenizer: TextTokenizer
    system: nn.Module
    """In evaluation mode, on `device`."""
    device: torch.device


def load_run(path: str | Path, device: str | None = None) -> Run:
    """Rebuild a run's system: a run folder means its best checkpoint (fine-tuning), else its newest complete one.

    Raises:
        UserError: no run there, no complete checkpoint, or weights that don't fit the recipe.
    """
    folder, checkpoint = find_checkpoint(Path(path))
    recipe = _with_own_phrases(without_downloads(load_recipe(str(folder / layout.RECIPE))), folder)
    tokenizer = TextTokenizer.load(folder / layout.TOKENIZER)
    place = torch.device(device) if device else distributed.device()
    answers = layout.answers_of(folder)
    system = build_system(recipe, vocabulary_of(tokenizer, recipe.data, answers))
    load_weights(system, checkpoint / layout.MODEL)
    system.load_carried_state(read_tensors(checkpoint / layout.CARRIED))  # type: ignore[operator]
    system.to(place).eval()
    system.place(place)  # type: ignore[operator]
    return Run(folder, checkpoint, layout.step_of(checkpoint) or 0, recipe, tokenizer, system, place)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Run folder and checkpoint folder that a user's path means.

    Raises:
        UserError: there is no run, or it has no complete checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run folder (runs/NAME) or one of its checkpoints")
    if layout.step_of(path) is not None:
        if not layout.is_complete(path):
            raise UserError(f"{path}: this checkpoint was not saved to the end; name the run folder for the newest one")
        return path.resolve().parent.parent, path
    if not (path / layout.RECIPE).is_file():
        raise UserError(
            f"{path}: no {layout.RECIPE} in it; expected a run folder (runs/NAME) or one of its checkpoints"
        )
    checkpoints = layout.complete_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: the run has no complete checkpoint yet")
    return path, layout.best_checkpoint(path) or checkpoints[-1]


def run_samples(
    run: Run, data: str | None, split: str | None, image_root: str | None = None
) -> tuple[str, list[Sample]]:
    """Name and samples of the split to evaluate on; without `data` the run's own data.

    Raises:
        UserError: the data or the split is not there.
    """
    section = run.recipe.data
    if data is not None:
        section = section.model_copy(update={"path": data, "image_root": image_root})
    elif image_root is not None:
        section = section.model_copy(update={"image_root": image_root})
    return evaluation_split(read_data(section), split)


def _with_own_phrases(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the run's own vocabulary of phrases: the one it was made from may have changed since."""
    concepts = recipe.data.concepts
    if concepts is None or concepts.phrases is None:
        return recipe
    own = layout.phrases_of(folder)
    if own is None:
        raise UserError(f"{folder}: the run has lost its phrases; expected {' or '.join(layout.PHRASES)} in it")
    data = recipe.data.model_copy(update={"concepts": concepts.model_copy(update={"phrases": str(own)})})
    return recipe.model_copy(update={"data": data})


def without_downloads(recipe: Recipe) -> Recipe:
    """The recipe with random initialisation: its weights come from a checkpoint, or are not looked at."""
    system = recipe.system
    parts = {name: getattr(system, name) for name in ("vision", "backbone", "text") if hasattr(system, name)}
    random = {name: part.model_copy(update={"init": "random"}) for name, part in parts.items()}
    return recipe.model_copy(update={"system": system.model_copy(update=random)})
