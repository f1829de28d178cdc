"""How well a system that is being tuned does on the validation split, by its task's own evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from torch import nn

from vlscale import distributed
from vlscale.config import Recipe
from vlscale.data.examples import examples_of
from vlscale.data.open import VALIDATION_SPLITS, evaluation_split, read_data, read_pairs
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.run import with_own_phrases
from vlscale.systems.protocol import System
from vlscale.tasks.classified import TITLES, class_names, evaluate_classified
from vlscale.tasks.features import OnMessage
from vlscale.tasks.grounding import evaluate_grounding
from vlscale.tasks.retrieval import evaluate_retrieval


@dataclass(frozen=True, slots=True)
class Validation:
    """The examples (retrieval, grounding: images) that every epoch is judged by."""

    recipe: Recipe
    samples: list[Sample]

    def __call__(self, system: nn.Module, run: Path) -> dict[str, float]:
        """Metrics in per cent, the same on every rank; collective.

        Args:
            system: in evaluation mode, on this rank's device.
            run: its folder, with tokenizer and vocabularies.
        """
        recipe = with_own_phrases(self.recipe, run)
        tokenizer = TextTokenizer.load(run / layout.TOKENIZER)
        assert recipe.task is not None
        if recipe.task.name in TITLES:
            return evaluate_classified(
                system,
                self.samples,
                recipe,
                tokenizer,
                classes=class_names(recipe.task.name, run),
                batch_size=recipe.eval.batch_size,
                device=distributed.device(),
            ).verdict.metrics
        if recipe.task.name == "retrieval":
            return _retrieve(system, self.samples, recipe, tokenizer)
        return distributed.on_main(lambda: _ground(system, self.samples, recipe, tokenizer))


def make_validation(recipe: Recipe, say: OnMessage) -> Validation | None:
    """Read the recipe's validation split; where there is none, say so and give None. Every rank calls this.

    Raises:
        UserError: the data can't be read.
    """
    assert recipe.task is not None
    count = recipe.eval.validation
    if count == 0:
        say("eval.validation is 0: no epoch is judged, the last one counts")
        return None
    with distributed.main_process_first():  # the data may have to be rendered
        corpus = read_pairs(recipe.data) if recipe.task.name == "nlvr2" else read_data(recipe.data)
    there = corpus.splits()
    if not any(name in there for name in VALIDATION_SPLITS):
        say(f"no split {' or '.join(VALIDATION_SPLITS)} in the data: no epoch is judged, the last one counts")
        return None
    try:
        if recipe.task.name in TITLES:
            found = examples_of(corpus, recipe.task, VALIDATION_SPLITS).readable()
        else:
            found = iter(evaluation_split(corpus, "val")[1])
    except UserError as error:  # the split is there, but for another task
        say(f"{error}: no epoch is judged, the last one counts")
        return None
    samples = list(islice(found, count))
    what = "examples" if recipe.task.name in TITLES else "images"
    say(f"every epoch is judged by {len(samples)} {what} of the validation split")
    return Validation(recipe, samples)


def _retrieve(system: nn.Module, samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer) -> dict[str, float]:
    return evaluate_retrieval(
        cast(System, system),
        samples,
        recipe,
        tokenizer,
        rerank=recipe.eval.rerank,
        batch_size=recipe.eval.batch_size,
        device=distributed.device(),
    ).metrics


def _ground(system: nn.Module, samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer) -> dict[str, float]:
    return evaluate_grounding(
        system, samples, recipe, tokenizer, batch_size=recipe.eval.batch_size, device=distributed.device()
    ).judgement.metrics
