"""Metrics of answers against the official formulas, written out as loops."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vlscale.data.answers import normalise
from vlscale.data.sample import Question, Sample, Statement
from vlscale.tasks.verdicts import (
    COMMON,
    GUESS,
    POSSIBLE,
    UNREADABLE,
    judge_answers,
    judge_classes,
    judge_pairs,
    sentence_of,
    true_answer,
)

CLASSES = ("entailment", "neutral", "contradiction")
VOCABULARY = ["yes", "no", "2", "red", "blue"]


def question(identity: str, answers: tuple[str, ...], kind: str = "") -> Sample:
    return Sample(identity, Path("x.png"), ("what ?",), questions=(Question(identity, "what ?", answers, kind),))


def statement(identity: str, label: str, text: str = "a dog") -> Sample:
    return Sample(identity, Path("x.png"), (text,), statements=(Statement(identity, text, label),))


def official(answer: str, given: tuple[str, ...]) -> float:
    """VQA v2's evaluation, question by question: leave one person out, count the others who agree."""
    people = list(given)
    if len(set(people)) > 1:
        people, answer = [normalise(one) for one in people], normalise(answer)
    scores = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        scores.append(min(1.0, sum(one == answer for one in others) / 3) if len(people) > 1 else people[0] == answer)
    return sum(scores) / len(scores)


def test_soft_accuracy_overall_and_by_type_is_the_official_one() -> None:
    rng = random.Random(0)
    said = ["yes", "No.", "two", "the red", "blue", "something else"]
    kinds = ["yes/no", "number", "other"]
    examples = [question(str(n), tuple(rng.choices(said, k=10)), kinds[n % 3]) for n in range(60)]
    predicted = [None if n == 7 else rng.choice(VOCABULARY) for n in range(60)]
    verdict = judge_answers(examples, predicted, VOCABULARY)
    each = [
        0.0 if answer is None else official(answer, one.questions[0].answers)
        for one, answer in zip(examples, predicted, strict=True)
    ]
    assert verdict.points == pytest.approx(each)
    assert verdict.points[7] == 0
    assert verdict.metrics["accuracy"] == pytest.approx(100 * sum(each) / 60)
    assert verdict.kinds["number"] == {"examples": 20, "accuracy": pytest.approx(100 * sum(each[1::3]) / 20)}
    for name, pick in (
        (GUESS, lambda scores: sum(scores) / len(scores)),
        (COMMON, lambda scores: scores[0]),
        (POSSIBLE, max),
    ):
        slow = [pick([official(answer, one.questions[0].answers) for answer in VOCABULARY]) for one in examples]
        assert verdict.baselines[name]["accuracy"] == pytest.approx(100 * sum(slow) / 60)


def test_questions_without_answers_are_not_judged() -> None:
    verdict = judge_answers([question("1", ()), question("2", ("yes",))], ["no", "yes"], VOCABULARY)
    assert verdict.points == [None, 1.0]
    assert verdict.metrics == {"accuracy": 100.0}
    assert judge_answers([question("1", ())], ["no"], VOCABULARY).metrics == {}
    assert true_answer(question("1", ())) == ""


def test_accuracy_by_class_and_what_was_taken_for_what() -> None:
    labels = ["entailment", "neutral", "neutral", "contradiction", "neutral"]
    examples = [statement(str(n), label) for n, label in enumerate(labels)]
    verdict = judge_classes(examples, ["entailment", "neutral", "entailment", "neutral", None], CLASSES)
    assert verdict.metrics == {"accuracy": 40.0}
    assert verdict.kinds["neutral"] == {"examples": 3, "accuracy": pytest.approx(100 / 3)}
    assert list(verdict.kinds) == ["neutral", "contradiction", "entailment"]
    taken = {"entailment": 1, "neutral": 1, "contradiction": 0, UNREADABLE: 1}
    assert verdict.confusion["neutral"] == taken
    assert verdict.baselines == {GUESS: {"accuracy": pytest.approx(100 / 3)}, COMMON: {"accuracy": 60.0}}


def test_consistency_is_that_of_nlvr2s_evaluation() -> None:
    rng = random.Random(1)
    identities = [f"dev-{group}-{pair}-{text}" for group in range(9) for pair in range(4) for text in range(2)]
    examples = [statement(one, rng.choice(("true", "false"))) for one in identities]
    predicted = [one.statements[0].label if rng.random() < 0.85 else None for one in examples]
    verdict = judge_pairs(examples, predicted, ("false", "true"))
    consistent: dict[str, bool] = {}
    for example, answer in zip(examples, predicted, strict=True):
        parts = example.id.split("-")
        parts[2] = ""
        key = "-".join(parts)
        consistent[key] = consistent.get(key, True) and answer == example.statements[0].label
    assert len(consistent) == 18
    assert 0 < sum(consistent.values()) < 18
    assert verdict.metrics["consistency"] == pytest.approx(100 * sum(consistent.values()) / 18)
    assert verdict.baselines[GUESS] == {"accuracy": 50.0, "consistency": pytest.approx(6.25)}
    assert verdict.baselines[COMMON]["accuracy"] >= 50


def test_other_ids_are_grouped_by_their_text() -> None:
    assert sentence_of(statement("test-3-1-0", "true")) == sentence_of(statement("test-3-2-0", "true", "another"))
    assert sentence_of(statement("test-3-1-0", "true")) != sentence_of(statement("test-3-1-1", "true"))
    assert sentence_of(statement("test-3-1-0", "true")) != sentence_of(statement("val-3-1-0", "true"))
    assert sentence_of(statement("a", "true", "same")) == sentence_of(statement("b", "false", "same"))
