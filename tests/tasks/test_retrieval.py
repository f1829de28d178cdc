"""Retrieval end to end on untrained systems: the file, the card, bounded memory, and every score once more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.small_run import make_parts, make_run
from vlscale.cli.main import main
from vlscale.config import Recipe
from vlscale.data.images import eval_transform, load_image, normalize
from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.tasks import features
from vlscale.tasks.card import split_hash
from vlscale.tasks.recall import both_ways, ranks
from vlscale.tasks.retrieval import evaluate_retrieval, retrieval_table, run_retrieval

Parts = tuple[nn.Module, list[Sample], Recipe, TextTokenizer]
NAMES = {f"{p}{w}_r{k}" for p in ("", "itc_", "sum_") for w in ("t2i", "i2t") for k in (1, 5, 10)}
NAMES |= {"rsum", "itc_rsum", "sum_rsum"}


@pytest.fixture(scope="module", params=["cb_vila", "albef"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("data"), request.param)


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic on every machine."""
    monkeypatch.setattr(features.Precision, "of", lambda device, _system: features.Precision(device, torch.float32))


def evaluate(parts: Parts, rerank: int, samples: list[Sample] | None = None) -> dict[str, float]:
    system, own, recipe, tokenizer = parts
    result = evaluate_retrieval(system, samples or own, recipe, tokenizer, rerank=rerank, batch_size=4, device="cpu")
    assert set(result.metrics) == NAMES
    assert all(0 <= value <= 600 for value in result.metrics.values())
    return result.metrics


@torch.inference_mode()
def slow_metrics(parts: Parts) -> dict[str, float]:
    """All pairs one by one through the protocol, without stores, trimming, sharing or candidates."""
    system, samples, recipe, tokenizer = parts
    transform = eval_transform(recipe.data)
    captions = [caption for sample in samples for caption in sample.captions]
    owner = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.captions])
    sims = torch.zeros(len(samples), len(captions))
    logits = torch.zeros(len(samples), len(captions), 2)
    for i, sample in enumerate(samples):
        pixels = normalize(transform(load_image(sample.image))[None], recipe.data.mean, recipe.data.std)
        for t, caption in enumerate(captions):
            batch = Batch(pixels, *tokenizer.encode([caption], pad_to=tokenizer.max_tokens), torch.zeros(1).long())
            image, text = system.encode_image(batch), system.encode_text(batch)
            sims[i, t] = system.similarity(image, text)
            logits[i, t] = system.match_logits(system.fuse(text, image))
    right = owner == torch.arange(len(samples))[:, None]
    scores = {"": logits[..., 1], "itc_": sims, "sum_": logits[..., 1] - logits[..., 0] + sims}
    metrics: dict[str, float] = {}
    for prefix, score in scores.items():
        metrics |= both_ways(ranks(score.T, right.T), ranks(score, right), prefix)
    return metrics


def test_every_pair_against_the_slow_way(parts: Parts) -> None:
    assert evaluate(parts, rerank=1000) == pytest.approx(slow_metrics(parts))


def test_without_reranking_the_first_stage_stands(parts: Parts) -> None:
    metrics = evaluate(parts, rerank=0)
    for name, value in metrics.items():
        stem = name.removeprefix("itc_").removeprefix("sum_")
        assert value == metrics[f"itc_{stem}"]


def test_tokens_that_do_not_fit_are_encoded_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = evaluate(parts, rerank=3)
    monkeypatch.setattr(features, "IMAGE_TOKEN_BUDGET", 0)
    monkeypatch.setattr(features.ImageStore, "states", None)
    assert evaluate(parts, rerank=3) == kept


def test_unreadable_images_are_left_out_and_named(parts: Parts, tmp_path: Path) -> None:
    system, samples, recipe, tokenizer = parts
    broken = Sample("broken", tmp_path / "none.png", ("it is not there",))
    mixed = [*samples[:4], broken, *samples[4:]]
    result = evaluate_retrieval(system, mixed, recipe, tokenizer, rerank=2, batch_size=4, device="cpu")
    assert result.metrics == evaluate(parts, rerank=2)
    assert result.protocol["images"] == len(samples)
    assert result.protocol["split_hash"] == split_hash(samples)
    [named] = result.protocol["unreadable_images"]
    assert "none.png" in named
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        evaluate_retrieval(system, [broken], recipe, tokenizer, rerank=2, batch_size=4, device="cpu")


def test_images_without_captions_stand_among_the_candidates(parts: Parts) -> None:
    system, samples, recipe, tokenizer = parts
    bare = Sample("bare", samples[0].image, ())
    result = evaluate_retrieval(system, [*samples, bare], recipe, tokenizer, rerank=50, batch_size=4, device="cpu")
    assert all(math.isfinite(value) for value in result.metrics.values())
    # The same picture as the first one's ties with it, against us.
    assert result.metrics["itc_t2i_r1"] <= evaluate(parts, rerank=50)["itc_t2i_r1"]
    with pytest.raises(UserError, match="captions"):
        evaluate_retrieval(system, [bare], recipe, tokenizer, rerank=2, batch_size=4, device="cpu")


def test_result_file_and_table(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path, predictions, samples = run_retrieval(str(run))
    assert path == run / "eval" / "retrieval.json"
    result = json.loads(path.read_text())
    assert result["task"] == "retrieval"
    assert set(result["metrics"]) == NAMES
    card = result["protocol"]
    assert card["checkpoint"].endswith("step-00000003")
    assert (card["step"], card["split"], card["images"], card["captions"]) == (3, "test", 10, 19)
    assert (card["rerank"], card["resolution"], card["tuned_on"]) == (4, 32, None)
    assert predictions == run / "eval" / "retrieval.predictions.jsonl"
    assert [sample.id for sample in samples] == [f"id-{number}" for number in range(10)]
    assert card["chance"]["t2i_r1"] == pytest.approx(10.0)
    assert {"trained_on", "split_hash", "scores", "ties", "precision", "seed"} <= set(card)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(retrieval_table(path))
    assert f"{result['metrics']['sum_rsum']:.1f}" in console.export_text()
    again = run_retrieval(str(run), out=tmp_path / "again.json").path
    assert again.read_text() == path.read_text(), "nothing in the file depends on when it was made"


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlscale", "eval", "retrieval", "--from", str(run), "--rerank", "2"])
    assert main() == 0
    assert json.loads((run / "eval" / "retrieval.json").read_text())["protocol"]["rerank"] == 2
    monkeypatch.setattr("sys.argv", ["vlscale", "eval", "retrieval", "--from", str(run), "--rerank", "-1"])
    assert main() == 2
