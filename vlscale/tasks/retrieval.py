"""Zero-shot image-text retrieval (systems.md, section 6): first stage, ITM re-ranking, recalls and the protocol card.

`t2i_r1` … `rsum` are after re-ranking by ITM as in ALBEF's release; `itc_*` is the first stage alone (uni-modal
retrieval); `sum_*` re-ranks by ITM and first stage together. Where a system has no first stage every pair is scored by
ITM. All ranks share the work, and all of them know the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from vlscale import distributed
from vlscale.config import Recipe
from vlscale.data.captions import CaptionEncoder
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop.run import load_run, run_samples
from vlscale.systems.protocol import System
from vlscale.tasks.card import first_images, max_tokens, origin, resolution, split_hash
from vlscale.tasks.features import OnMessage, OnProgress, Precision, encode_images, encode_texts
from vlscale.tasks.folds import fold_size, mean_of, subsets
from vlscale.tasks.forecast import Size, forecast
from vlscale.tasks.rankings import Ranking, predictions, ranking
from vlscale.tasks.recall import CUTOFFS, both_ways, chance
from vlscale.tasks.results import check_result_path, write_result
from vlscale.tasks.stages import Direction, PairScores, Subset, every_pair, first_stage, score_pairs, second_stage

Both = tuple[Direction, Direction]
"""Captions ask for images, images for captions."""
Scores = tuple[Tensor, Tensor]
"""Of the pairs of both directions."""

SCORES = {
    "itc": "first stage: system.similarity of the pooled features (cosine over the learned temperature)",
    "sum": "re-ranked: log odds of a match (ITM logit of class 1 minus class 0) plus the first-stage similarity",
}
ITM_SCORES = {
    "logit": "ITM logit of class 1 (match)",
    "odds": "log odds of a match (ITM logit of class 1 minus class 0)",
}
"""What `eval.itm_score` means; the first is what ALBEF's release ranks by."""
TIES = "a wrong candidate with the same score as the best right one ranks above it"


class Retrieval(NamedTuple):
    """What was written, and what of."""

    path: Path
    """The result file."""
    predictions: Path
    """A line of JSON per query."""
    samples: list[Sample]
    """A prediction's `image` is the number of one of these."""


@dataclass(slots=True)
class RetrievalResult:
    """Recalls in per cent and everything that a reader needs to compare them; the same on every rank."""

    metrics: dict[str, float]
    protocol: dict[str, Any]
    folds: dict[str, Any] | None
    """Of smaller retrievals in consecutive parts of the images: the mean of their metrics, and each one's."""
    rankings: tuple[Ranking, Ranking]
    """What captions found, and what images found."""
    samples: list[Sample]
    """The images that could be read."""


def run_retrieval(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    rerank: int | None = None,
    folds: str | None = None,
    first: int | None = None,
    out: Path | None = None,
    image_root: str | None = None,
    on_progress: OnProgress | None = None,
    on_message: OnMessage | None = None,
) -> Retrieval:
    """Evaluate a run; rank 0 writes its result file and, beside it, a line of JSON per query. Every rank calls this.

    Args:
        source: run folder (newest complete checkpoint) or checkpoint folder.
        data: jsonl file or folder of data; default the run's own.
        rerank: candidates per query for ITM; default `eval.rerank` of the recipe, 0 stops after the first stage.
        folds: images of a fold, such as `1k`: the same again within each so many consecutive images.
        first: evaluate only so many images, from the start of the split, with all their captions; default all.
        out: result file; default `eval/retrieval.json` in the run folder.
        on_message: called once, before the work, with its size and an estimate of the time.

    Raises:
        UserError: no such run, data or split, not so many images, or the checkpoint gives non-finite scores.
    """
    check_result_path(out)
    run = load_run(source)
    with distributed.main_process_first():  # the data may have to be rendered
        split_name, samples = run_samples(run, data, split, image_root)
    result = evaluate_retrieval(
        cast(System, run.system),
        samples,
        run.recipe,
        run.tokenizer,
        rerank=run.recipe.eval.rerank if rerank is None else rerank,
        folds=folds,
        first=first,
        batch_size=run.recipe.eval.batch_size,
        device=run.device,
        on_progress=on_progress,
        on_message=on_message,
    )
    path = out or run.folder / "eval" / "retrieval.json"
    if distributed.rank() == 0:
        card = origin(run, data, split_name) | result.protocol
        content: dict[str, Any] = {"task": "retrieval", "metrics": result.metrics, "protocol": card}
        if result.folds is not None:
            content["folds"] = result.folds
        write_result(path, content, predictions(*result.rankings, result.samples))
    return Retrieval(path, path.with_suffix(".predictions.jsonl"), result.samples)


