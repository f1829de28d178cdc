"""The two stages of retrieval: similarities of pooled features choose candidates, ITM scores the chosen pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vlscale.config import Data
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.systems.protocol import ImageStates, System, TextStates
from vlscale.tasks.features import (
    ImageStore,
    OnMessage,
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

ESTIMATE_SECONDS = 2.0
"""Of scoring that an estimate of its whole time rests on, at least."""


@dataclass(slots=True)
class Direction:
    """First stage of one direction with Q queries and C candidates."""

    rank: Tensor
    """[Q] int64."""
    candidates: Tensor
    """[Q, k] int64: the k candidates of the highest similarity."""
    similarity: Tensor
    """[Q, k] float32: theirs."""
    relevant: Tensor
    """[Q, k] bool: whether they are right."""

    @classmethod
    def empty(cls, queries: int, k: int) -> Direction:
        """Room for all queries, taken at once: chunks of results between those of scores would scatter the memory."""
        return cls(
            torch.empty(queries, dtype=torch.int64),
            torch.empty(queries, k, dtype=torch.int64),
            torch.empty(queries, k),
            torch.empty(queries, k, dtype=torch.bool),
        )

    def fill(self, rows: slice, scores: Tensor, relevant: Tensor) -> None:
        """Take in the queries `rows`: scores [q, C] float32, relevant [q, C] bool.

        Raises:
            UserError: a score is not finite.
        """
        # The sum is finite exactly when all terms are, and takes no memory.
        if not scores.sum().isfinite():
            raise UserError("the checkpoint's similarities are not finite: it diverged, evaluate an earlier one")
        similarity, candidates = scores.topk(self.candidates.shape[1], dim=1)
        self.rank[rows] = ranks(scores, relevant).cpu()
        self.candidates[rows] = candidates.cpu()
        self.similarity[rows] = similarity.cpu()
        self.relevant[rows] = relevant.gather(1, candidates).cpu()


def first_stage(
    system: System, images: ImageStore, texts: TextStore, image_of_text: Tensor, k: int, precision: Precision
) -> tuple[Direction, Direction] | None:
    """(text to image, image to text), or None where the system has no first stage.

    Args:
        image_of_text: [T] int64, the image of every caption.
        k: candidates to keep for re-ranking; fewer where there are fewer.

    Raises:
        UserError: a similarity is not finite.
    """
    device = precision.device
    all_images = cast(ImageStates, pooled_only(images.pooled.to(device), ImageStates))
    all_texts = cast(TextStates, pooled_only(texts.pooled.to(device), TextStates))
    count, captions = len(images.pooled), len(texts.pooled)
    image_of_text = image_of_text.to(device)

    def block(rows_i: slice, rows_t: slice) -> Tensor | None:
        image = ImageStates(*(field[rows_i] for field in all_images))
        return system.similarity(image, TextStates(*(field[rows_t] for field in all_texts)))

    if block(slice(0, 1), slice(0, 1)) is None:
        return None
    index = torch.arange(count, device=device)
    t2i, i2t = Direction.empty(captions, min(k, count)), Direction.empty(count, min(k, captions))
    for rows in _slices(captions, count):
        scores = cast(Tensor, block(slice(None), rows)).T
        t2i.fill(rows, scores.float(), image_of_text[rows, None] == index)
    for rows in _slices(count, captions):
        scores = cast(Tensor, block(rows, slice(None)))
        i2t.fill(rows, scores.float(), index[rows, None] == image_of_text)
    return t2i, i2t


def every_pair(image_of_text: Tensor, count: int) -> tuple[Direction, Direction]:
    """Both directions of a system without a first stage: everything is a candidate, every rank a miss so far."""
    captions = len(image_of_text)
    zero = torch.zeros(captions, count)
    right = image_of_text[:, None] == torch.arange(count)  # [T, I]
    t2i = Direction(torch.full((captions,), count), torch.arange(count).expand(captions, count), zero, right)
    i2t = Direction(torch.full((count,), captions), torch.arange(captions).expand(count, captions), zero.T, right.T)
    return t2i, i2t


@dataclass(slots=True)
class PairScores:
    """ITM logits of the pairs that either direction asked for, each computed once."""

    keys: Tensor
    """[P] int64, ascending: image · captions + caption."""
    logits: Tensor
    """[P, 2] float32; class 1 = match."""
    captions: int

    def of(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [..., 2] of the pairs (image, text), which must be among those scored."""
        return self.logits[torch.searchsorted(self.keys, image * self.captions + text)]


