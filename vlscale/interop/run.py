"""From a run folder, or one of its checkpoints, to the system ready to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlscale import distributed
from vlscale.config import Data, Recipe, load_recipe
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
    folder, checkpoint = layout.find_checkpoint(Path(path))
    recipe = with_own_phrases(without_downloads(load_recipe(str(folder / layout.RECIPE))), folder)
    tokenizer = TextTokenizer.load(folder / layout.TOKENIZER)
    place = torch.device(device) if device else distributed.device()
    answers = layout.answers_of(folder)
    system = build_system(recipe, vocabulary_of(tokenizer, recipe.data, answers))
    load_weights(system, checkpoint / layout.MODEL)
    system.load_carried_state(read_tensors(checkpoint / layout.CARRIED))  # type: ignore[operator]
    system.to(place).eval()
    system.place(place)  # type: ignore[operator]
    return Run(folder, checkpoint, layout.step_of(checkpoint) or 0, recipe, tokenizer, system, place)


def run_samples(
    run: Run, data: str | None, split: str | None, image_root: str | None = None
) -> tuple[str, list[Sample]]:
    """Name and samples of the split to evaluate on; without `data` the run's own data.

    Raises:
        UserError: the data or the split is not there.
    """
    return evaluation_split(read_data(data_to_read(run.recipe.data, data, image_root)), split)


def data_to_read(own: Data, data: str | None, image_root: str | None) -> Data:
    """The run's own data, or what the user names in its place."""
    if data is not None:
        return own.model_copy(update={"path": data, "image_root": image_root})
    return own if image_root is None else own.model_copy(update={"image_root": image_root})


def with_own_phrases(recipe: Recipe, folder: Path) -> Recipe:
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
