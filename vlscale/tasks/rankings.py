"""What every query of a retrieval found: the candidates at the top of its list, and the rank of the right one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlscale.data.sample import Sample
from vlscale.tasks.stages import SHOWN, Direction, second_stage


class Ranking(NamedTuple):
    """One direction in the end; Q queries, m ≤ 10 candidates, best first."""

    queries: Tensor
    """[Q] int64."""
    rank: Tensor
    """[Q] int64, of the best right candidate, 0 = first."""
    candidates: Tensor
    """[Q, m] int64."""
    scores: Tensor
    """[Q, m] float32: of ITM, or of the first stage where a candidate was not re-ranked."""
    relevant: Tensor
    """[Q, m] bool."""
    reranked: int
    """So many of the m candidates, the first ones."""


def ranking(direction: Direction, scores: Tensor) -> Ranking:
    """The top of every query's list after re-ranking by `scores` [Q, reranked]; of equal ones the wrong one is first,
    as ranks count them (of more than fit, any)."""
    top = min(SHOWN, direction.reranked)
    best, places = scores.topk(top, dim=1)
    right = direction.relevant[:, : direction.reranked].gather(1, places)
    order = right.int().argsort(dim=1, stable=True)
    order = order.gather(1, best.gather(1, order).argsort(dim=1, descending=True, stable=True))
    rest = slice(direction.reranked, direction.reranked + SHOWN - top)
    return Ranking(
        direction.queries,
        second_stage(direction, scores),
        torch.cat([direction.candidates.gather(1, places.gather(1, order)), direction.candidates[:, rest]], dim=1),
        torch.cat([best.gather(1, order), direction.similarity[:, rest]], dim=1),
        torch.cat([right.gather(1, order), direction.relevant[:, rest]], dim=1),
        top,
    )


def predictions(t2i: Ranking, i2t: Ranking, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """A record per query: captions, then images.

    `image` numbers the samples, `caption` those of one sample; `rank` is 1 for a query whose right answer comes first
    and None for an image without captions. A candidate that was not re-ranked has the first stage's score.
    """
    said = [(number, place) for number, one in enumerate(samples) for place in range(len(one.captions))]

    def image(number: int) -> dict[str, Any]:
        return {"id": samples[number].id, "image": number}

    def caption(number: int) -> dict[str, Any]:
        owner, place = said[number]
        return {**image(owner), "caption": place, "text": samples[owner].captions[place]}

    for query, rank, top in _rows(t2i, image):
        yield {"way": "t2i", **caption(query), "rank": rank, "top": top}
    for query, rank, top in _rows(i2t, caption):
        yield {"way": "i2t", **image(query), "rank": rank if samples[query].captions else None, "top": top}


def _rows(of: Ranking, named: Any) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    columns = (of.queries, of.rank, of.candidates, of.scores, of.relevant)
    for query, rank, candidates, scores, relevant in zip(*(column.tolist() for column in columns), strict=True):
        found = zip(candidates, scores, relevant, strict=True)
        top = [
            {**named(candidate), "score": round(score, 6), "right": right, "reranked": place < of.reranked}
            for place, (candidate, score, right) in enumerate(found)
        ]
        yield query, rank + 1, top
