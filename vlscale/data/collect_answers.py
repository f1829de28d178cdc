"""The vocabulary of answers of whole data sets: `vlscale data answers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlscale.data.answers import answer_vocabulary, chosen_answers, most_common, normalise
from vlscale.data.open import load_sources
from vlscale.data.sample import Question
from vlscale.data.sources.base import Notes
from vlscale.data.sources.registry import read_source
from vlscale.errors import UserError


@dataclass(frozen=True, slots=True)
class Collected:
    """A vocabulary and what it was made of."""

    answers: list[str]
    questions: int
    """With an answer."""
    covered: float
    """Share of them whose answer is in the vocabulary."""


def collect_answers(specs: Sequence[str], min_count: int, size: int | None, root: str | None = None) -> Collected:
    """The vocabulary of everything that these sources ask; their images need not be here.

    Raises:
        UserError: a source is wrong, or no question has an answer.
    """
    questions: list[Question] = []
    chosen: dict[str, str] = {}
    for spec in specs:
        for source in load_sources(spec, root)[0]:
            for sample in read_source(source, Notes(need_images=False)):
                questions += [question for question in sample.questions if question.answers]
                chosen |= chosen_answers([sample])
    answers = answer_vocabulary(questions, min_count, size, chosen)
    if not answers:
        count = f"{len(questions)} questions"
        raise UserError(f"{', '.join(specs)}: no answer is given to {min_count} of {count}; lower --min-count")
    known = set(answers)
    covered = sum(
        (normalise(chosen[question.id]) if question.id in chosen else most_common(question.answers)) in known
        for question in questions
    )
    return Collected(answers, len(questions), covered / len(questions))
