"""Visual question answering: answers as words (ALBEF, section 3.4), or as classes (SOHO, MVPTR)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn.bert import KeyValue, select_context
from vlscale.nn.decoder import AnswerDecoder
from vlscale.objectives.classification import distilled_cross_entropy

ROWS_AT_ONCE = 256
"""Answers scored in one pass: with 8 tokens and 30,522 words their logits take 220 MB in fp32, and as much again."""


class RankedAnswers(NamedTuple):
    """The k best answers of each question, best first."""

    indices: Tensor
    """[B, k] int64, rows of the answer list."""
    probabilities: Tensor
    """[B, k] fp32, a softmax over the k answers."""


def answer_losses(
    logits: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """Negative log likelihood of each answer: a sum over its words, so a long answer weighs more.

    Args:
        logits: [n, L, V], row p predicts word p + 1; or without the last row, which predicts nothing, [n, L − 1, V].
        answer_ids: [n, L] int64, [CLS] answer [SEP] padding.
        answer_mask: [n, L] int64, 0 where padding, which nobody has to predict.
        teacher_logits: like `logits`; mixed in as `distilled_cross_entropy` does.
        alpha: weight of the distillation.

    Returns:
        [n] fp32.
    """
    words = answer_ids[:, 1:]
    taught = None if teacher_logits is None else teacher_logits[:, : words.shape[1]]
    each = distilled_cross_entropy(logits[:, : words.shape[1]], words, taught, alpha)  # [n, L − 1]
    return torch.where(answer_mask[:, 1:] == 1, each, 0.0).sum(1)


def question_loss(losses: Tensor, weights: Tensor, questions: int) -> Tensor:
    """Σ weight · loss over the answers, per question.

    Args:
        losses: [n] of `answer_losses`, the answers of all questions.
        weights: [n], how often people gave the answer, as a share of the question's answers.
        questions: number of questions that these are the answers of.
    """
    return (weights * losses).sum() / questions


@torch.no_grad()
def rank_answers(
    decoder: AnswerDecoder,
    context: list[KeyValue],
    question_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    k: int,
    *,
    first_word_twice: bool = True,
    rows_at_once: int = ROWS_AT_ONCE,
) -> RankedAnswers:
    """Choose k answers of a list by their first word's probability, score those in full.

    Equally probable first words keep the list's order, so that the choice is the same everywhere.

    Args:
        decoder: in evaluation mode.
        context: of the B questions, `decoder.project_context`.
        question_mask: [B, M] int64.
        answer_ids: [N, L] int64, [CLS] answer [SEP] padding, L ≥ 2; all start with the same token.
        answer_mask: [N, L] int64.
        k: candidates per question; N scores every answer.
        first_word_twice: the score is log P(answer) + log P(first word), as in the release; else log P(answer).
        rows_at_once: answers scored in one pass, which bounds the memory; the result doesn't depend on it.

    Raises:
        ValueError: k is no number of answers of the list.
    """
    if not 1 <= k <= len(answer_ids):
        raise ValueError(f"k is {k}, expected 1 to {len(answer_ids)}, the number of answers")
    start = answer_ids[:1, :1].expand(len(question_mask), 1)  # [B, 1]
    states = decoder(start, torch.ones_like(start), context, question_mask)
    first = decoder.word_logits(states[:, 0]).float().log_softmax(1)[:, answer_ids[:, 1]]  # [B, N]
    ordered = first.sort(dim=1, descending=True, stable=True)
    first, chosen = ordered.values[:, :k], ordered.indices[:, :k]

    scores = []
    questions = torch.arange(len(question_mask), device=chosen.device).repeat_interleave(k)  # [B · k]
    for rows, asked in zip(chosen.flatten().split(rows_at_once), questions.split(rows_at_once), strict=True):
        ids, mask = answer_ids[rows], answer_mask[rows]  # [n, L]
        states = decoder(ids, mask, select_context(context, asked), question_mask[asked])
        scores.append(-answer_losses(decoder.word_logits(states[:, :-1]), ids, mask))
    score = torch.cat(scores).view_as(first)
    if first_word_twice:
        score = score + first
    best = score.softmax(1).sort(dim=1, descending=True, stable=True)
    return RankedAnswers(chosen.gather(1, best.indices), best.values)


def soft_score_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross-entropy against soft scores: a sum over the answers, a mean over the questions.

    SOHO's and MVPTR's releases scale the mean over all entries by the number of answers, which is the same.

    Args:
        logits: [B, answers].
        scores: [B, answers] in [0, 1], see `data.answers.soft_scores`.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), scores.float(), reduction="none").sum(1).mean()


def soft_scores_won(logits: Tensor, scores: Tensor) -> Tensor:
    """Score of the answer with the highest logit; both [B, answers] → [B]."""
    return scores.gather(1, logits.detach().argmax(1, keepdim=True))[:, 0]
