"""The two stages of retrieval: similarities of pooled features choose candidates, ITM scores the chosen pairs.

Ranks share the work: the queries of the first stage, and for the second one each the images that it encoded. Then all
of them know all scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.config import Data
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.systems.protocol import ImageStates, System, TextStates
from vlscale.tasks.features import (
    ImageStore,
    OnProgress,
    Precision,
    TextStore,
    image_states,
    pooled_only,
    without_padding,
)
from vlscale.tasks.recall import ranks

Again = tuple[list[Sample], Data, TextTokenizer, int]
"""Samples, data section, tokenizer and batch size."""

SCORES_AT_ONCE = 1 << 20
"""Entries of the similarity matrix that exist at a time: 4 MB in fp32, which stay in a CPU's cache."""

PAIRS_AT_ONCE = 128
"""Image-text pairs in one fusion pass."""

SHOWN = 10
"""Candidates of every query that are named in the end, re-ranked or not."""


class Subset(NamedTuple):
    """Some of the images and their captions, as a retrieval of its own."""

    images: Tensor
    """[I'] int64, ascending numbers among all."""
    texts: Tensor
    """[T'] int64, likewise."""


@dataclass(slots=True)
class Direction:
    """First stage of one direction with Q queries and C candidates."""

    queries: Tensor
    """[Q] int64: their numbers among all."""
    of_texts: bool
    """Whether captions ask for images."""
    rank: Tensor
    """[Q] int64."""
    candidates: Tensor
    """[Q, k] int64: the numbers of the k candidates of the highest similarity, best first."""
    similarity: Tensor
    """[Q, k] float32: theirs."""
    relevant: Tensor
    """[Q, k] bool: whether they are right."""
    reranked: int
    """The first so many of the k candidates are scored by ITM; the others are there to be named."""
    every: bool = False
    """Whether all pairs are scored."""

    @classmethod
    def empty(cls, queries: Tensor, of_texts: bool, k: int, reranked: int) -> Direction:
        """Room for all queries, taken at once: chunks of results between those of scores would scatter the memory."""
        count = len(queries)
        return cls(
            queries,
            of_texts,
            torch.empty(count, dtype=torch.int64),
            torch.empty(count, k, dtype=torch.int64),
            torch.empty(count, k),
            torch.empty(count, k, dtype=torch.bool),
            reranked,
        )

    def fill(self, rows: slice, scores: Tensor, relevant: Tensor, numbers: Tensor) -> None:
        """Take in the queries `rows`: scores [q, C] float32, relevant [q, C] bool, numbers [C] of the candidates.

        Raises:
            UserError: a score is not finite.
        """
        # The sum is finite exactly when all terms are, and takes no memory.
        if not scores.sum().isfinite():
            raise UserError("the checkpoint's similarities are not finite: it diverged, evaluate an earlier one")
        similarity, candidates = scores.topk(self.candidates.shape[1], dim=1)
        self.rank[rows] = ranks(scores, relevant).cpu()
        self.candidates[rows] = numbers[candidates].cpu()
        self.similarity[rows] = similarity.cpu()
        self.relevant[rows] = relevant.gather(1, candidates).cpu()

    def of_all_ranks(self) -> Direction:
        """Every rank's queries."""
        gather = distributed.gather_rows
        return replace(
            self,
            queries=gather(self.queries),
            rank=gather(self.rank),
            candidates=gather(self.candidates),
            similarity=gather(self.similarity),
            relevant=gather(self.relevant),
        )

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Numbers of image and text, broadcasting to [Q, reranked], of the pairs that ITM scores."""
        queries, candidates = self.queries[:, None], self.candidates[:, : self.reranked]
        return (candidates, queries) if self.of_texts else (queries, candidates)


def first_stage(
    system: System,
    images: ImageStore,
    texts: TextStore,
    image_of_text: Tensor,
    k: int,
    precision: Precision,
    subset: Subset | None = None,
) -> tuple[Direction, Direction] | None:
    """(text to image, image to text), or None where the system has no first stage. Collective.

    Args:
        image_of_text: [T] int64, the image of every caption.
        k: candidates to re-rank; fewer where there are fewer.
        subset: only these ask and are found; default all.

    Raises:
        UserError: a similarity is not finite.
    """
    device = precision.device
    of_image, of_text = subset or Subset(torch.arange(len(images.pooled)), torch.arange(len(texts.pooled)))
    all_images = cast(ImageStates, pooled_only(images.pooled[of_image].to(device), ImageStates))
    all_texts = cast(TextStates, pooled_only(texts.pooled[of_text].to(device), TextStates))
    count, captions = len(of_image), len(of_text)

    def block(rows_i: slice, rows_t: slice) -> Tensor | None:
        image = ImageStates(*(field[rows_i] for field in all_images))
        return system.similarity(image, TextStates(*(field[rows_t] for field in all_texts)))

    if block(slice(0, 1), slice(0, 1)) is None:
        return None
    owner, numbers, text_numbers = image_of_text[of_text].to(device), of_image.to(device), of_text.to(device)
    own_texts, own_images = distributed.share(captions), distributed.share(count)
    t2i = _room(of_text[own_texts.start : own_texts.stop], True, k, count)
    i2t = _room(of_image[own_images.start : own_images.stop], False, k, captions)
    for own, rows in _slices(own_texts, count):
        scores = cast(Tensor, block(slice(None), rows)).T
        t2i.fill(own, scores.float(), owner[rows, None] == numbers, numbers)
    for own, rows in _slices(own_images, captions):
        scores = cast(Tensor, block(rows, slice(None)))
        i2t.fill(own, scores.float(), numbers[rows, None] == owner, text_numbers)
    return t2i.of_all_ranks(), i2t.of_all_ranks()


def every_pair(image_of_text: Tensor, count: int, subset: Subset | None = None) -> tuple[Direction, Direction]:
    """Both directions of a system without a first stage: everything is a candidate, every rank a miss so far."""
    of_image, of_text = subset or Subset(torch.arange(count), torch.arange(len(image_of_text)))
    images, texts = len(of_image), len(of_text)
    zero = torch.zeros(1, 1)
    right = image_of_text[of_text][:, None] == of_image  # [T, I]
    t2i = Direction(
        of_text,
        True,
        torch.full((texts,), images),
        of_image.expand(texts, images),
        zero.expand(texts, images),
        right,
        images,
        every=True,
    )
    i2t = Direction(
        of_image,
        False,
        torch.full((images,), texts),
        of_text.expand(images, texts),
        zero.expand(images, texts),
        right.T,
        texts,
        every=True,
    )
    return t2i, i2t


@dataclass(slots=True)
class PairScores:
    """ITM logits of the pairs that any direction asked for, each computed once."""

    keys: Tensor
    """[P] int64, ascending: image · captions + caption."""
    logits: Tensor
    """[P, 2] float32; class 1 = match."""
    captions: int

    def of(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [..., 2] of the pairs (image, text), which must be among those scored."""
        return self.logits[torch.searchsorted(self.keys, image * self.captions + text)]


