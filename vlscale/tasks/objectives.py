"""Did the pre-training objectives teach anything? Probes on held-out pairs that chance and shortcuts do not pass.

* ITM accuracy with one positive to two hard negatives, drawn as in training (always "no" scores 0.667).
* Masked content words: how many are found with the true image, and how many with another one.
* MIM: the loss against the entropy of the code frequencies (what a constant guess reaches), and its rise when the
  captions are shuffled: the language conditioning that CB-ViLA's paper is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from vlscale.codebooks.health import count_codes, entropy
from vlscale.config import Recipe
from vlscale.data.captions import CaptionEncoder
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch, Sample
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import TextTokenizer
from vlscale.interop.layout import write_json
from vlscale.interop.run import load_run, run_samples
from vlscale.objectives.matching import draw_negatives, itm_accuracy, valid_rows
from vlscale.objectives.patches import draw_patch_mask
from vlscale.objectives.reconstruction import mim_loss
from vlscale.systems.concept_inputs import phrases_saying
from vlscale.systems.protocol import System, TextStates, offers
from vlscale.tasks.card import origin, resolution, split_hash

_FUNCTION_WORDS = """
a an the this that these those there here it its is are was were be been being has have had do does did in on at of
to from by with without for and or but nor as while into onto over under above below behind beside between near next
left right front back side top bottom up down out off through across along around against which who whom whose what
where when his her their our your my he she they we you i him them us one some each both all other another same very
more most also just not no so than then too can could will would may might
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that an image does not decide; a position word is one of them, since a relation can be told two ways."""
BATCH = 64


class PredictsCells(Protocol):
    """A system with masked image modelling."""

    def predict_masked(self, batch: Batch, text: TextStates, patch_mask: Tensor) -> dict[str, Tensor]: ...


@dataclass(slots=True)
class _Sums:
    """Sums over batches, by name: value and weight."""

    values: dict[str, tuple[float, float]]

    def add(self, name: str, mean: Tensor | float, weight: float) -> None:
        total, count = self.values.get(name, (0.0, 0.0))
        self.values[name] = (total + float(mean) * weight, count + weight)

    def mean(self, name: str) -> float:
        total, count = self.values[name]
        return total / max(count, 1e-9)


def run_objectives(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    out: Path | None = None,
    image_root: str | None = None,
) -> Path:
    """Probe a run and write `eval/objectives.json` in its folder (or `out`); returns the file."""
    run = load_run(source)
    name, samples = run_samples(run, data, split, image_root)
    metrics = probe_objectives(cast(System, run.system), samples, run.recipe, run.tokenizer, run.device)
    protocol = origin(run, data, name) | {
        "resolution": resolution(run.recipe.data),
        "split_hash": split_hash(samples),
        "pairs": len(samples),
        "seed": 0,
    }
    path = out or run.folder / "eval" / "objectives.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"task": "objectives", "metrics": metrics, "protocol": protocol})
    return path


@torch.inference_mode()
def probe_objectives(
    system: System, samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer, device: torch.device
) -> dict[str, float]:
    """All probes that the system has objectives for; one caption per image, drawn with seed 0.

    Returns:
        itm_accuracy; mlm_content_true, mlm_content_shuffled and their gap, in percent; and with a codebook mim_loss,
        code_entropy, mim_below_entropy and mim_shuffle_rise, in nats.
    """
    sums = _Sums({})
    codes: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    for batch in _pairs(samples, recipe, tokenizer, rng, device):
        _probe_matching(system, batch, generator, sums)
        _probe_words(system, batch, tokenizer, rng, sums)
        if offers(system, PredictsCells):
            codes.append(_probe_cells(system, batch, recipe, generator, sums))
    metrics = {"itm_accuracy": sums.mean("itm")}
    if "words_true" in sums.values:
        true, shuffled = 100 * sums.mean("words_true"), 100 * sums.mean("words_shuffled")
        metrics |= {"mlm_content_true": true, "mlm_content_shuffled": shuffled, "mlm_content_gap": true - shuffled}
    if codes:
        seen = torch.cat(codes)
        bits = entropy(count_codes(seen, int(seen.max()) + 1)).item()
        mim = sums.mean("mim_true")
        metrics |= {"mim_loss": mim, "code_entropy": bits, "mim_below_entropy": bits - mim}
        metrics["mim_shuffle_rise"] = sums.mean("mim_shuffled") - mim
    return metrics


def _pairs(
    samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer, rng: np.random.Generator, device: torch.device
) -> Iterator[Batch]:
    """Normalised batches of at least two pairs, one caption each."""
    captions = {sample.id: sample.captions[rng.integers(len(sample.captions))] for sample in samples if sample.captions}
    first, encode = 0, CaptionEncoder(recipe.data, tokenizer)
    for images in evaluation_batches([s for s in samples if s.captions], recipe.data, BATCH, tokenizer):
        texts = [captions[name] for name in images.sample_ids]
        size = len(texts)
        numbers = torch.arange(first, first + size)
        fields: dict[str, Any] = encode(texts)
        batch = replace(images, **fields, image_ids=numbers, texts=texts)
        first += size
        if size > 1:
            yield normalize_batch(batch.to(device), recipe.data)


def _probe_matching(system: System, batch: Batch, generator: torch.Generator, sums: _Sums) -> None:
    image, text = system.encode_image(batch), system.encode_text(batch)
    sim = system.similarity(image, text)
    sim = torch.zeros(len(batch), len(batch), device=batch.images.device) if sim is None else sim
    drawn = draw_negatives(sim.T, sim, batch.image_ids, generator)
    pick = [TextStates(*(value[index] for value in text)) for index in (slice(None), slice(None), drawn.texts)]
    sources = [image, type(image)(*(value[drawn.images] for value in image)), image]
    logits = torch.cat([system.match_logits(system.fuse(t, i)) for t, i in zip(pick, sources, strict=True)])
    valid = valid_rows(drawn)
    sums.add("itm", itm_accuracy(logits, valid).item(), valid.sum().item())


def _probe_words(system: System, batch: Batch, tokenizer: TextTokenizer, rng: np.random.Generator, sums: _Sums) -> None:
    """One content word per caption becomes [MASK]; found with the true image, and with the next one of the batch?"""
    positions = [_content_position(tokenizer, row, rng) for row in batch.input_ids.cpu()]
    rows = torch.tensor([row for row, position in enumerate(positions) if position is not None])
    if len(rows) == 0:
        return
    columns = torch.tensor([position for position in positions if position is not None])
    ids = batch.input_ids.clone()
    labels = ids[rows, columns]
    ids[rows, columns] = tokenizer.vocabulary.mask
    if batch.phrase_words is not None:
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[rows, columns] = True
        ids = ids.masked_fill(phrases_saying(batch, hidden), tokenizer.vocabulary.mask)
    masked = replace(batch, input_ids=ids)
    image, text = system.encode_image(batch), system.encode_text(masked)
    other = type(image)(*(value.roll(1, dims=0) for value in image))
    for name, states in (("words_true", image), ("words_shuffled", other)):
        fused = system.fuse(text, states)[rows, columns]
        found = system.word_logits(fused).argmax(-1) == labels
        sums.add(name, found.float().mean().item(), len(rows))


def _content_position(tokenizer: TextTokenizer, ids: Tensor, rng: np.random.Generator) -> int | None:
    vocabulary = tokenizer.vocabulary
    special = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    values = ids.tolist()
    tokens = tokenizer.tokens(values)
    whole = [
        not (position + 1 < len(tokens) and tokens[position + 1].startswith("##")) for position in range(len(tokens))
    ]
    candidates = [
        position
        for position, (value, token) in enumerate(zip(values, tokens, strict=True))
        if value < vocabulary.size  # a word, no phrase
        and value not in special
        and token not in FUNCTION_WORDS
        and not token.startswith("##")
        and whole[position]
    ]
    return int(rng.choice(candidates)) if candidates else None


def _probe_cells(system: System, batch: Batch, recipe: Recipe, generator: torch.Generator, sums: _Sums) -> Tensor:
    """MIM with the true captions and with those of the next pair; returns the masked cells' codes."""
    assert offers(system, PredictsCells)
    mim: Any = recipe.system.mim  # type: ignore[union-attr]
    mask = draw_patch_mask(len(batch), system.grid, mim.ratio, mim.block, generator).to(batch.images.device)
    text = system.encode_text(batch)
    other = TextStates(*(value.roll(1, dims=0) for value in text))
    codes = torch.empty(0)
    for name, states in (("mim_true", text), ("mim_shuffled", other)):
        found = cast(PredictsCells, system).predict_masked(batch, states, mask)
        codes = found["codes"]
        sums.add(name, mim_loss(found["logits"], codes).item(), len(batch))
    return codes.flatten()
