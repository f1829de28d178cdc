"""What a recipe means on this machine, without building anything big: `vlscale pretrain --dry-run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlscale.config import Concepts, Recipe, Train
from vlscale.config.data import AUTO
from vlscale.config.tasks import TaskConfig, VqaTask
from vlscale.data.answers import load_answers
from vlscale.data.concepts import load_phrases
from vlscale.data.open import is_here
from vlscale.data.sample import Vocabulary
from vlscale.engine import build
from vlscale.engine.room import memory_parts
from vlscale.engine.schedule import batch_plan, total_steps
from vlscale.engine.start import training_examples
from vlscale.interop.run import without_downloads
from vlscale.systems.registry import build_system

_SPECIAL_TOKENS = 5
_GIB = 2**30


def describe(recipe: Recipe, ds_config: str, world: int) -> dict[str, Any]:
    """Parameters per part, batch arithmetic, steps, memory and the DeepSpeed configuration.

    Raises:
        UserError: the batch does not divide, or the configuration does not fit recipe or machine.
    """
    choice = build.choose(ds_config)
    plan = batch_plan(recipe.train, world)
    config = build.complete(choice, plan, recipe.train)
    system = on_meta(recipe)
    parts = {name: _parameters(part) for name, part in system.named_children()}
    own = sum(parameter.numel() for parameter in system.parameters(recurse=False))
    parameters = {**{name: count for name, count in parts.items() if count}, "other": own, "total": _parameters(system)}
    return {
        "recipe": recipe.name,
        "system": recipe.system.name,
        "data": recipe.data.path or f"embedded scenes ({recipe.data.scenes.train} for training)",
        "deepspeed": choice.reason,
        "parameters": parameters,
        "batch": {
            "images per step (global_batch)": plan.global_batch,
            "pairs per rank and pass (micro_batch)": plan.micro_batch,
            "ranks": plan.world,
            "passes accumulated": plan.accumulation,
            "arithmetic": str(plan),
        },
        "steps": _steps(recipe),
        "memory_per_rank": _memory(system, choice, world),
        "deepspeed_config": config,
    }


def on_meta(recipe: Recipe) -> nn.Module:
    """The system without storage; a vocabulary still to be trained counts with its upper limit."""
    size = recipe.data.tokenizer.vocab_size
    vocabulary = Vocabulary(size, *range(_SPECIAL_TOKENS - 1))
    phrases, answers = _count_phrases(recipe.data.concepts), _count_answers(recipe.task)
    vocabulary = replace(vocabulary, phrase_pieces=((0,),) * phrases, answer_pieces=((0,),) * answers)
    with torch.device("meta"):
        return build_system(without_downloads(recipe), vocabulary)


def _count_phrases(concepts: Concepts | None) -> int:
    """Of a vocabulary that is there already; one still to be made of the captions counts nothing."""
    if concepts is None or concepts.phrases == AUTO:
        return 0
    return len(load_phrases(concepts) or ())


def _count_answers(task: TaskConfig | None) -> int:
    """Of a vocabulary that is there already, or whose size is asked for; one still to be made counts one answer."""
    if not isinstance(task, VqaTask):
        return 0
    return task.size or 1 if task.answers is None else len(load_answers(Path(task.answers).expanduser()))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _steps(recipe: Recipe) -> dict[str, Any]:
    samples = _count_samples(recipe)
    known = samples is not None
    per_epoch = samples / recipe.train.global_batch if samples is not None else None
    stages = [stage.train for stage in recipe.stages]
    totals = [_total(train, per_epoch) for train in stages]
    epochs = [
        train.epochs if train.max_steps is None else total / per_epoch if per_epoch and isinstance(total, int) else None
        for train, total in zip(stages, totals, strict=True)
    ]
    one = len(stages) == 1
    return {
        "training images" if recipe.task is None else "training examples": (
            samples if known else "unknown: the data is not there yet"
        ),
        "steps per epoch": per_epoch,
        "epochs": epochs[0] if one else epochs,
        "total": totals[0] if one else totals,
    }


def _total(train: Train, per_epoch: float | None) -> int | str:
    if train.max_steps is None and per_epoch is None:
        return "unknown: depends on the data"
    return total_steps(train, per_epoch or 0.0)


def _count_samples(recipe: Recipe) -> int | None:
    """Training images (of a task: examples) per epoch; nothing is rendered to count them."""
    if recipe.data.path is None:
        asks_images = recipe.task is None or recipe.task.name == "retrieval"
        return recipe.data.scenes.train if asks_images else None
    return training_examples(recipe).per_epoch() if is_here(recipe.data.path) else None


def _memory(system: nn.Module, choice: build.Choice, world: int) -> dict[str, str]:
    """What does not depend on the batch."""
    sizes = memory_parts(system, choice.parameter_bytes, world)
    total = sum(sizes.values())
    shown = {name: f"{size / _GIB:.3f} GiB" for name, size in {**sizes, "total": total}.items()}
    return {**shown, "activations": "not counted: they grow with micro_batch and image_size"}
