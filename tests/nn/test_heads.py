"""Heads over a pair's [CLS]."""

from __future__ import annotations

import pytest
import torch

from vlscale.nn.heads import ClassHead, WordAnswerHead


def test_classes_are_two_linear_maps_with_a_relu_between() -> None:
    torch.manual_seed(0)
    head, states = ClassHead(8, classes=3, hidden=24), torch.randn(5, 8)
    first, _, _, last = head.layers
    assert first.weight.shape == (24, 8)
    expected = (states @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    assert torch.allclose(head.train()(states), expected, atol=1e-6)  # nothing is dropped out unless asked for


def test_answers_start_as_the_mean_of_their_words() -> None:
    torch.manual_seed(0)
    decoder, bias = torch.randn(10, 4), torch.randn(10)
    head = WordAnswerHead(4, answers=3)
    head.start_from(decoder, bias, torch.tensor([[5, 0, 0], [7, 9, 0], [9, 9, 4]]), pad=0)
    for row, pieces in enumerate(([5], [7, 9], [9, 9, 4])):
        assert torch.allclose(head.weight[row], decoder[pieces].mean(0), atol=1e-6)
        assert torch.allclose(head.bias[row], bias[pieces].mean(), atol=1e-6)
    states = torch.randn(2, 4)
    assert torch.allclose(
        head(states)[:, 0], states @ decoder[5] + bias[5], atol=1e-6
    )  # as the word itself would score


@pytest.mark.parametrize("pieces", [[[5, 0], [7, 9]], [[5, 0], [0, 0], [7, 9]]])
def test_an_answer_without_words_is_refused(pieces: list[list[int]]) -> None:
    head = WordAnswerHead(4, answers=3)
    with pytest.raises(ValueError, match="pieces of 3 answers, none empty"):
        head.start_from(torch.randn(10, 4), torch.zeros(10), torch.tensor(pieces), pad=0)
