"""Phrase grounding (MVPTR, section 4.2.3): which region of an image does a phrase mean?

A phrase is the mean of its tokens, read in its caption and beside the image; its region is that of the highest score.
Systems that see cells and no regions are asked by Grad-CAM over boxes (ALBEF, section 6.2).
Phrases and true boxes are the data's (Flickr30k Entities and what is like it).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.table import Table
from torch import nn

from vlscale.config import Data, Recipe
from vlscale.data.sample import Sample
from vlscale.data.spans import SpanEncoder
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop.layout import write_json, write_text
from vlscale.interop.run import load_run, run_samples
from vlscale.systems.gradcam import WordsOverCells
from vlscale.systems.protocol import System, offers
from vlscale.tasks import box_recall
from vlscale.tasks.box_recall import MIN_IOU, PROTOCOLS
from vlscale.tasks.cam_scores import SCORE, CamScores, box_grid
from vlscale.tasks.card import first_images, max_tokens, origin, resolution, split_hash
from vlscale.tasks.features import OnProgress, Precision
from vlscale.tasks.judged import BASELINES, Judged, Judgement
from vlscale.tasks.phrase_scores import Grounder, ScoresRegions, phrases_to_ask
from vlscale.tasks.recall import CUTOFFS

RULES = {
    "hit": f"IoU of {MIN_IOU} or more; pointing: the centre of the best region in the box",
    "any": "of several boxes one is enough",
    "merged": "several boxes become the smallest one around them",
    "ties": "a wrong region with the same score as the best right one ranks above it",
}


class Grounding(NamedTuple):
    """What was written, and what of."""

    path: Path
    """The result file."""
    predictions: Path
    """A line of JSON per phrase."""
    samples: list[Sample]
    """A prediction's `image` is the number of one of these."""


@dataclass(slots=True)
class GroundingResult:
    """Hits in per cent and everything that a reader needs to compare them."""

    judgement: Judgement
    protocol: dict[str, Any]


def run_grounding(
    source: str,
    *,
    zero_shot: bool,
    data: str | None = None,
    split: str | None = None,
    layer: int | None = None,
    concepts: bool = False,
    grid: bool = False,
    first: int | None = None,
    out: Path | None = None,
    image_root: str | None = None,
    on_progress: OnProgress | None = None,
) -> Grounding:
    """Evaluate a run; write its result file and, beside it, a line of JSON per phrase.

    Args:
        source: run folder (newest complete checkpoint) or checkpoint folder.
        zero_shot: take a run that was not tuned for grounding.
        data: annotations, shards, …; default the run's own.
        layer: whose states are compared; default the system's.
        concepts: phrase concepts that a phrase says count among its tokens.
        grid: with Grad-CAM, the candidates are a grid of boxes in place of the annotated ones.
        first: evaluate only so many images, from the start of the split; default all.
        out: result file; default `eval/grounding.json` in the run folder.

    Raises:
        UserError: no such run, data, split, images or layer; no phrases with boxes; an option that this system has no
            use for; or a checkpoint that gives non-finite scores.
    """
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise UserError(f"--out {out}: expected the name of a .json file")
    run = load_run(source)
    if not zero_shot and (run.recipe.task is None or run.recipe.task.name != "grounding"):
        raise UserError(
            f"--zero-shot is missing: {run.recipe.name} was not tuned for grounding; tune it with vlscale finetune "
            "grounding, or take it as it is with --zero-shot"
        )
    system_scoring(run.system, run.recipe)  # before the data is read
    split_name, samples = run_samples(run, data, split, image_root)
    asked, samples = first_images(samples, first)
    result = evaluate_grounding(
        run.system,
        samples,
        run.recipe,
        run.tokenizer,
        layer=layer,
        concepts=concepts,
        grid=grid,
        batch_size=run.recipe.eval.batch_size,
        device=run.device,
        on_progress=on_progress,
    )
    result.protocol = origin(run, data, split_name) | asked | result.protocol
    path = out or run.folder / "eval" / "grounding.json"
    return Grounding(path, _write(result, path), samples)


def system_scoring(system: nn.Module, recipe: Recipe) -> ScoresRegions:
    """The system, if it scores regions; by Grad-CAM, where its words attend to cells.

    Raises:
        UserError: it does neither.
    """
    if offers(system, ScoresRegions):
        return cast(ScoresRegions, system)
    if offers(system, WordsOverCells):
        return CamScores(cast(System, system))
    raise UserError(f"{recipe.name}: its system neither compares phrases with regions nor lets words attend to cells")


