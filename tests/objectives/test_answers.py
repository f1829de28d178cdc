"""Losses of answers as words and as classes, and the ranking of an answer list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.systems.fake_gpu import put_on_fake_gpu
from vlscale.config import Text
from vlscale.data.sample import Vocabulary
from vlscale.nn.decoder import AnswerDecoder
from vlscale.objectives.answers import (
    answer_losses,
    question_loss,
    rank_answers,
    soft_score_loss,
    soft_scores_won,
)

VOCABULARY = Vocabulary(size=30, pad=0, cls=1, sep=2, mask=3)
ANSWERS = torch.tensor([[1, 5, 6, 2], [1, 5, 2, 0], [1, 7, 2, 0], [1, 8, 9, 2], [1, 10, 2, 0], [1, 11, 2, 0]])
MASK = (ANSWERS != 0).long()


def decoder() -> AnswerDecoder:
    torch.manual_seed(1)
    config = Text(width=16, heads=4, intermediate=24, text_layers=1, fusion_layers=2, max_positions=8, dropout=0.0)
    built = AnswerDecoder(config, VOCABULARY).eval()
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return built


def questions() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def one_by_one(module: AnswerDecoder) -> tuple[Tensor, Tensor]:
    """log P of every answer's first word and of the whole answer, [3, 6] each: one question, one answer at a time."""
    states, question_mask = questions()
    first, whole = torch.zeros(3, 6), torch.zeros(3, 6)
    for q in range(3):
        real = int(question_mask[q].sum())
        context = module.project_context(states[q : q + 1, :real])
        for a, answer in enumerate(ANSWERS):
            words = answer[answer != 0]
            logits = module.word_logits(module(words[None], torch.ones(1, len(words)).long(), context))[0]
            each = [float(logits[p].log_softmax(0)[words[p + 1]].detach()) for p in range(len(words) - 1)]
            first[q, a], whole[q, a] = each[0], sum(each)
    return first, whole


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_ranks_as_scoring_one_by_one_does(k: int, twice: bool) -> None:
    module, (states, question_mask) = decoder(), questions()
    first, whole = one_by_one(module)
    context = module.project_context(states)
    ranked = rank_answers(module, context, question_mask, ANSWERS, MASK, k, first_word_twice=twice, rows_at_once=4)
    scores = whole + first if twice else whole
    for q in range(3):
        kept = sorted(range(6), key=lambda a: -float(first[q, a].round(decimals=4)))[:k]
        best = sorted(kept, key=lambda a: -float(scores[q, a]))
        assert ranked.indices[q].tolist() == best
        torch.testing.assert_close(ranked.probabilities[q], scores[q, best].softmax(0), rtol=1e-4, atol=1e-5)


def test_the_list_s_order_decides_between_equal_first_words() -> None:
    """Answers 0 and 1 begin alike: a cut between them keeps the earlier one."""
    module, (states, question_mask) = decoder(), questions()
    context = module.project_context(states)
    first, _ = one_by_one(module)
    place = 1 + (first[0] > first[0, 0] + 1e-4).sum()
    ranked = rank_answers(module, context, question_mask, ANSWERS, MASK, int(place))
    assert 0 in ranked.indices[0].tolist()
    assert 1 not in ranked.indices[0].tolist()


@pytest.mark.parametrize("k", [0, 7])
def test_more_candidates_than_answers_are_refused(k: int) -> None:
    module, (states, question_mask) = decoder(), questions()
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 6"):
        rank_answers(module, module.project_context(states), question_mask, ANSWERS, MASK, k)


def test_an_answer_s_loss_is_a_sum_over_its_words() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 4, 30), torch.randn(6, 4, 30)
    plain, taught = answer_losses(logits, ANSWERS, MASK), answer_losses(logits, ANSWERS, MASK, teacher, alpha=0.4)
    for row, answer in enumerate(ANSWERS):
        length = int(MASK[row].sum()) - 1
        words, student = answer[1 : length + 1], logits[row, :length]
        hard = F.cross_entropy(student, words, reduction="sum")
        soft = F.cross_entropy(student, teacher[row, :length].softmax(1), reduction="sum")
        torch.testing.assert_close(plain[row], hard)
        torch.testing.assert_close(taught[row], 0.6 * hard + 0.4 * soft)
    torch.testing.assert_close(answer_losses(logits[:, :-1], ANSWERS, MASK, teacher, alpha=0.4), taught)


def test_padding_sends_no_gradient() -> None:
    logits = torch.randn(6, 4, 30, requires_grad=True)
    loss = question_loss(answer_losses(logits, ANSWERS, MASK), torch.ones(6), questions=3)
    loss.backward()
    assert logits.grad is not None
    predicts = torch.cat([MASK[:, 1:], torch.zeros(6, 1)], dim=1).bool()
    assert logits.grad[predicts].any(-1).all()
    assert not logits.grad[~predicts].any()


def test_answers_weigh_as_often_as_they_were_given() -> None:
    losses, weights = torch.tensor([2.0, 4.0, 10.0]), torch.tensor([0.75, 0.25, 1.0])
    assert float(question_loss(losses, weights, questions=2)) == pytest.approx((1.5 + 1.0 + 10.0) / 2)


def test_soft_scores_are_summed_over_answers_and_averaged_over_questions() -> None:
    torch.manual_seed(0)
    logits, scores = torch.randn(3, 9), torch.rand(3, 9)
    torch.testing.assert_close(soft_score_loss(logits, scores), F.binary_cross_entropy_with_logits(logits, scores) * 9)
    best = logits.argmax(1)
    assert torch.equal(soft_scores_won(logits, scores), scores[torch.arange(3), best])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_ranking_and_loss_keep_to_the_gpu() -> None:
    """Mixed devices and data-dependent shapes raise under fake tensors."""
    module = decoder()
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(module)
        states, question_mask = torch.empty(3, 5, 16, device="cuda"), torch.ones(3, 5, device="cuda").long()
        ids, mask = (torch.empty_like(t, device="cuda") for t in (ANSWERS, MASK))
        context = module.project_context(states)
        ranked = rank_answers(module, context, question_mask, ids, mask, k=2, rows_at_once=4)
        assert ranked.probabilities.device.type == ranked.indices.device.type == "cuda"
        logits = module.word_logits(module(ids[:3], mask[:3], context, question_mask))
        assert answer_losses(logits, ids[:3], mask[:3], logits, 0.4).device.type == "cuda"