@torch.inference_mode()
def score_pairs(
    system: System,
    images: ImageStore,
    texts: TextStore,
    directions: tuple[Direction, Direction],
    precision: Precision,
    again: Again,
    on_progress: OnProgress,
) -> PairScores:
    """ITM over the union of both directions' candidates, image by image, so that an image is read once.

    Args:
        again: to encode the images anew where their tokens were not kept.

    Raises:
        UserError: a logit is not finite.
    """
    t2i, i2t = directions
    captions = len(texts.pooled)
    asked_by_text = t2i.candidates * captions + torch.arange(captions)[:, None]
    asked_by_image = torch.arange(len(images.pooled))[:, None] * captions + i2t.candidates
    keys = torch.cat([asked_by_text.flatten(), asked_by_image.flatten()]).unique()
    wanted = torch.bincount(keys // captions, minlength=len(images.pooled)).tolist()
    logits = torch.empty(len(keys), 2)
    done = 0
    for image, count in zip(_each_image(system, images, precision, again), wanted, strict=True):
        rows = slice(done, done + count)
        if count:
            logits[rows] = _score_image(system, image, texts, keys[rows] % captions, precision)
        done += count
        on_progress("re-ranking", done, len(keys))
    if not logits.isfinite().all():
        raise UserError("the checkpoint's ITM logits are not finite: it diverged, evaluate an earlier one")
    return PairScores(keys, logits, captions)


def with_estimate(on_progress: OnProgress, on_message: OnMessage) -> OnProgress:
    """Reports for `score_pairs` where every pair is scored: says once, after the first images, how long it will take.

    The first image does not count (it also warms up), and the next ones must take `ESTIMATE_SECONDS`: what is over
    before needs no estimate.
    """
    began: tuple[float, int] | None = None
    said = False

    def report(_: str, done: int, total: int) -> None:
        nonlocal began, said
        on_progress("every pair", done, total)
        now = time.monotonic()
        if began is None:
            began = now, done
        elif not said and done < total and now - began[0] >= ESTIMATE_SECONDS:
            said = True
            rate = (done - began[1]) / max(now - began[0], 1e-9)
            left = _duration((total - done) / max(rate, 1e-9))
            on_message(
                f"no first stage: every pair is scored, {total:,} pairs at {rate:,.0f} pairs/s, about {left} to go "
                "(--first N evaluates fewer images)"
            )

    return report


def _duration(seconds: float) -> str:
    """`50 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def second_stage(direction: Direction, scores: Tensor) -> Tensor:
    """Ranks [Q] after re-ranking by `scores` [Q, k].

    What was not re-ranked stands below, in the order of the first stage: a query whose right answers are all there
    keeps its rank.
    """
    if not scores.shape[1]:
        return direction.rank
    reranked = ranks(scores, direction.relevant)
    return torch.where(direction.relevant.any(dim=1), reranked, direction.rank)


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
        for index in range(len(images.pooled)):
            yield images.states(index, precision.device)
        return
    samples, data, tokenizer, batch_size = again
    for _, states in image_states(system, samples, data, tokenizer, precision, batch_size):
        for row in range(len(states.pooled)):
            yield without_padding(states, row)


def _slices(queries: int, candidates: int) -> Iterator[slice]:
    step = max(1, SCORES_AT_ONCE // candidates)
    for start in range(0, queries, step):
        yield slice(start, start + step)