def evaluate_grounding(
    system: nn.Module,
    samples: list[Sample],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    *,
    batch_size: int,
    device: torch.device | str,
    layer: int | None = None,
    concepts: bool = False,
    grid: bool = False,
    on_progress: OnProgress | None = None,
) -> GroundingResult:
    """Ground every phrase that has boxes and a place in a caption.

    Args:
        system: in evaluation mode, on `device`.

    Raises:
        UserError: as `run_grounding`.
    """
    scoring = system_scoring(system, recipe)
    by_cam = isinstance(scoring, CamScores)
    if by_cam and concepts:
        raise UserError(f"--concepts: {recipe.name} reads no phrase concepts; leave it out")
    if grid and not by_cam:
        raise UserError(f"--grid: {recipe.name} reads regions; a grid is for Grad-CAM alone, leave it out")
    layer = scoring.grounding_layer if layer is None else layer
    asked, left_out = phrases_to_ask(samples)
    precision = Precision.of(torch.device(device), system)
    encode = SpanEncoder(recipe.data, tokenizer, concepts)
    grounder = Grounder(scoring, layer, recipe.data, tokenizer, encode, precision, batch_size, grid)
    judged, total = Judged(), sum(map(len, asked.values()))
    for caption in grounder.captions(samples, asked):
        judged.add(caption)
        if on_progress is not None:
            on_progress("captions", judged.counts["captions"], total)
    if not judged.hits:
        raise UserError(f"none of the {len(asked)} images can be read, the first is {grounder.skipped[0]}")
    read = [samples[number] for number in judged.regions]
    card = {
        "score": SCORE
        if by_cam
        else f"cosine of regions with the mean of a phrase's {'words and concepts' if concepts else 'words'}",
        "layer": layer,
        "regions": f"a grid of {len(box_grid())} boxes" if grid else _described(read, recipe.data),
        "resolution": resolution(recipe.data),
        "rules": RULES,
        **judged.counted(),
        **left_out,
        "split_hash": split_hash(read),
        "precision": str(precision),
        "max_tokens": max_tokens(recipe.data),
        "unreadable_images": grounder.skipped,
    }
    return GroundingResult(judged.judgement(), card)


def grounding_table(path: Path) -> Table:
    """The result file as a table for the terminal: what was reached beside the baselines, then by kind of phrase."""
    result = json.loads(path.read_text(encoding="utf-8"))
    card, baselines = result["protocol"], result["baselines"]
    caption = f"{card['phrases']:,} phrases of {card['captions']:,} captions, {card['images']:,} images, layer "
    caption += f"{card['layer']}; regions: {card['regions']}, {card['regions_per_image']} per image"
    tuned = (card["tuned_on"] or {}).get("task") == "grounding"
    table = Table(title=f"Phrase grounding, {'tuned' if tuned else 'zero-shot'}, in %", caption=caption)
    table.add_column("")
    table.add_column("phrases", justify="right")
    for protocol in PROTOCOLS:
        for name in (*(f"R@{k}" for k in CUTOFFS), "pointing"):
            table.add_column(f"{protocol}\n{name}", justify="right")
    table.add_row("this run", f"{card['phrases']:,}", *_cells(result["metrics"]))
    for name in BASELINES:
        table.add_row(name, "", *_cells(baselines[name]), style="dim")
    table.add_section()
    for kind, metrics in result["kinds"].items():
        table.add_row(kind.replace("[", r"\["), f"{metrics['phrases']:,}", *_cells(metrics))
    return table


def _cells(metrics: dict[str, float]) -> list[str]:
    return [f"{metrics[name]:.1f}" for name in box_recall.MEASURES]


def _write(result: GroundingResult, path: Path) -> Path:
    """The result file and, beside it, the predictions, whose file is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"task": "grounding", **asdict(result.judgement), "protocol": result.protocol}
    # JSON can hold halves of characters, files and fonts can't: a question mark stands for each.
    content = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    predictions = path.with_suffix(".predictions.jsonl")
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in content.pop("predictions")]
    write_text(predictions, "".join(lines))
    write_json(path, content)
    return predictions


def _described(samples: Sequence[Sample], data: Data) -> str:
    """What the regions are."""
    own = sum(sample.regions is None for sample in samples)
    boxes = "own boxes + whole image" if data.concepts is not None else "the image's annotated boxes"
    kinds = ["stored with the images"] * (own < len(samples)) + [boxes] * (own > 0)
    return ", else ".join(kinds)