def evaluate_retrieval(
    system: System,
    samples: list[Sample],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    *,
    rerank: int,
    batch_size: int,
    device: torch.device | str,
    folds: str | None = None,
    first: int | None = None,
    on_progress: OnProgress | None = None,
    on_message: OnMessage | None = None,
) -> RetrievalResult:
    """Retrieval both ways over all images of `samples`, or the first ones, and all of their captions.

    Collective: every rank gives the same samples, does its share and gets the same result.

    Args:
        system: in evaluation mode, on `device`.
        rerank: candidates per query for ITM.
        folds: see `run_retrieval`.
        first: number of images, from the start; default all.

    Raises:
        UserError: nothing to retrieve, a negative `rerank`, a `first` or `folds` that is not there, or non-finite
            scores.
    """
    if rerank < 0:
        raise UserError(f"--rerank {rerank}: expected the number of candidates, 0 or more")
    progress = on_progress or (lambda stage, done, total: None)
    precision = Precision.of(torch.device(device), cast(nn.Module, system))
    asked, samples = first_images(samples, first)
    total, fold = len(samples), fold_size(folds, len(samples))
    given, _ = _captions(samples)
    if on_message is not None:
        size = Size(len(samples), len(given), rerank, fold)
        on_message(forecast(system, samples, size, recipe.data, tokenizer, precision, batch_size))
    images = encode_images(system, samples, recipe.data, tokenizer, precision, batch_size, progress)
    samples = [samples[index] for index in images.kept]
    captions, image_of_text = _captions(samples)
    texts = encode_texts(system, captions, CaptionEncoder(recipe.data, tokenizer), precision, batch_size, progress)

    def stage(subset: Subset | None) -> Both:
        found = first_stage(system, images, texts, image_of_text, rerank, precision, subset)
        return found or every_pair(image_of_text, len(samples), subset)

    parts = [] if fold is None else subsets(images.kept, image_of_text, fold, total)
    with torch.no_grad():
        whole, *smaller = (stage(subset) for subset in (None, *parts))
    again = (samples, recipe.data, tokenizer, batch_size)
    asking = [direction for both in (whole, *smaller) for direction in both]
    pairs = score_pairs(system, images, texts, asking, precision, again, progress)
    itm_score = recipe.eval.itm_score
    card = _card(samples, image_of_text, recipe, rerank, precision) | asked | {"unreadable_images": images.skipped}
    if whole[0].every:
        itm = f"{ITM_SCORES[itm_score]}, every pair scored"
        card |= {"rerank": "every pair", "pairs": len(pairs.keys), "scores": {"itm": itm}}
    logits = _logits(whole, pairs)
    t2i, i2t = map(ranking, whole, _itm_scores(logits, itm_score))
    each = [_metrics(both, _logits(both, pairs), itm_score) for both in smaller]
    levels = [chance(_captions_of(image_of_text, part.images)) for part in parts]
    of_folds = None if fold is None else mean_of(fold, each, levels)
    return RetrievalResult(_metrics(whole, logits, itm_score), card, of_folds, (t2i, i2t), samples)


def retrieval_table(path: Path) -> Table:
    """The result file as a table for the terminal: one row per score, recalls in per cent."""
    result = json.loads(path.read_text(encoding="utf-8"))
    card, folds = result["protocol"], result.get("folds")
    first = f" (the first {card['first']} of {card['split_images']})" if "first" in card else ""
    scored = f"all {card['pairs']:,} pairs scored" if "pairs" in card else f"k {card['rerank']}"
    caption = f"{card['images']} images{first}, {card['captions']} captions, split {card.get('split', '?')}, {scored}; "
    table = Table(title="Retrieval, recall in %", caption=caption + _learned(card))
    table.add_column("score")
    for way in ("text → image", "image → text"):
        for k in CUTOFFS:
            table.add_column(f"{way}\nR@{k}", justify="right")
    table.add_column("RSUM", justify="right")
    _add_rows(table, result["metrics"], card, card["chance"])
    if folds is not None:
        table.add_section()
        table.add_row(f"mean of {folds['count']} folds of {folds['images']:,} images")
        _add_rows(table, folds["metrics"], card, folds["chance"])
    return table


