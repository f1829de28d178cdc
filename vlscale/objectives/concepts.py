"""Masked concept recovering, MCR (MVPTR, section 3.2.1): which of an image's masked concepts stood where is no matter.

So the labels of the masked slots of one image, or of one caption, are dealt out anew to suit the predictions, and only
then compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.objectives.masking import IGNORED, MaskedTokens, gather_masked
from vlscale.transport import assign

Cost = Literal["prob", "nll"]
"""What the assignment minimises: 1 − p (eq. 1), or −log p."""
Order = Literal["hungarian", "ordered"]
"""Deal the labels out anew, or leave each at its slot."""


class ConceptStates(NamedTuple):
    """The rows that a concept head has to see."""

    states: Tensor
    """[C, D]."""
    labels: Tensor
    """[C] int64, −100 in the rows that fill up."""
    groups: Tensor
    """[C] int64: row of the batch that each came from."""


class Slots(NamedTuple):
    """Predictions of the masked slots of a batch; rows that fill up have a label below 0."""

    logits: Tensor
    """[C, V]."""
    labels: Tensor
    """[C] int64."""
    groups: Tensor
    """[C] int64 ≥ 0: image or caption of each slot; of rows that fill up it is not read."""
    most: int
    """Slots of one group are at most so many: its length before masking."""


class Recovered(NamedTuple):
    """Result of `recover`."""

    loss: Tensor
    """Scalar, eq. 2 or 3."""
    labels: Tensor
    """[C] int64 as they were dealt out, −100 in the rows that fill up."""


def mask_concepts(
    input_ids: Tensor,
    concepts: Tensor,
    mask_id: int,
    replacements: tuple[int, int],
    probability: float,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Select concepts with `probability`; 80 % become [MASK], 10 % another concept, 10 % stay.

    The draws are made on the CPU, so that they do not depend on the device.

    Args:
        input_ids: [B, L] int64.
        concepts: [B, L] bool, the positions that may be selected.
        mask_id: of [MASK].
        replacements: first id, and last id + 1, that a random replacement is drawn from: words, or phrases.
        probability: of a concept.
        generator: of the draws.
    """
    draws = torch.rand(2, *input_ids.shape, generator=generator).to(input_ids.device, non_blocking=True)
    others = torch.randint(*replacements, tuple(input_ids.shape), generator=generator)
    others = others.to(input_ids.device, non_blocking=True)
    selected = concepts & (draws[0] < probability)
    ids = torch.where(selected & (draws[1] >= 0.9), others, input_ids)
    ids = ids.masked_fill(selected & (draws[1] < 0.8), mask_id)
    return MaskedTokens(ids, torch.where(selected, input_ids, IGNORED))


def gather_concepts(states: Tensor, labels: Tensor, capacity: int) -> ConceptStates:
    """The states of the masked concepts, and whose they are; arguments as in `masking.gather_masked`."""
    batch, length = labels.shape
    rows = torch.arange(batch, device=labels.device)[:, None, None].expand(batch, length, 1)
    masked = gather_masked(states, labels, capacity)
    return ConceptStates(masked.states, masked.labels, gather_masked(rows, labels, capacity).states[:, 0])


def recover_loss(
    logits: Tensor, labels: Tensor, groups: Tensor, most: int, order: Order = "hungarian", cost: Cost = "prob"
) -> Tensor:
    """Eq. 1 and 2, or 3, for one kind of concept; arguments as in `Slots` and `recover`. Scalar."""
    return recover([Slots(logits, labels, groups, most)], order, cost)[0].loss


def recover(kinds: Sequence[Slots], order: Order = "hungarian", cost: Cost = "prob") -> list[Recovered]:
    """Cross-entropy of the masked slots with their group's labels in the best order (eq. 1 to 3).

    A mean over all masked slots of the batch, 0 where there is none. All kinds of concepts given together share the
    one copy to the host; "ordered" makes none. The assignment carries no gradient. fp32 throughout.
    """
    log_probabilities = [kind.logits.float().log_softmax(1) for kind in kinds]
    labels = [torch.where(kind.labels < 0, IGNORED, kind.labels) for kind in kinds]
    if order == "hungarian":
        labels = _dealt_out(kinds, log_probabilities, cost)
    pairs = zip(log_probabilities, labels, strict=True)
    return [Recovered(_mean_nll(scores, wanted), wanted) for scores, wanted in pairs]


def _mean_nll(log_probability: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log p over labels ≥ 0; [C, V], [C] → scalar."""
    selected = labels != IGNORED
    each = -log_probability.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(selected, each, 0.0).sum() / selected.sum().clamp(min=1)


class _Problems(NamedTuple):
    """One assignment per group, the slots sorted by group."""

    cost: Tensor  # [C, most] of slot r and its group's k-th label; 0 where the group has no k-th
    numbers: Tensor  # [C] group, −1 where a row fills up
    columns: Tensor  # [C, most] sorted row of the group's k-th label
    order: Tensor  # [C] which slot a sorted row is


@torch.no_grad()
def _dealt_out(kinds: Sequence[Slots], log_probabilities: Sequence[Tensor], cost: Cost) -> list[Tensor]:
    """Labels of every kind in the order of eq. 1: all problems of all kinds in one call."""
    problems = [_problems(kind, scores, cost) for kind, scores in zip(kinds, log_probabilities, strict=True)]
    most = max(kind.most for kind in kinds)
    costs = torch.cat([F.pad(problem.cost, (0, most - problem.cost.shape[1])) for problem in problems])
    # Numbers are made different from kind to kind, so that neighbours stay apart; -1 stays -1.
    count = len(problems)
    numbers = [torch.where(p.numbers < 0, -1, p.numbers * count + kind) for kind, p in enumerate(problems)]
    chosen = assign(costs, torch.cat(numbers)).split([len(kind.labels) for kind in kinds])
    dealt = []
    for kind, problem, column in zip(kinds, problems, chosen, strict=True):
        source = problem.columns.gather(1, column[:, None])[:, 0]  # [C] sorted row whose label a sorted row gets
        labels = kind.labels[problem.order][source]
        labels = torch.where(problem.numbers < 0, IGNORED, labels)
        dealt.append(torch.empty_like(labels).scatter(0, problem.order, labels))
    return dealt


def _problems(kind: Slots, log_probability: Tensor, cost: Cost) -> _Problems:
    last = torch.iinfo(torch.int64).max
    numbers, order = torch.where(kind.labels < 0, last, kind.groups).sort(stable=True)  # rows that fill up come last
    first = torch.searchsorted(numbers, numbers)  # [C] first row of each row's group
    columns = first[:, None] + torch.arange(kind.most, device=numbers.device)  # [C, most]
    columns = columns.clamp(max=max(len(numbers) - 1, 0))
    wanted = kind.labels.clamp(min=0)[order][columns]  # [C, most]
    scores = log_probability[order[:, None], wanted]
    scores = 1 - scores.exp() if cost == "prob" else -scores
    scores = torch.where(numbers[columns] == numbers[:, None], scores, 0.0)
    return _Problems(scores, torch.where(numbers == last, -1, numbers), columns, order)
