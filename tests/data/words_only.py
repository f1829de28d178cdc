"""How far the words alone get: logistic regression on a text's words and word pairs, which never sees a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F


def words_only_accuracy(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], penalty: float = 1e-3, least: int = 3
) -> float:
    """Share of the test texts whose label the regression finds; both are lists of (text, label).

    Args:
        penalty: of the squared weights.
        least: texts that a word or a pair of neighbours has to be in to count.
    """
    counts = Counter(term for text, _ in train for term in set(_terms(text)))
    columns = {term: number for number, term in enumerate(sorted(t for t, n in counts.items() if n >= least))}
    labels = {label: number for number, label in enumerate(sorted({label for _, label in train}))}
    x, y = _matrix(train, columns), torch.tensor([labels[label] for _, label in train])
    weight = torch.zeros(len(columns), len(labels), requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=25, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        guesses = (_matrix(test, columns) @ weight + bias).argmax(dim=1).tolist()
    right = [labels.get(label) == guess for (_, label), guess in zip(test, guesses, strict=True)]
    return sum(right) / len(right)


def most_common_share(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> float:
    """Share of the test texts that have the training texts' most frequent label."""
    label, _ = Counter(label for _, label in train).most_common(1)[0]
    return sum(found == label for _, found in test) / len(test)


def _terms(text: str) -> list[str]:
    words = text.split()
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def _matrix(texts: Sequence[tuple[str, str]], columns: dict[str, int]) -> torch.Tensor:
    """[N, terms] float32: 1 where the term is in the text."""
    matrix = torch.zeros(len(texts), len(columns))
    for row, (text, _) in enumerate(texts):
        matrix[row, [columns[term] for term in set(_terms(text)) if term in columns]] = 1
    return matrix
