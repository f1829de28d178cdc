"""How right the answers to examples are: VQA's soft accuracy, accuracy by class, NLVR2's consistency. In per cent."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vlscale.data.answers import accuracy, most_common, normalise
from vlscale.data.sample import Question, Sample

GUESS, COMMON, POSSIBLE = "guessing", "always the most common", "upper bound"
"""Baselines: all classes alike (exact expectation), always the most common one, the best of the answer vocabulary."""
UNREADABLE = "unreadable"
"""Column of a confusion table: examples without an answer."""
_NLVR2_ID = re.compile(r"(.+-[0-9]+)-[0-9]+-([0-9]+)")
"""Split and set, pair, sentence: `dev-896-0-1`."""

Answered = Sequence[str | None]
"""Per example the predicted class; None where its image can't be read, which counts as wrong."""


@dataclass(slots=True)
class Verdict:
    """Everything that was found."""

    metrics: dict[str, float]
    """Empty where no example says what is right."""
    baselines: dict[str, dict[str, float]]
    kinds: dict[str, dict[str, float]]
    """By type of answer or by true class: number of `examples` and `accuracy`; most frequent first."""
    points: list[float | None]
    """How right each example is, from 0 to 1; None where it is not known."""
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    """True class → predicted class → examples; empty where answers are open."""


def judge_answers(examples: Sequence[Sample], predicted: Answered, answers: Sequence[str]) -> Verdict:
    """VQA v2's official accuracy (Antol et al., 2015), overall and by answer type.

    Args:
        answers: the vocabulary that was chosen from, the most common first.
    """
    questions = [example.questions[0] for example in examples]
    points = [_points(question, answer) for question, answer in zip(questions, predicted, strict=True)]
    known = [question for question in questions if question.answers]
    if not known:
        return Verdict({}, {}, {}, points)
    vocabulary = frozenset(answers)
    reachable = [_reachable(question, vocabulary) for question in known]
    baselines = {
        GUESS: {"accuracy": _mean(sum(each) / len(answers) for each in reachable)},
        COMMON: {"accuracy": _mean(accuracy(answers[0], question.answers) for question in known)},
        POSSIBLE: {"accuracy": _mean(max(each, default=0.0) for each in reachable)},
    }
    metrics = {"accuracy": _mean(point for point in points if point is not None)}
    return Verdict(metrics, baselines, _by_kind([question.kind for question in questions], points), points)


def judge_classes(examples: Sequence[Sample], predicted: Answered, classes: Sequence[str]) -> Verdict:
    """Accuracy over all examples and of each class."""
    labels = [example.statements[0].label for example in examples]
    points = _right(labels, predicted)
    common = Counter(labels).most_common(1)[0][0]
    baselines = {
        GUESS: {"accuracy": 100 / len(classes)},
        COMMON: {"accuracy": _mean(_right(labels, [common] * len(labels)))},
    }
    confusion = {label: dict.fromkeys([*classes, UNREADABLE], 0) for label in classes}
    for label, answer in zip(labels, predicted, strict=True):
        confusion[label][UNREADABLE if answer is None else answer] += 1
    return Verdict({"accuracy": _mean(points)}, baselines, _by_kind(labels, points), [*points], confusion)


def judge_pairs(examples: Sequence[Sample], predicted: Answered, classes: Sequence[str]) -> Verdict:
    """As `judge_classes`, and consistency: the share of sentences that are judged rightly with all of their pairs."""
    verdict = judge_classes(examples, predicted, classes)
    sentences = [sentence_of(example) for example in examples]
    labels = [example.statements[0].label for example in examples]
    common = Counter(labels).most_common(1)[0][0]
    verdict.metrics["consistency"] = _consistency(sentences, _right(labels, predicted))
    sizes = Counter(sentences).values()
    verdict.baselines[GUESS]["consistency"] = _mean(len(classes) ** -size for size in sizes)
    verdict.baselines[COMMON]["consistency"] = _consistency(sentences, _right(labels, [common] * len(labels)))
    return verdict


def sentence_of(example: Sample) -> str:
    """Names the sentence that an example shares with others: NLVR2's id without the pair, else the text itself."""
    match = _NLVR2_ID.fullmatch(example.id)
    return example.captions[0] if match is None else f"{match[1]}--{match[2]}"


def true_answer(example: Sample) -> str:
    """What an example should be answered with; of a question what most people said. Empty where it is not known."""
    if example.questions:
        return most_common(example.questions[0].answers) if example.questions[0].answers else ""
    return example.statements[0].label


JUDGES: dict[str, Callable[[Sequence[Sample], Answered, Sequence[str]], Verdict]] = {
    "vqa": judge_answers,
    "nlvr2": judge_pairs,
    "snli-ve": judge_classes,
}
"""By task: examples, what was predicted, all classes → verdict."""


def _points(question: Question, answer: str | None) -> float | None:
    if not question.answers:
        return None
    return 0.0 if answer is None else accuracy(answer, question.answers)


def _reachable(question: Question, vocabulary: frozenset[str]) -> list[float]:
    """Scores of all answers of the vocabulary that score anything."""
    given = {*question.answers, *map(normalise, question.answers)} & vocabulary
    return [accuracy(answer, question.answers) for answer in given]


def _right(labels: Sequence[str], predicted: Answered) -> list[float]:
    return [float(label == answer) for label, answer in zip(labels, predicted, strict=True)]


def _consistency(sentences: Sequence[str], points: Sequence[float]) -> float:
    worst: dict[str, float] = {}
    for sentence, point in zip(sentences, points, strict=True):
        worst[sentence] = min(worst.get(sentence, 1.0), point)
    return _mean(worst.values())


def _by_kind(kinds: Sequence[str], points: Sequence[float | None]) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for kind, point in zip(kinds, points, strict=True):
        if kind and point is not None:
            found[kind].append(point)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {kind: {"examples": len(own), "accuracy": _mean(own)} for kind, own in ordered}


def _mean(shares: Iterable[float]) -> float:
    """In per cent."""
    values = list(shares)
    return 100 * sum(values) / len(values)
