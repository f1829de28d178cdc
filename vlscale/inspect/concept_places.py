"""Where concepts lie to one another: a map by t-SNE, nearest neighbours, and phrases around their tags."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlscale.inspect.concept_table import ConceptTable

PERPLEXITY = 30.0
FEWEST = 5
"""Concepts that t-SNE can place."""


@dataclass(frozen=True, slots=True)
class AroundTag:
    """Phrases that are about a tag."""

    tag: int
    """Row of the table."""
    phrases: list[int]
    """Rows."""
    to_tag: float
    """Mean cosine of the phrases to the tag."""
    together: float
    """Mean cosine of two of them."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Do phrases lie around the tags that they contain? Of the phrases that contain one."""

    phrases: int
    nearest: float
    """Share whose nearest tag is one that they contain."""
    of_words: float
    """The same, if phrases were the mean of their words, where they started."""
    chance: float
    to_words: float
    """Mean cosine of all phrases to the mean of their words: 1 where training has not moved them apart."""


def tsne(unit: np.ndarray, seed: int = 0) -> np.ndarray:
    """Vectors [N, D] of length 1 → [N, 2] float32, by cosine distance; the same every time on the same machine.

    Args:
        unit: N at least FEWEST.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    model = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed, n_jobs=1)
    with threadpool_limits(1):  # sums over threads would differ in their last bits, and the map soon as a whole
        return model.fit_transform(unit.astype(np.float64)).astype(np.float32)


def neighbours(table: ConceptTable, row: int, count: int) -> list[tuple[int, float]]:
    """The other concepts of the highest cosine to one, and theirs."""
    cosines = table.unit @ table.unit[row]
    nearest = [other for other in np.argsort(-cosines, kind="stable").tolist() if other != row][:count]
    return [(other, float(cosines[other])) for other in nearest]


def around_tags(table: ConceptTable, tags: list[int], phrases: list[int]) -> list[AroundTag]:
    """Tags with two phrases or more about them, those whose phrases lie closest together first."""
    found = []
    for tag in tags:
        about = [row for row in phrases if table.concepts[tag].name in table.concepts[row].objects]
        count = len(about)
        if count > 1:
            own = table.unit[about]
            together = (float(np.square(own.sum(axis=0)).sum()) - count) / (count * (count - 1))
            found.append(AroundTag(tag, about, float((own @ table.unit[tag]).mean()), together))
    return sorted(found, key=lambda one: -one.together)


def hierarchy(table: ConceptTable) -> Hierarchy | None:
    """Over all tags of the data and all phrases; None where no phrase contains a tag."""
    tags = table.of_kind("tag")
    names = np.array([table.concepts[tag].name for tag in tags])
    phrases = table.of_kind("attribute", "relation")
    own = np.array([np.isin(names, table.concepts[row].name.split()) for row in phrases]).reshape(
        len(phrases), len(tags)
    )
    containing = own.any(axis=1)
    if not containing.any():
        return None
    rows, own = np.array(phrases)[containing], own[containing]

    def hit(vectors: np.ndarray) -> float:
        nearest = (vectors[rows] @ table.unit[tags].T).argmax(axis=1)
        return float(own[np.arange(len(rows)), nearest].mean())

    to_words = float((table.unit[phrases] * table.of_words[phrases]).sum(axis=1).mean())
    return Hierarchy(len(rows), hit(table.unit), hit(table.of_words), float(own.mean()), to_words)
