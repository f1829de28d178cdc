"""Retrieval without a first stage, on images that differ in size: every pair is scored and padding never counts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.small_run import make_parts, make_run
from tests.tasks.joint import CELL, Joint
from vlscale.cli.main import main
from vlscale.config import Data, Recipe
from vlscale.data.images import eval_transform, load_image, normalize
from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.systems.protocol import ImageStates, System
from vlscale.systems.registry import build_system
from vlscale.tasks import features, forecast, stages
from vlscale.tasks.card import split_hash
from vlscale.tasks.features import ImageStore, Precision, encode_images
from vlscale.tasks.recall import both_ways, ranks
from vlscale.tasks.retrieval import RetrievalResult, evaluate_retrieval, retrieval_table

FP32 = Precision(torch.device("cpu"), torch.float32)
Parts = tuple[Joint, list[Sample], Recipe, TextTokenizer]


def crop(sample: Sample, data: Data) -> Tensor:
    """uint8 [3, H, W]: the sample's image cut to one of several sizes, multiples of a cell."""
    number = int(sample.id.removeprefix("id-"))
    return eval_transform(data)(load_image(sample.image))[:, : CELL * (1 + number % 4), : CELL * (1 + number % 3)]


def padded_batches(samples: Sequence[Sample], data: Data, batch_size: int, tokenizer: object) -> Iterator[Batch]:
    """As `evaluation_batches`, each batch padded right and below to its largest image."""
    for first in range(0, len(samples), batch_size):
        pictures = [crop(sample, data) for sample in samples[first : first + batch_size]]
        sizes = torch.tensor([picture.shape[1:] for picture in pictures])
        images = torch.full((len(pictures), 3, *sizes.amax(dim=0).tolist()), 255, dtype=torch.uint8)
        for image, picture in zip(images, pictures, strict=True):
            image[:, : picture.shape[1], : picture.shape[2]] = picture
        empty = torch.empty(len(pictures), 0, dtype=torch.int64)
        yield Batch(images, empty, empty, torch.arange(first, first + len(pictures)), image_sizes=sizes)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    _, samples, recipe, tokenizer = make_parts(tmp_path, "albef")
    monkeypatch.setattr(features, "evaluation_batches", padded_batches)
    monkeypatch.setattr(features.Precision, "of", lambda *_: FP32)
    torch.manual_seed(0)
    return Joint(vocabulary=tokenizer.vocabulary.size).eval(), samples, recipe, tokenizer


def evaluate(parts: Parts, **options: object) -> RetrievalResult:
    return evaluate_retrieval(*parts, rerank=2, batch_size=4, device="cpu", **options)  # type: ignore[arg-type]


