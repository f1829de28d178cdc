"""VQA v2's accuracy against a slow version of the official formula, known normalisations, vocabularies."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from vlscale.data.answers import (
    MULTIPLE_CHOICE,
    accuracy,
    answer_vocabulary,
    chosen_answers,
    load_answers,
    most_common,
    normalise,
    save_answers,
    soft_scores,
)
from vlscale.data.sample import Question, Sample
from vlscale.errors import UserError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a dog.", "dog"),
        ("A Dog", "dog"),
        ("\tthe\ncat ", "cat"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("it's", "it's"),
        ("its", "its"),
        ("youre", "you're"),
        ("somebody'd", "somebodyd"),  # the official table has it the wrong way round
        ("im", "im"),  # and `Im`, which lower case never meets
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma in a number: all punctuation vanishes instead of parting words
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("red, white, blue", "red white blue"),
        ("3.5", "3.5"),
        ("no. 5", "no 5"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("10:30", "10:30"),
        ("the a an", ""),
        ("an apple a day", "apple day"),
        ("x" + "." * 40, "x........"),  # the official code replaces at most 32 periods
    ],
)
def test_known_normalisations(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def _slow_accuracy(answer: str, answers: list[str]) -> float:
    """The official loop: leave each person out in turn, count those of the others who agree."""
    scores = []
    for left_out in range(len(answers)):
        others = [other for place, other in enumerate(answers) if place != left_out]
        scores.append(min(1.0, sum(other == answer for other in others) / 3))
    return sum(scores) / len(scores)


def test_scores_are_the_official_ones() -> None:
    assert soft_scores(["cat"] * 1 + ["dog"] * 2 + ["cow"] * 3 + ["pig"] * 4) == {
        "cat": 0.3,
        "dog": 0.6,
        "cow": 0.9,
        "pig": 1.0,
    }
    assert soft_scores(["A cat", "cat."] + ["dog"] * 8) == {"cat": 0.6, "dog": 1.0}
    assert soft_scores(["dog"] * 10) == {"dog": 1.0}
    assert soft_scores(["dog"]) == {"dog": 1.0}
    assert soft_scores([]) == {}


def test_accuracy_is_the_official_loop_for_every_number_of_people() -> None:
    draw = random.Random(0)
    for people in range(2, 13):
        for _ in range(20):
            answers = [draw.choice(["red", "blue", "green"]) for _ in range(people)]
            for answer in ("red", "blue", "pink"):
                assert accuracy(answer, answers) == pytest.approx(_slow_accuracy(answer, answers), abs=1e-12)
                assert soft_scores(answers).get(answer, 0.0) == accuracy(answer, answers)


def test_accuracy_normalises_only_where_people_differ() -> None:
    assert accuracy("Two dogs", ["2 dogs"] * 9 + ["a cat"]) == 1.0
    assert accuracy("2 dogs", ["two dogs"] * 10) == 0.0
    assert accuracy("two dogs\n", ["two dogs"] * 10) == 1.0
    assert accuracy("cat", ["2 dogs"] * 9 + ["a cat"]) == 0.3
    with pytest.raises(ValueError, match="at least one answer"):
        accuracy("cat", [])


def test_most_common_ignores_the_order_of_people() -> None:
    for answers in itertools.permutations(["yes", "no", "A no", "Yes."]):
        assert most_common(answers) == "no"
    assert most_common(["Yes.", "yes", "no"]) == "yes"


def _questions(**counts: int) -> list[Question]:
    numbers = itertools.count()
    return [Question(str(next(numbers)), "?", (answer,) * 10) for answer, count in counts.items() for _ in range(count)]


def test_vocabulary_by_count_and_by_size() -> None:
    questions = [*_questions(pear=9, fig=8, apple=9, no=20), Question("test", "?")]
    assert answer_vocabulary(questions) == ["no", "apple", "pear"]
    assert answer_vocabulary(questions, min_count=8) == ["no", "apple", "pear", "fig"]
    assert answer_vocabulary(questions, size=2) == ["no", "apple"]
    assert answer_vocabulary(reversed(questions), size=3) == ["no", "apple", "pear"]
    assert answer_vocabulary(questions, size=99) == ["no", "apple", "pear", "fig"]


def test_vocabulary_counts_the_answer_that_the_data_set_names() -> None:
    questions = _questions(no=3)
    sample = Sample("1", Path("1.jpg"), questions=tuple(questions), extra={MULTIPLE_CHOICE: {"1": "Yes"}})
    chosen = chosen_answers([sample, Sample("2", Path("2.jpg"))])
    assert chosen == {"1": "Yes"}
    assert answer_vocabulary(questions, min_count=1, chosen=chosen) == ["no", "yes"]


def test_vocabulary_on_disk(tmp_path: Path) -> None:
    answers = ["no", "", "don't", "café"]
    save_answers(tmp_path / "answers.json", answers)
    assert load_answers(tmp_path / "answers.json") == answers
    (tmp_path / "answers.txt").write_text("no\ndon't\ncafé\n", "utf-8")
    assert load_answers(tmp_path / "answers.txt") == ["no", "don't", "café"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'{"no": 0}', "expected a JSON list of answers"),
        ("a.json", b"[]", "expected a JSON list of answers"),
        ("a.json", b'["no", 1]', "answer 2: expected a string, got a number"),
        ("a.json", b'["no", "yes", "no"]', "'no' stands 2 times"),
        ("a.json", b'["no"', "not JSON"),
        ("a.txt", b"caf\xe9", "can't be read"),
        ("b.txt", None, "can't be read"),
    ],
)
def test_a_wrong_vocabulary_is_named(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_answers(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert expected in str(caught.value)