def _add_rows(table: Table, metrics: dict[str, float], card: dict[str, Any], level: dict[str, float]) -> None:
    """What was reached by every score, and by guessing; without re-ranking all scores are the first one."""
    itm = "ITM" if "pairs" in card else "re-ranked by ITM"
    rows = [("first stage (uni-modal)", "itc_"), (itm, ""), ("ITM + first stage", "sum_")]
    for name, prefix in rows[:1] if card["rerank"] == 0 else rows:
        if f"{prefix}rsum" in metrics:
            table.add_row(name, *_row(metrics, prefix))
    table.add_row("chance", *_row(level, ""), style="dim")


def _learned(card: dict[str, Any]) -> str:
    """What the checkpoint was tuned on: retrieval from a pre-trained one and from one tuned on other data are different
    protocols, both called zero-shot."""
    tuned = card.get("tuned_on")
    if not tuned:
        return "a pre-trained checkpoint, not tuned"
    return escape(f"tuned for {tuned['task']} on {tuned['data']}")


def _row(metrics: dict[str, float], prefix: str) -> list[str]:
    names = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in CUTOFFS]
    return [f"{metrics[prefix + name]:.1f}" for name in [*names, "rsum"]]


def _metrics(directions: Both, logits: Scores, itm_score: str) -> dict[str, float]:
    t2i, i2t = directions
    metrics = _both(directions, _itm_scores(logits, itm_score), "")
    if not t2i.every:
        odds = _itm_scores(logits, "odds")
        first = [one.similarity[:, : one.reranked] for one in directions]
        metrics |= both_ways(t2i.rank, i2t.rank, "itc_")
        metrics |= _both(directions, (odds[0] + first[0], odds[1] + first[1]), "sum_")
    return metrics


def _logits(directions: Both, pairs: PairScores) -> Scores:
    """[Q, reranked, 2] of each direction."""
    t2i, i2t = directions
    return pairs.of(*t2i.pairs()), pairs.of(*i2t.pairs())


def _itm_scores(logits: Scores, itm_score: str) -> Scores:
    """[Q, reranked] of each direction: the logit of class 1, or the odds of a match."""
    t2i, i2t = logits
    if itm_score == "odds":
        return t2i[..., 1] - t2i[..., 0], i2t[..., 1] - i2t[..., 0]
    return t2i[..., 1], i2t[..., 1]


def _both(directions: Both, scores: Scores, prefix: str) -> dict[str, float]:
    return both_ways(second_stage(directions[0], scores[0]), second_stage(directions[1], scores[1]), prefix)


def _captions(samples: Sequence[Sample]) -> tuple[list[str], Tensor]:
    """All captions and the image of each, [T] int64."""
    captions = [caption for sample in samples for caption in sample.captions]
    if not captions:
        raise UserError("retrieval needs captions, and the images of this split have none")
    owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
    return captions, torch.tensor(owners)


def _captions_of(image_of_text: Tensor, images: Tensor) -> Tensor:
    """[I'] int64: how many captions each of these images has."""
    return torch.bincount(image_of_text, minlength=int(images.max()) + 1)[images]


def _card(
    samples: list[Sample], image_of_text: Tensor, recipe: Recipe, rerank: int, precision: Precision
) -> dict[str, Any]:
    per_image = torch.bincount(image_of_text, minlength=len(samples))
    itm = ITM_SCORES[recipe.eval.itm_score]
    return {
        "resolution": resolution(recipe.data),
        "images": len(samples),
        "captions": len(image_of_text),
        "split_hash": split_hash(samples),
        "rerank": rerank,
        "scores": SCORES | {"itm": f"re-ranked: {itm}; what was not re-ranked stays below, in first-stage order"},
        "ties": TIES,
        "chance": chance(per_image),
        "precision": str(precision),
        "max_tokens": max_tokens(recipe.data),
        "seed": recipe.train.seed,
    }
