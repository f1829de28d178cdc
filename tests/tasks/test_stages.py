"""Candidates, the union of pairs and re-ranking, on a system whose every score is planted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.tasks.test_recall import slow_rank
from vlscale.config import Data
from vlscale.errors import UserError
from vlscale.systems.protocol import ImageStates, TextStates
from vlscale.tasks import stages
from vlscale.tasks.features import ImageStore, Precision, TextStore

CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32)


@dataclass
class Planted:
    """Image i and text t are known by the number in their tokens; both scores are looked up."""

    sims: Tensor
    """[I, T]."""
    odds: Tensor
    """[I, T]: the ITM logit of class 1; class 0 is its negative."""
    has_first_stage: bool = True
    scored: list[tuple[int, int]] | None = None

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        return image.pooled @ text.pooled.T if self.has_first_stage else None

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        assert len(image.tokens) == 1
        pairs = [(int(image.tokens[0, 0, 0]), int(t)) for t in text.tokens[:, 0, 0]]
        if self.scored is not None:
            self.scored += pairs
        # Padding is zero and masked, words are not.
        assert torch.equal(text.mask.bool(), (text.tokens[..., 1] == 1))
        return torch.tensor([[[self.odds[i, t]]] for i, t in pairs])

    def match_logits(self, states: Tensor) -> Tensor:
        return torch.cat([-states[:, 0], states[:, 0]], dim=1)

    def stores(self) -> tuple[ImageStore, TextStore]:
        """Features whose products are the planted similarities; captions of one to four tokens."""
        count, captions = self.sims.shape
        numbers = torch.arange(count).float()[:, None]
        one = torch.ones(count, dtype=torch.int64)
        images = ImageStore(torch.eye(count), numbers, one, list(range(count)), skipped=[])
        length = torch.arange(captions) % 4 + 1
        tokens = torch.arange(captions).repeat_interleave(length)[:, None]
        texts = TextStore(
            self.sims.T.contiguous(),
            torch.cat([tokens, torch.ones_like(tokens)], dim=1).float(),
            length.cumsum(0) - length,
            length,
        )
        return images, texts


def plant(levels: int, has_first_stage: bool = True) -> tuple[Planted, Tensor]:
    generator = torch.Generator().manual_seed(levels)
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 6, 6])
    sims = torch.randint(0, levels, (7, 13), generator=generator).float()
    odds = torch.randint(-levels, levels, (7, 13), generator=generator).float()
    return Planted(sims, odds, has_first_stage, scored=[]), image_of_text


def run(system: Planted, image_of_text: Tensor, k: int) -> tuple[tuple[stages.Direction, stages.Direction], Tensor]:
    """Both directions and the ITM odds of every pair that was scored, NaN elsewhere."""
    images, texts = system.stores()
    found = stages.first_stage(system, images, texts, image_of_text, k, FP32)
    directions = found or stages.every_pair(image_of_text, len(images.pooled))
    again = ([], Data(), None, 4)
    pairs = stages.score_pairs(system, images, texts, directions, FP32, again, lambda *_: None)
    odds = torch.full(system.odds.shape, math.nan)
    odds[pairs.keys // pairs.captions, pairs.keys % pairs.captions] = pairs.logits[:, 1]
    for direction in directions:
        image, text = torch.broadcast_tensors(*direction.pairs())
        assert torch.equal(pairs.of(image, text)[..., 1], system.odds[image, text])
    return directions, odds


def slow_rerank(sims: list[float], odds: list[float], relevant: list[bool], chosen: list[int]) -> int:
    """Re-ranked candidates by their odds, the others below in the order of the first stage."""
    if any(relevant[index] for index in chosen):
        return slow_rank([odds[i] for i in chosen], [relevant[i] for i in chosen])
    return slow_rank(sims, relevant)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("k", [0, 1, 4, 13])
def test_both_stages(levels: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SCORES_AT_ONCE", 30)
    monkeypatch.setattr(stages, "PAIRS_AT_ONCE", 3)
    system, image_of_text = plant(levels)
    (t2i, i2t), odds = run(system, image_of_text, k)
    relevant = image_of_text[None, :] == torch.arange(7)[:, None]  # [I, T]
    wanted = set()
    for direction, sims, right, planted in (
        (i2t, system.sims, relevant, system.odds),
        (t2i, system.sims.T, relevant.T, system.odds.T),
    ):
        sums = planted + sims
        candidates = direction.candidates[:, : direction.reranked]
        reranked = stages.second_stage(direction, planted.gather(1, candidates))
        summed = stages.second_stage(direction, sums.gather(1, candidates))
        for query in range(len(sims)):
            row, truth = sims[query].tolist(), right[query].tolist()
            named = direction.candidates[query].tolist()
            assert len(named) == min(max(k, stages.SHOWN), len(row))
            assert [row[i] for i in named] == sorted(row, reverse=True)[: len(named)]
            chosen = named[:k]
            assert len(chosen) == direction.reranked == min(k, len(row))
            assert direction.similarity[query].tolist() == [row[i] for i in named]
            assert direction.rank[query] == slow_rank(row, truth)
            assert reranked[query] == slow_rerank(row, planted[query].tolist(), truth, chosen)
            assert summed[query] == slow_rerank(row, sums[query].tolist(), truth, chosen)
            wanted |= {(i, query) if direction is t2i else (query, i) for i in chosen}
    assert system.scored is not None
    assert sorted(system.scored) == sorted(wanted), "every pair that either direction asked for, once"
    assert torch.equal(odds[~odds.isnan()], system.odds[~odds.isnan()])


def test_without_first_stage_every_pair_is_scored() -> None:
    system, image_of_text = plant(1000, has_first_stage=False)
    (t2i, i2t), odds = run(system, image_of_text, 2)
    assert torch.equal(odds, system.odds)
    relevant = image_of_text[None, :] == torch.arange(7)[:, None]
    for direction, planted, right in ((i2t, system.odds, relevant), (t2i, system.odds.T, relevant.T)):
        found = stages.second_stage(direction, planted)
        expected = [slow_rank(p, r) for p, r in zip(planted.tolist(), right.tolist(), strict=True)]
        assert found.tolist() == expected


@pytest.mark.parametrize("where", ["sims", "odds"])
def test_scores_that_are_not_finite_are_an_error(where: str) -> None:
    system, image_of_text = plant(3)
    getattr(system, where).fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        run(system, image_of_text, 4)
