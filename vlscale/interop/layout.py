"""Where things lie in a run folder, and which of its checkpoints are complete.

RUN/recipe.yaml  ds_config.json  tokenizer/  phrases.jsonl  answers.json  metrics.jsonl  metrics.csv  skipped_images.txt
RUN/checkpoints/step-00001200/   DeepSpeed's shards, model.safetensors, carried.safetensors, state.json, COMPLETE
RUN/checkpoints/latest           name of the newest complete one
RUN/best.json                    of a fine-tuning: validation metrics by epoch, and the best one
RUN/origin.json                  of a run that began with another one's weights: which, and what that one had learned
RUN/stage-1/                     of a run in stages: a run folder of the stage before
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vlscale.errors import UserError

RECIPE = "recipe.yaml"
DS_CONFIG = "ds_config.json"
TOKENIZER = "tokenizer"
ANSWERS = "answers.json"
BEST = "best.json"
ORIGIN = "origin.json"
PHRASES = ("phrases.jsonl", "phrases.json")
"""The vocabulary of phrases, where there is one: ours or MVPTR's."""
METRICS_JSONL = "metrics.jsonl"
METRICS_CSV = "metrics.csv"
SKIPPED_IMAGES = "skipped_images.txt"
NON_FINITE = "non_finite.json"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
MODEL = "model.safetensors"
CARRIED = "carried.safetensors"
STATE = "state.json"
COMPLETE = "COMPLETE"

_TAG = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """Step in a checkpoint's folder name; None when it is no checkpoint's name."""
    match = _TAG.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def phrases_of(run: Path) -> Path | None:
    """A run's own vocabulary of phrases; None where it has none."""
    return next((run / name for name in PHRASES if (run / name).is_file()), None)


def answers_of(run: Path) -> Path | None:
    """A run's own vocabulary of answers; None where it has none."""
    return run / ANSWERS if (run / ANSWERS).is_file() else None


def stage_folder(run: Path, stage: int, stages: int) -> Path:
    """Run folder of a stage, from 1; the last one's is the run folder itself."""
    return run if stage == stages else run / f"stage-{stage}"


def all_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, complete or not, newest last."""
    folder = run / CHECKPOINTS
    found = [entry for entry in folder.iterdir() if step_of(entry) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda entry: step_of(entry) or 0)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders whose save was finished, newest last."""
    return [entry for entry in all_checkpoints(run) if is_complete(entry)]


def best_checkpoint(run: Path) -> Path | None:
    """Of a fine-tuning the checkpoint of its best epoch; None where none was judged, or it is gone."""
    path = run / BEST
    if not path.is_file():
        return None
    step = json.loads(path.read_text(encoding="utf-8"))["best"]["step"]
    checkpoint = run / CHECKPOINTS / checkpoint_name(max(0, step))
    return checkpoint if is_complete(checkpoint) else None


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Run folder and checkpoint folder that a user's path means.

    Raises:
        UserError: there is no run, or it has no complete checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run folder (runs/NAME) or one of its checkpoints")
    if step_of(path) is not None:
        if not is_complete(path):
            raise UserError(f"{path}: this checkpoint was not saved to the end; name the run folder for the newest one")
        return path.resolve().parent.parent, path
    if not (path / RECIPE).is_file():
        raise UserError(f"{path}: no {RECIPE} in it; expected a run folder (runs/NAME) or one of its checkpoints")
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: the run has no complete checkpoint yet")
    return path, best_checkpoint(path) or checkpoints[-1]


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker, written last, is there."""
    return (checkpoint / COMPLETE).is_file()


def holds_run(folder: Path) -> bool:
    """Whether the folder has a run in it, finished or not."""
    return (folder / RECIPE).exists() or (folder / CHECKPOINTS).exists() or (folder / METRICS_JSONL).exists()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
