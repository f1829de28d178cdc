"""What a batch of examples should be answered with, as tensors: made by the loader, beside images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from vlscale.config import Data
from vlscale.config.tasks import GroundingTask, TaskConfig, VqaTask
from vlscale.data.answers import load_answers, normalise, soft_scores
from vlscale.data.captions import answer_pieces
from vlscale.data.examples import ENTAILMENT, TRUTH
from vlscale.data.sample import Sample
from vlscale.data.spans import Annotated, SpanEncoder
from vlscale.data.text import TextTokenizer

Targets = Callable[[Sequence[Sample], dict[str, Any]], dict[str, Tensor]]
"""Examples of a batch, and its other fields → `Batch.targets`. Runs in the workers."""


def make_targets(task: TaskConfig, data: Data, tokenizer: TextTokenizer, answers: Path | None = None) -> Targets | None:
    """The task's targets; None for retrieval, whose targets are the pairs themselves.

    Args:
        answers: vocabulary of answers, for VQA.

    Raises:
        UserError: a vocabulary can't be read.
    """
    if isinstance(task, VqaTask):
        assert answers is not None
        known = load_answers(answers)
        if task.mode == "classify":
            return AnswerScores(known)
        return AnswerWords(known, tokenizer, task.max_answer)
    if isinstance(task, GroundingTask):
        return Overlaps(data, tokenizer)
    if task.name == "retrieval":
        return None
    return Classes(ENTAILMENT if task.name == "snli-ve" else TRUTH)


class Classes:
    """`labels` [B] int64: number of the statement's class."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}

    def __call__(self, examples: Sequence[Sample], fields: dict[str, Any]) -> dict[str, Tensor]:
        numbers = [self._numbers[example.statements[0].label] for example in examples]
        return {"labels": torch.tensor(numbers, dtype=torch.int64)}


class AnswerScores:
    """`scores` [B, answers] float32: soft scores as VQA v2's evaluation gives them."""

    def __init__(self, answers: Sequence[str]) -> None:
        self._numbers = {answer: number for number, answer in enumerate(answers)}

    def __call__(self, examples: Sequence[Sample], fields: dict[str, Any]) -> dict[str, Tensor]:
        scores = torch.zeros(len(examples), len(self._numbers))
        for row, example in enumerate(examples):
            for answer, score in soft_scores(example.questions[0].answers).items():
                number = self._numbers.get(answer)
                if number is not None:
                    scores[row, number] = score
        return {"scores": scores}


class AnswerWords:
    """Different answers of each question, written out; n in all, L tokens.

    `answer_ids`, `answer_mask` [n, L] int64: [CLS] answer [SEP] padding; `answer_weights` [n] float32: share of the
    people who gave it; `answer_of` [n] int64: row of its question. Answers that are not in the list count too, as in
    ALBEF's release.
    """

    def __init__(self, answers: Sequence[str], tokenizer: TextTokenizer, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest

    def __call__(self, examples: Sequence[Sample], fields: dict[str, Any]) -> dict[str, Tensor]:
        words: list[str] = []
        weights: list[float] = []
        rows: list[int] = []
        for row, example in enumerate(examples):
            given = [normalise(answer) for answer in example.questions[0].answers]
            for answer in dict.fromkeys(given):
                words.append(answer)
                weights.append(given.count(answer) / len(given))
                rows.append(row)
        ids, mask = answer_tokens(words, self._tokenizer, self._longest)
        return {
            "answer_ids": ids,
            "answer_mask": mask,
            "answer_weights": torch.tensor(weights),
            "answer_of": torch.tensor(rows, dtype=torch.int64),
        }


class Overlaps:
    """`spans` [B, S, L] bool: tokens of each phrase; `overlaps` [B, S, R] float32: IoU of its boxes with each region,
    the best of several boxes; `grounded` [B, S] bool: phrases that have a box and tokens."""

    def __init__(self, data: Data, tokenizer: TextTokenizer) -> None:
        self._encode = SpanEncoder(data, tokenizer)

    def __call__(self, examples: Sequence[Sample], fields: dict[str, Any]) -> dict[str, Tensor]:
        phrases = [tuple(phrase for phrase in example.phrases if phrase.boxes) for example in examples]
        spoken = self._encode([Annotated(one, 0, own) for one, own in zip(examples, phrases, strict=True)])
        regions = fields["region_boxes"]  # [B, R, 4]
        overlaps = torch.zeros(*spoken.spans.shape[:2], regions.shape[1])
        for row, own in enumerate(phrases):
            for slot, phrase in enumerate(own):
                overlaps[row, slot] = box_iou(torch.tensor(phrase.boxes), regions[row]).amax(0)
        return {"spans": spoken.spans, "overlaps": overlaps, "grounded": spoken.spans.any(2)}


def answer_tokens(answers: Sequence[str], tokenizer: TextTokenizer, longest: int) -> tuple[Tensor, Tensor]:
    """[CLS] answer [SEP] and padding, cut at `longest`: ids and mask, both [n, L] int64; L is the longest's length."""
    v = tokenizer.vocabulary
    rows = [[v.cls, *pieces[: longest - 2], v.sep] for pieces in answer_pieces(answers, tokenizer)]
    length = max(map(len, rows))
    ids = np.full((len(rows), length), v.pad, dtype=np.int64)
    for row, own in enumerate(rows):
        ids[row, : len(own)] = own
    return torch.from_numpy(ids), torch.from_numpy((ids != v.pad).astype(np.int64))