def scored_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Will hold the logits [P, 2] that each evaluation ranks by, images first."""
    found: list[Tensor] = []
    score_pairs = stages.score_pairs

    def spy(*arguments: object) -> stages.PairScores:
        pairs = score_pairs(*arguments)  # type: ignore[arg-type]
        found.append(pairs.logits)
        return pairs

    monkeypatch.setattr("vlscale.tasks.retrieval.score_pairs", spy)
    return found


@torch.inference_mode()
def slow_logits(parts: Parts) -> tuple[Tensor, Tensor]:
    """ITM logits [I, T, 2] of all pairs one by one, no image ever padded; and whether each is right, [I, T]."""
    system, samples, recipe, tokenizer = parts
    captions = [caption for sample in samples for caption in sample.captions]
    owner = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.captions])
    logits = torch.zeros(len(samples), len(captions), 2)
    for i, sample in enumerate(samples):
        pixels = normalize(crop(sample, recipe.data)[None], recipe.data.mean, recipe.data.std)
        for t, caption in enumerate(captions):
            batch = Batch(pixels, *tokenizer.encode([caption]), torch.zeros(1).long())
            logits[i, t] = system.match_logits(system.fuse(system.encode_text(batch), system.encode_image(batch)))
    return logits, owner == torch.arange(len(samples))[:, None]


@pytest.mark.parametrize("budget", [1 << 30, 0, 5800], ids=["kept", "encoded again", "given up midway"])
def test_against_every_pair_one_by_one(parts: Parts, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, right = slow_logits(parts)
    found = scored_logits(monkeypatch)
    monkeypatch.setattr(features, "IMAGE_TOKEN_BUDGET", budget)
    monkeypatch.setattr(stages, "PAIRS_AT_ONCE", 5)
    result = evaluate(parts)
    assert torch.allclose(found[0].view_as(logits), logits, atol=1e-4)
    scores = logits[..., 1]
    assert result.metrics == pytest.approx(both_ways(ranks(scores.T, right.T), ranks(scores, right)))
    assert (result.protocol["rerank"], result.protocol["pairs"]) == ("every pair", logits[..., 0].numel())


def test_only_what_is_no_padding_is_kept(parts: Parts) -> None:
    system, samples, recipe, tokenizer = parts
    store = encode_images(system, samples, recipe.data, tokenizer, FP32, 4, lambda *_: None)
    assert store.length.tolist() == [math.prod(crop(sample, recipe.data).shape[1:]) // CELL**2 for sample in samples]
    assert len(set(store.length.tolist())) > 3
    for index, sample in enumerate(samples):
        states = store.states(index, FP32.device)
        pixels = normalize(crop(sample, recipe.data)[None], recipe.data.mean, recipe.data.std)
        alone = system.encode_image(Batch(pixels, *[torch.empty(1, 0).long()] * 2, torch.zeros(1).long()))
        assert torch.allclose(states.tokens, alone.tokens, atol=1e-6)
        assert torch.equal(states.mask, alone.mask)
        assert states.pooled.shape == (1, 0)


def test_the_budget_counts_what_is_kept(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes for each of 32 numbers of every valid cell of all images, taken from the mean of those seen."""
    system, samples, recipe, tokenizer = parts

    def store() -> ImageStore:
        return encode_images(system, samples, recipe.data, tokenizer, FP32, len(samples), lambda *_: None)

    size = 4 * 32 * int(store().length.sum())
    for budget, kept in ((size, True), (size - 1, False)):
        monkeypatch.setattr(features, "IMAGE_TOKEN_BUDGET", budget)
        assert (store().tokens is not None) == kept


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (0.1, "1 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert forecast.duration(seconds) == text


def test_size_and_time_are_told_before_the_work(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the clock is a second later: a batch of 4 images takes 1 s to load and 1 s to encode."""
    clock = itertools.count()
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(forecast, "evaluation_batches", padded_batches)
    said: list[str] = []
    seen: list[tuple[str, int, int]] = []

    def say(line: str) -> None:
        said.append(line)
        assert not seen, "before anything is done"

    evaluate(parts, on_message=say, on_progress=lambda *one: seen.append(one))
    # 19 captions in one pass: 10 · 2/4 s + 19 · 1/19 s + 190 · 1/19 s = 16 s
    assert said == [
        "retrieval among 10 images and 19 captions: all 190 pairs to score, 0 MB of features; about 16 s on one rank"
    ]
    assert ("every pair", 190, 190) in seen


def test_the_size_of_a_retrieval_with_a_first_stage() -> None:
    coco = forecast.Size(5000, 25_010, 256, fold=None)
    assert coco.pairs(every=True) == 5000 * 25_010
    assert coco.pairs(every=False) == 256 * (5000 + 25_010)
    folds = forecast.Size(5000, 25_000, 256, fold=1000)
    assert folds.pairs(every=False) == 2 * 256 * 30_000
    assert forecast.Size(10, 19, 50, fold=None).pairs(every=False) == 190


def test_the_first_images_alone(parts: Parts, tmp_path: Path) -> None:
    system, samples, recipe, tokenizer = parts
    result = evaluate(parts, first=6)
    whole = evaluate((system, samples[:6], recipe, tokenizer))
    assert result.metrics == whole.metrics
    assert result.protocol == whole.protocol | {"first": 6, "split_images": 10}
    assert result.protocol["split_hash"] == split_hash(samples[:6])
    captions = sum(len(sample.captions) for sample in samples[:6])
    assert (result.protocol["images"], result.protocol["captions"]) == (6, captions)
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"metrics": result.metrics, "protocol": result.protocol}))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(retrieval_table(path))
    shown = console.export_text()
    assert f"6 images (the first 6 of 10), {captions} captions" in shown
    assert f"all {6 * captions} pairs scored" in shown


@pytest.mark.parametrize("first", [0, -3, 11])
def test_a_first_that_is_not_there(parts: Parts, first: int) -> None:
    with pytest.raises(UserError, match=f"--first {first}: .* from 1 to 10"):
        evaluate(parts, first=first)


def test_first_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)

    def vlscale(first: str) -> int:
        monkeypatch.setattr("sys.argv", ["vlscale", "eval", "retrieval", "--from", str(run), "--first", first])
        return main()

    assert vlscale("5") == 0
    card = json.loads((run / "eval" / "retrieval.json").read_text())["protocol"]
    assert (card["first"], card["split_images"], card["images"]) == (5, 10, 5)
    assert "(the first 5 of 10)" in capfd.readouterr().out
    for wrong in ("0", "-1", "11"):
        assert vlscale(wrong) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"vlscale: error: --first {wrong}: expected")
        assert error.count("\n") == 1


@torch.inference_mode()
def test_soho_on_photographs_of_several_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from files: in a batch padding is masked, here pair by pair; in the store it is gone."""
    data = {"aspect": {"short": 48, "long": 96, "multiple": 32}, "workers": 0, "tokenizer": {"vocab_size": 200}}
    text = {"width": 32, "heads": 2, "intermediate": 64, "layers": 2, "max_positions": 32}
    backbone = {
        "model": "resnet18",
        "overrides": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "output_stride": 8},
    }
    system_tree = {"name": "soho", "text": text, "backbone": backbone, "dictionary": {"size": 16}}
    _, samples, _, tokenizer = make_parts(tmp_path, "albef", count=7)
    recipe = Recipe.model_validate({"name": "soho", "system": system_tree, "weights": {"itm": 0}, "data": data})
    for index, sample in enumerate(samples):
        load_image(sample.image).resize((64 + 32 * (index % 4), 64)).save(str(sample.image))
    torch.manual_seed(0)
    system = build_system(recipe, tokenizer.vocabulary).eval()
    monkeypatch.setattr(features.Precision, "of", lambda *_: FP32)
    found = scored_logits(monkeypatch)
    result = evaluate((cast(Joint, system), samples, recipe, tokenizer))
    assert result.protocol["resolution"] == "shorter side 48, longer at most 96, padded to multiples of 32"
    captions = [caption for sample in samples for caption in sample.captions]
    slow = []
    for _, states in features.image_states(cast(System, system), samples, recipe.data, tokenizer, FP32, 4):
        assert not states.mask.bool().all()
        for row in range(len(states.mask)):
            image = ImageStates(*(field[row : row + 1] for field in states))
            for caption in captions:
                words = Batch(torch.zeros(1, 3, 0, 0), *tokenizer.encode([caption]), torch.zeros(1).long())
                slow.append(system.match_logits(system.fuse(system.encode_text(words), image)))
    assert torch.allclose(found[0], torch.cat(slow), atol=1e-5)
