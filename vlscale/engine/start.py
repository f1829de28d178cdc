"""Before the first step: threads, where to go on, the run folder with recipe and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlscale import distributed
from vlscale.config import Data, Recipe, load_recipe, write_recipe
from vlscale.config.data import AUTO
from vlscale.config.tasks import VqaTask
from vlscale.data.answers import answer_vocabulary, chosen_answers, load_answers, save_answers
from vlscale.data.concepts import load_phrases
from vlscale.data.corpus import Corpus, as_corpus
from vlscale.data.examples import examples_of
from vlscale.data.open import TRAINING_SPLITS, absolute, read_data, read_pairs, training_split
from vlscale.data.phrases import frequent_phrases
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer, build_tokenizer
from vlscale.engine import best, checkpoint
from vlscale.engine.build import Choice
from vlscale.engine.checkpoint import State
from vlscale.errors import UserError
from vlscale.interop import layout


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a run goes on: from a checkpoint, or from nothing."""

    checkpoint: Path | None = None
    step: int = 0
    state: State | None = None
    weights: Path | None = None
    """Checkpoint of another run, whose weights this one starts with."""

    @property
    def run(self) -> Path | None:
        """Folder of the run that tokenizer and phrases are taken from."""
        source = self.checkpoint or self.weights
        return None if source is None else source.parent.parent


def set_threads(threads: int | None) -> int:
    """CPU threads of this rank: as asked, else OMP_NUM_THREADS, else the host's cores shared among its ranks."""
    asked = threads or int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    number = asked or max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())
    torch.set_num_threads(number)
    return number


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with data paths that hold from any directory."""
    data = recipe.data
    paths: dict[str, Any] = {
        "path": None if data.path is None else absolute(data.path),
        "image_root": _absolute(data.image_root),
    }
    if data.concepts is not None and data.concepts.phrases != AUTO:
        paths["concepts"] = data.concepts.model_copy(update={"phrases": _absolute(data.concepts.phrases)})
    task = recipe.task
    if isinstance(task, VqaTask):
        task = task.model_copy(update={"answers": _absolute(task.answers)})
    return recipe.model_copy(update={"data": data.model_copy(update=paths), "task": task})


def check_free(out: Path, resume: str | None) -> None:
    """Refuse a folder that holds a run, unless it is to go on.

    Raises:
        UserError: it does.
    """

    def check() -> None:
        if resume is None and layout.holds_run(out):
            raise UserError(f"{out}: holds a run already: go on with --resume auto, or choose another --out")

    distributed.on_main(check)


def find_origin(
    recipe: Recipe, choice: Choice, out: Path, resume: str | None, data: str, say: Callable[[str], Any]
) -> Origin:
    """Decide where to go on and make the run folder ready for it; rank 0 decides, all get the answer.

    Args:
        data: `layout_of` the training data.

    Raises:
        UserError: there is nothing to resume from at the given path, or the checkpoint was made by another recipe,
            precision or data.
    """
    return distributed.on_main(lambda: _find_origin(recipe, choice, out, resume, data, say))


def make_tokenizer(recipe: Recipe, samples: Sequence[Sample], out: Path, origin: Origin) -> TextTokenizer:
    """The run's tokenizer: rank 0 trains, fetches or copies it, every rank loads the same files."""
    folder = out / layout.TOKENIZER

    def provide() -> None:
        if origin.run is not None:
            source = origin.run / layout.TOKENIZER
            if source.resolve() != folder.resolve():
                TextTokenizer.load(source).cut_as(recipe.data.tokenizer).save(folder)
            return
        captions = (caption for sample in as_corpus(samples).readable() for caption in sample.captions)
        build_tokenizer(recipe.data.tokenizer, captions).save(folder)

    distributed.on_main(provide)
    return TextTokenizer.load(folder)


def training_examples(recipe: Recipe) -> Corpus:
    """What the recipe learns from: captioned images, or a task's examples.

    Raises:
        UserError: there are none.
    """
    task = recipe.task
    if task is None or task.name == "retrieval":
        return training_split(read_data(recipe.data))
    read = read_pairs if task.name == "nlvr2" else read_data
    return examples_of(read(recipe.data), task, TRAINING_SPLITS)


