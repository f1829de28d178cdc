"""VQA v2's answers: the official normalisation and accuracy, soft scores to train on, and answer vocabularies."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from vlscale.data.sample import Question, Sample
from vlscale.data.sources.fields import kind, read_json
from vlscale.errors import UserError

MULTIPLE_CHOICE = "multiple_choice"
"""Key of `Sample.extra`: question id → the answer that the data set names, where it is not `most_common`."""

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_WORDS = {digits: word for word, digits in _NUMBERS.items() if word != "none"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code hands re.UNICODE, which is 32, to the parameter that limits the replacements."""
_TABLE = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
"""
_CONTRACTIONS = dict(pair.split(":") for pair in _TABLE.split())
"""The official table, oddities included: texts are in lower case by then, so `Im` is never met."""


def spelled(answer: str) -> str:
    """The answer with its whole numbers up to ten as words, as captions have them: `2 dogs` → `two dogs`."""
    return " ".join(_WORDS.get(word, word) for word in answer.split())


@lru_cache(maxsize=1 << 16)  # millions of answers are a few ten thousand different ones
def normalise(answer: str) -> str:
    """The answer as VQA v2's official evaluation compares it: `A dog.` → `dog`, `Two` → `2`, `dont` → `don't`."""
    words = _without_punctuation(_on_one_line(answer)).lower().split()
    numbers = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbers if word not in _ARTICLES)


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """Normalised answer → its official score: the mean over all ways to leave one person out of min(others / 3, 1).

    Given by 1, 2, 3, 4 or more of ten people: 0.3, 0.6, 0.9, 1. An answer that stands alone scores 1.
    """
    counts = Counter(normalise(answer) for answer in answers)
    return {answer: _score(count, counts.total()) for answer, count in counts.items()}


def accuracy(answer: str, answers: Iterable[str]) -> float:
    """Official score of a predicted answer, from 0 to 1.

    As in the official evaluation, answers that all are the same are compared as people wrote them, not normalised.

    Raises:
        ValueError: nobody answered.
    """
    given, predicted = [_on_one_line(item) for item in answers], _on_one_line(answer)
    if not given:
        raise ValueError("accuracy needs at least one answer")
    if len(set(given)) > 1:
        given, predicted = [normalise(item) for item in given], normalise(predicted)
    return _score(given.count(predicted), len(given))


def most_common(answers: Iterable[str]) -> str:
    """The normalised answer that most people gave; of several the alphabetically first.

    Raises:
        ValueError: nobody answered.
    """
    counts = Counter(normalise(answer) for answer in answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def chosen_answers(samples: Iterable[Sample]) -> dict[str, str]:
    """Question id → the answer that the data set names for it, of all samples where it is not `most_common`."""
    return {key: answer for sample in samples for key, answer in sample.extra.get(MULTIPLE_CHOICE, {}).items()}


def answer_vocabulary(
    questions: Iterable[Question],
    min_count: int = 9,
    size: int | None = None,
    chosen: Mapping[str, str] | None = None,
) -> list[str]:
    """Normalised answers to choose from, the most frequent first, equally frequent ones in alphabetical order.

    A question counts once, for the answer that most people gave. On train and val of VQA v2 bottom-up attention, whose
    rule the default is, had 3,129 of them; SOHO has 3,192, ALBEF's generation ranks 3,128: `size` gives as many.

    Args:
        min_count: how many questions an answer needs.
        size: take this many instead, however rare (SOHO: 3,192).
        chosen: question id → answer that counts instead; see `chosen_answers`.
    """
    named = chosen or {}
    counts = Counter(
        normalise(named[question.id]) if question.id in named else most_common(question.answers)
        for question in questions
        if question.answers or question.id in named
    )
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return ordered[:size] if size is not None else [answer for answer in ordered if counts[answer] >= min_count]


def save_answers(path: Path, answers: list[str]) -> None:
    """Write a vocabulary as a JSON list, an answer a line; beside its place and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(answers, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_answers(path: Path) -> list[str]:
    """A vocabulary: a JSON list of strings, or a .txt file with an answer a line.

    Raises:
        UserError: the file can't be read, holds no answer, one that is no string, or one twice.
    """
    expected = "a JSON list of answers, or a .txt file with one a line"
    if path.suffix == ".txt":
        try:
            answers: object = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: can't be read ({error}); expected {expected}") from None
    else:
        answers = read_json(path, expected)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{path}: expected {expected}, got none")
    for number, answer in enumerate(answers, start=1):
        if not isinstance(answer, str):
            raise UserError(f"{path}, answer {number}: expected a string, got {kind(answer)}")
    answer, count = Counter(answers).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: answer {answer[:60]!r} stands {count} times in it; expected different answers")
    return answers


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Punctuation beside a space vanishes, other becomes a space; with a comma in a number all of it vanishes."""
    joined = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _score(count: int, people: int) -> float:
    """Of an answer that `count` of `people` gave; in whole numbers, so that 0.3 is exactly that."""
    if people == 1:
        return float(count)
    return (count * min(count - 1, 3) + (people - count) * min(count, 3)) / (3 * people)
