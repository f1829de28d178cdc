"""What a task is asked, one by one: every example is a sample of its own, whose only caption is the text to read.

So the stream, its order and resume are those of pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from vlscale.config.tasks import TaskConfig
from vlscale.data.corpus import Corpus, SampleList
from vlscale.data.sample import Sample
from vlscale.errors import UserError

ENTAILMENT = ("entailment", "neutral", "contradiction")
TRUTH = ("false", "true")
"""Class names in the order of their numbers."""


def examples_of(corpus: Corpus, task: TaskConfig, splits: Collection[str], labelled: bool = True) -> Corpus:
    """The task's examples in the samples of these splits, in their order.

    Args:
        labelled: only those whose answer is known; a test split's are not.

    Raises:
        UserError: there are none.
    """
    if task.name == "retrieval":
        return corpus.select(splits)
    chosen = corpus.select(splits, captioned=False)
    found = SampleList.packed(
        example for sample in chosen.readable() for example in _EXAMPLES[task.name](sample, labelled)
    )
    if not len(found):
        there = ", ".join(f"{name} ({count})" for name, count in corpus.splits().items())
        raise UserError(
            f"data: no {_WANTED[task.name]} in split {' or '.join(sorted(splits))}; give data for {task.name}; splits "
            f"there are: {there}"
        )
    return found


def _questions(sample: Sample, labelled: bool) -> Iterator[Sample]:
    for question in sample.questions:
        if question.answers or not labelled:
            yield _example(sample, question.id, question.text, questions=(question,))


def _hypotheses(sample: Sample, labelled: bool) -> Iterator[Sample]:
    if sample.second is not None:
        return
    for statement in sample.statements:
        if statement.label in ENTAILMENT or not labelled:
            yield _example(sample, statement.id, statement.text, statements=(statement,))


def _statements(sample: Sample, labelled: bool) -> Iterator[Sample]:
    if sample.second is None:
        return
    for statement in sample.statements:
        if statement.label in TRUTH or not labelled:
            yield _example(sample, statement.id, statement.text, statements=(statement,))


def _captions(sample: Sample, labelled: bool) -> Iterator[Sample]:
    """A caption with its phrases, of which one has a box at least."""
    for number, caption in enumerate(sample.captions):
        phrases = tuple(replace(phrase, caption=0) for phrase in sample.phrases if phrase.caption == number)
        if any(phrase.boxes for phrase in phrases):
            yield replace(_example(sample, f"{sample.id}#{number}", caption), phrases=phrases)


def _example(sample: Sample, identity: str, text: str, **kept: tuple) -> Sample:
    asked = {"questions": (), "statements": (), "phrases": (), **kept}
    return replace(sample, id=identity, captions=(text,), **asked)  # type: ignore[arg-type]


_EXAMPLES: dict[str, Callable[[Sample, bool], Iterator[Sample]]] = {
    "vqa": _questions,
    "snli-ve": _hypotheses,
    "nlvr2": _statements,
    "grounding": _captions,
}
_WANTED = {
    "vqa": "question with an answer",
    "snli-ve": "hypothesis with a label",
    "nlvr2": "statement about a pair of images",
    "grounding": "caption with a phrase that has a box",
}