def own_answers(recipe: Recipe, examples: Corpus, out: Path, origin: Origin) -> Path | None:
    """The run's own vocabulary of answers, made of the training questions or copied; None where none is asked for.

    Raises:
        UserError: the vocabulary can't be read, or no answer is frequent enough.
    """
    task = recipe.task
    if not isinstance(task, VqaTask):
        return None
    own, again = out / layout.ANSWERS, origin.checkpoint

    def provide() -> None:
        if again is not None:
            answers = load_answers(again.parent.parent / layout.ANSWERS)
        elif task.answers is not None:
            answers = load_answers(Path(task.answers).expanduser())
        else:
            known = list(examples.readable())
            questions = (example.questions[0] for example in known)
            answers = answer_vocabulary(questions, task.min_count, task.size, chosen_answers(known))
            if not answers:
                raise UserError(f"task.min_count: no answer is given to {task.min_count} questions: lower it")
        save_answers(own, answers)

    distributed.on_main(provide)
    return own


def own_phrases(data: Data, samples: Corpus, out: Path, origin: Origin) -> Data:
    """The data with the run's own vocabulary of phrases: rank 0 makes or copies it, every rank reads the same file.

    Raises:
        UserError: the vocabulary can't be read, or no phrase of the captions is frequent enough.
    """
    concepts = data.concepts
    if concepts is None or concepts.phrases is None:
        return data
    given = layout.phrases_of(origin.run) if origin.run is not None else Path(concepts.phrases)
    if given is None:
        raise UserError(f"{origin.run}: the run has lost its phrases; expected {' or '.join(layout.PHRASES)} in it")
    public = given.suffix == ".json"
    own = out / layout.PHRASES[public]

    def provide() -> None:
        if origin.run is None and concepts.phrases == AUTO:
            frequent_phrases(samples, concepts.min_count).save(own)
        elif given.resolve() != own.resolve():
            load_phrases(concepts.model_copy(update={"phrases": str(given)}))  # a mistake in it is named here
            layout.write_text(own, given.read_text(encoding="utf-8"))

    distributed.on_main(provide)
    return data.model_copy(update={"concepts": concepts.model_copy(update={"phrases": str(own)})})


def _find_origin(
    recipe: Recipe, choice: Choice, out: Path, resume: str | None, data: str, say: Callable[[str], Any]
) -> Origin:
    chosen = _resume_point(out, resume, say)
    origin = Origin()
    if chosen is not None:
        state = checkpoint.read_state(chosen)
        _check_fits(recipe, choice, chosen, state, data)
        say(f"going on from {chosen}, after step {state.step}")
        world = distributed.world_size()
        if state.world_size != world:
            say(f"the run had {_ranks(state.world_size)}, now {world}: going on; random draws differ from here")
        now = replace(state, world_size=world, recipe_hash=checkpoint.recipe_hash(recipe))
        origin = Origin(chosen, state.step, now)
    elif resume == "auto":
        say(f"{out}: nothing to resume, starting anew")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_after(out, origin.step, say)
    best.forget_after(out, origin.step)
    write_recipe(recipe, out / layout.RECIPE)
    return origin


def _resume_point(out: Path, resume: str | None, say: Callable[[str], Any]) -> Path | None:
    """The checkpoint that `--resume` means; None for a new run."""
    if resume is None:
        return None
    if resume == "auto":
        return checkpoint.newest_sound(out, say)
    path = Path(resume)
    if layout.step_of(path) is None:
        found = checkpoint.newest_sound(path, say)
        if found is None:
            raise UserError(f"--resume {resume}: no complete checkpoint there; give a run folder, a checkpoint or auto")
    else:
        found = path
        problem = checkpoint.damage(path)
        if problem is not None:
            raise UserError(f"--resume {resume}: {problem}; give another checkpoint, or the run folder")
    if found.resolve().parent.parent != out.resolve() and layout.holds_run(out):
        raise UserError(f"{out}: holds another run than --resume {resume}: choose another --out")
    return found


def _check_fits(recipe: Recipe, choice: Choice, chosen: Path, state: State, data: str) -> None:
    if state.recipe_hash != checkpoint.recipe_hash(recipe):
        _check_recipe(recipe, chosen.parent.parent / layout.RECIPE, state)
    if state.data and state.data != data:
        before, now = state.data.partition("-")[0], data.partition("-")[0]
        raise UserError(
            f"{chosen}: was trained on other data: {before} samples then, {now} now, or other shards or weights; "
            "give the data that the run was started with, or start a new run"
        )
    if state.precision != choice.precision:
        raise UserError(
            f"{chosen}: was trained in {state.precision}, --ds-config {choice.name} means {choice.precision}: "
            "pass the --ds-config that the run was started with"
        )


def _check_recipe(recipe: Recipe, source: Path, state: State) -> None:
    previous = load_recipe(str(source))
    if state.world_size != distributed.world_size():
        # Losses compare the images of a pass over all ranks: to keep their number, a rank's share must change.
        train = previous.train.model_copy(update={"micro_batch": recipe.train.micro_batch})
        previous = previous.model_copy(update={"train": train})
    checkpoint.require_same(recipe, previous, source)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())
