"""Cross-entropy with a teacher."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlscale.objectives.classification import (
    classification_accuracy,
    classification_loss,
    distilled_cross_entropy,
)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    each = distilled_cross_entropy(logits, labels, alpha=0.4)
    torch.testing.assert_close(each, F.cross_entropy(logits.movedim(2, 1), labels, reduction="none"))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_teacher_is_mixed_in(alpha: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,))
    teacher = torch.randn(6, 3, requires_grad=True)
    loss = classification_loss(logits, labels, teacher, alpha)
    targets = (1 - alpha) * F.one_hot(labels, 3) + alpha * teacher.detach().softmax(1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(logits.grad, ((logits.softmax(1) - targets) / 6).detach())


def test_half_precision_logits_are_compared_in_fp32() -> None:
    logits = torch.tensor([[40.0, 0.0, -40.0]], dtype=torch.bfloat16)
    loss = classification_loss(logits, torch.tensor([2]), logits, alpha=0.5)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(40.0)


def test_accuracy() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert float(classification_accuracy(logits, torch.tensor([0, 1, 1, 0]))) == 0.75