@torch.no_grad()
def score_pairs(
    system: System,
    images: ImageStore,
    texts: TextStore,
    directions: Sequence[Direction],
    precision: Precision,
    again: Again,
    on_progress: OnProgress,
) -> PairScores:
    """ITM over the union of all directions' candidates, image by image, so that an image is read once. Collective.

    Args:
        again: to encode the images anew where their tokens were not kept.

    Raises:
        UserError: a logit is not finite.
    """
    captions, own = len(texts.pooled), images.own
    keys = _asked_of(own, directions, captions)
    wanted = torch.bincount(keys // captions - own.start, minlength=len(own)).tolist()
    logits = torch.empty(len(keys), 2)
    done = 0
    for image, count in zip(_each_image(system, images, precision, again), wanted, strict=True):
        rows = slice(done, done + count)
        if count:
            logits[rows] = _score_image(system, image, texts, keys[rows] % captions, precision)
        done += count
        on_progress("every pair" if directions[0].every else "re-ranking", done, len(keys))
    if not logits.isfinite().all():
        raise UserError("the checkpoint's ITM logits are not finite: it diverged, evaluate an earlier one")
    # Ranks hold images one after another, so their keys stay in order.
    return PairScores(distributed.gather_rows(keys), distributed.gather_rows(logits), captions)


def _asked_of(own: range, directions: Sequence[Direction], captions: int) -> Tensor:
    """Keys [p] int64, ascending, of the pairs of these images that any direction asks for."""
    if directions[0].every:
        return torch.arange(own.start * captions, own.stop * captions)
    keys = [torch.empty(0, dtype=torch.int64)]
    for direction in directions:
        asked = torch.broadcast_tensors(*direction.pairs())
        mine = (asked[0] >= own.start) & (asked[0] < own.stop)
        keys.append(asked[0][mine] * captions + asked[1][mine])
    return torch.cat(keys).unique()


def second_stage(direction: Direction, scores: Tensor) -> Tensor:
    """Ranks [Q] after re-ranking by `scores` [Q, k].

    What was not re-ranked stands below, in the order of the first stage: a query whose right answers are all there
    keeps its rank.
    """
    if not scores.shape[1]:
        return direction.rank
    relevant = direction.relevant[:, : direction.reranked]
    return torch.where(relevant.any(dim=1), ranks(scores, relevant), direction.rank)


def _score_image(system: System, image: ImageStates, texts: TextStore, index: Tensor, precision: Precision) -> Tensor:
    """ITM logits [b, 2] of one image with captions `index` [b]; similar lengths share a pass."""
    device = precision.device
    logits = torch.empty(len(index), 2, device=device)  # copied once per image: the host runs ahead meanwhile
    for chunk in torch.argsort(texts.length[index], stable=True).split(PAIRS_AT_ONCE):
        text = texts.states(index[chunk], device)
        with precision.autocast():
            states = system.fuse(text, image)
        logits[chunk.to(device)] = system.match_logits(states.float()).float()
    return logits.cpu()


def _each_image(system: System, images: ImageStore, precision: Precision, again: Again) -> Iterator[ImageStates]:
    if images.tokens is not None:
        for index in images.own:
            yield images.states(index, precision.device)
        return
    samples, data, tokenizer, batch_size = again
    own = samples[images.own.start : images.own.stop]
    for _, states in image_states(system, own, data, tokenizer, precision, batch_size):
        for row in range(len(states.pooled)):
            yield without_padding(states, row)


def _room(queries: Tensor, of_texts: bool, k: int, candidates: int) -> Direction:
    return Direction.empty(queries, of_texts, min(max(k, SHOWN), candidates), min(k, candidates))


def _slices(queries: range, candidates: int) -> Iterator[tuple[slice, slice]]:
    """A few queries at a time: their places among this rank's, and among all."""
    step = max(1, SCORES_AT_ONCE // candidates)
    for start in range(queries.start, queries.stop, step):
        stop = min(start + step, queries.stop)
        yield slice(start - queries.start, stop - queries.start), slice(start, stop)
