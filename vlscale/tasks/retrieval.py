"""Zero-shot image-text retrieval (systems.md, section 6): first stage, ITM re-ranking, recalls and the protocol card.

`t2i_r1` … `rsum` are after re-ranking by ITM as in ALBEF's release; `itc_*` is the first stage alone; `sum_*` re-ranks
by ITM and first stage together. Where a system has no first stage every pair is scored by ITM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor

from vlscale.config import Recipe
from vlscale.data.captions import CaptionEncoder
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop.layout import write_json
from vlscale.interop.run import load_run, run_samples
from vlscale.systems.protocol import System
from vlscale.tasks.card import first_images, max_tokens, origin, resolution, split_hash
from vlscale.tasks.features import OnMessage, OnProgress, Precision, encode_images, encode_texts
from vlscale.tasks.recall import CUTOFFS, both_ways, chance
from vlscale.tasks.stages import (
    Direction,
    PairScores,
    every_pair,
    first_stage,
    score_pairs,
    second_stage,
    with_estimate,
)

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


@dataclass(slots=True)
class RetrievalResult:
    """Recalls in per cent and everything that a reader needs to compare them."""

    metrics: dict[str, float]
    protocol: dict[str, Any]


def run_retrieval(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    rerank: int | None = None,
    first: int | None = None,
    out: Path | None = None,
    image_root: str | None = None,
    on_progress: OnProgress | None = None,
    on_message: OnMessage | None = None,
) -> Path:
    """Evaluate a run and write its result file.

    Args:
        source: run folder (newest complete checkpoint) or checkpoint folder.
        data: jsonl file or folder of data; default the run's own.
        rerank: candidates per query for ITM; default `eval.rerank` of the recipe, 0 stops after the first stage.
        first: evaluate only so many images, from the start of the split, with all their captions; default all.
        out: result file; default `eval/retrieval.json` in the run folder.
        on_message: called once with an estimate of the time, where every pair is scored.

    Returns:
        The file that was written.

    Raises:
        UserError: no such run, data or split, not so many images, or the checkpoint gives non-finite scores.
    """
    run = load_run(source)
    split_name, samples = run_samples(run, data, split, image_root)
    result = evaluate_retrieval(
        cast(System, run.system),
        samples,
        run.recipe,
        run.tokenizer,
        rerank=run.recipe.eval.rerank if rerank is None else rerank,
        first=first,
        batch_size=run.recipe.eval.batch_size,
        device=run.device,
        on_progress=on_progress,
        on_message=on_message,
    )
    result.protocol = origin(run, data, split_name) | result.protocol
    path = out or run.folder / "eval" / "retrieval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"task": "retrieval", "metrics": result.metrics, "protocol": result.protocol})
    return path


def evaluate_retrieval(
    system: System,
    samples: list[Sample],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    *,
    rerank: int,
    batch_size: int,
    device: torch.device | str,
    first: int | None = None,
    on_progress: OnProgress | None = None,
    on_message: OnMessage | None = None,
) -> RetrievalResult:
    """Retrieval both ways over all images of `samples`, or the first ones, and all of their captions.

    Args:
        system: in evaluation mode, on `device`.
        rerank: candidates per query for ITM.
        first: number of images, from the start; default all.

    Raises:
        UserError: nothing to retrieve, a negative `rerank`, a `first` that is not there, or non-finite scores.
    """
    if rerank < 0:
        raise UserError(f"--rerank {rerank}: expected the number of candidates, 0 or more")
    progress = on_progress or (lambda stage, done, total: None)
    precision = Precision.of(torch.device(device))
    asked, samples = first_images(samples, first)
    images = encode_images(system, samples, recipe.data, tokenizer, precision, batch_size, progress)
    samples = [samples[index] for index in images.kept]
    captions, image_of_text = _captions(samples)
    texts = encode_texts(system, captions, CaptionEncoder(recipe.data, tokenizer), precision, batch_size, progress)
    with torch.inference_mode():
        stage = first_stage(system, images, texts, image_of_text, rerank, precision)
    directions = stage or every_pair(image_of_text, len(samples))
    again = (samples, recipe.data, tokenizer, batch_size)
    if stage is None:
        progress = with_estimate(progress, on_message or (lambda line: None))
    pairs = score_pairs(system, images, texts, directions, precision, again, progress)
    metrics = _metrics(directions, pairs, recipe.eval.itm_score, has_first_stage=stage is not None)
    card = _card(samples, image_of_text, recipe, rerank, precision) | asked | {"unreadable_images": images.skipped}
    if stage is None:
        itm = f"{ITM_SCORES[recipe.eval.itm_score]}, every pair scored"
        card |= {"rerank": "every pair", "pairs": len(pairs.keys), "scores": {"itm": itm}}
    return RetrievalResult(metrics, card)


def retrieval_table(path: Path) -> Table:
    """The result file as a table for the terminal: one row per score, recalls in per cent."""
    result = json.loads(path.read_text(encoding="utf-8"))
    metrics, card = result["metrics"], result["protocol"]
    first = f" (the first {card['first']} of {card['split_images']})" if "first" in card else ""
    scored = f"all {card['pairs']:,} pairs scored" if "pairs" in card else f"k {card['rerank']}"
    split = card.get("split", "?")
    caption = f"{card['images']} images{first}, {card['captions']} captions, split {split}, {scored}"
    table = Table(title="Retrieval, recall in %", caption=caption)
    table.add_column("score")
    for way in ("text → image", "image → text"):
        for k in CUTOFFS:
            table.add_column(f"{way}\nR@{k}", justify="right")
    table.add_column("RSUM", justify="right")
    itm = "ITM" if "pairs" in card else "re-ranked by ITM"
    rows = [("first stage", "itc_"), (itm, ""), ("ITM + first stage", "sum_")]
    for name, prefix in rows:
        if f"{prefix}rsum" in metrics:
            table.add_row(name, *_row(metrics, prefix))
    table.add_row("chance", *_row(card["chance"], ""), style="dim")
    return table


def _row(metrics: dict[str, float], prefix: str) -> list[str]:
    names = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in CUTOFFS]
    return [f"{metrics[prefix + name]:.1f}" for name in [*names, "rsum"]]


def _metrics(
    directions: tuple[Direction, Direction], pairs: PairScores, itm_score: str, has_first_stage: bool
) -> dict[str, float]:
    t2i, i2t = directions
    text, image = torch.arange(len(t2i.rank))[:, None], torch.arange(len(i2t.rank))[:, None]
    logits = pairs.of(t2i.candidates, text), pairs.of(image, i2t.candidates)  # [T, k, 2], [I, k, 2]
    odds = logits[0][..., 1] - logits[0][..., 0], logits[1][..., 1] - logits[1][..., 0]
    metrics = _both(directions, odds if itm_score == "odds" else (logits[0][..., 1], logits[1][..., 1]), "")
    if has_first_stage:
        metrics |= both_ways(t2i.rank, i2t.rank, "itc_")
        metrics |= _both(directions, (odds[0] + t2i.similarity, odds[1] + i2t.similarity), "sum_")
    return metrics


def _both(directions: tuple[Direction, Direction], scores: tuple[Tensor, Tensor], prefix: str) -> dict[str, float]:
    return both_ways(second_stage(directions[0], scores[0]), second_stage(directions[1], scores[1]), prefix)


def _captions(samples: list[Sample]) -> tuple[list[str], Tensor]:
    """All captions and the image of each, [T] int64."""
    captions = [caption for sample in samples for caption in sample.captions]
    if not captions:
        raise UserError("retrieval needs captions, and the images of this split have none")
    owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
    return captions, torch.tensor(owners)


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
