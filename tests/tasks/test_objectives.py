"""The probes of the objectives on a system whose answers are planted, and on an untrained one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlscale.config import Recipe, parse_recipe
from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer, build_tokenizer
from vlscale.systems.protocol import ImageStates, TextStates
from vlscale.systems.registry import build_system
from vlscale.tasks.card import split_hash
from vlscale.tasks.objectives import FUNCTION_WORDS, probe_objectives

COLOURS = ("red", "green", "blue", "white", "black", "pink", "grey", "brown")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("probe")
    found = []
    for index in range(16):
        path = folder / f"{index}.png"
        Image.fromarray(np.full((32, 32, 3), 8 * index, np.uint8)).save(path)
        found.append(Sample(str(index), path, (f"the {COLOURS[index % 8]} one of the {COLOURS[(index + 3) % 8]}",)))
    return found


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    vision = {
        "model": "vit_tiny_patch16_224",
        "overrides": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    }
    text = {"width": 16, "heads": 2, "intermediate": 16, "text_layers": 1, "fusion_layers": 1, "max_positions": 32}
    system = {"name": "cb_vila", "vision": vision, "text": text, "embed_dim": 8, "codebook": {"size": 8}}
    return parse_recipe({"name": "probe", "system": system, "data": {"image_size": 32}}, "test")


@pytest.fixture(scope="module")
def tokenizer(samples: list[Sample], recipe: Recipe) -> TextTokenizer:
    return build_tokenizer(recipe.data.tokenizer, [caption for sample in samples for caption in sample.captions])


class Oracle:
    """Knows which image belongs to which text, and the masked word if it sees the right image."""

    grid = (4, 4)

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.mask, self.size = tokenizer.vocabulary.mask, tokenizer.vocabulary.size
        self.clean: dict[int, Tensor] = {}

    def encode_image(self, batch: Batch) -> ImageStates:
        tokens = batch.image_ids.float().view(-1, 1, 1)
        return ImageStates(tokens, torch.ones(tokens.shape[:2], dtype=torch.int64), tokens[:, 0])

    def encode_text(self, batch: Batch) -> TextStates:
        for name, ids in zip(batch.image_ids.tolist(), batch.input_ids, strict=True):
            if not (ids == self.mask).any():
                self.clean[name] = ids
        words = torch.stack([self.clean[name] for name in batch.image_ids.tolist()])
        owner = batch.image_ids[:, None].expand_as(words)
        return TextStates(torch.stack([words, owner], 2).float(), batch.attention_mask, owner[:, :1].float())

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor:
        return torch.zeros(len(image.pooled), len(text.pooled))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        right = text.tokens[:, :, 1] == image.tokens[:, :1, 0]
        return torch.stack([torch.where(right, text.tokens[:, :, 0], 0.0), right.float()], 2)

    def match_logits(self, states: Tensor) -> Tensor:
        return torch.stack([1 - states[:, 0, 1], states[:, 0, 1]], 1)

    def word_logits(self, states: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(states[:, 0].long(), self.size).float()


class Seer(Oracle):
    """Predicts codes 0 … 3, each a quarter of the cells: surely with its own text, evenly with another's."""

    def predict_masked(self, batch: Batch, text: TextStates, patch_mask: Tensor) -> dict[str, Tensor]:
        masked = int(patch_mask[0].sum())
        codes = (torch.arange(masked) % 4).expand(len(batch), -1)
        own = text.tokens[:, 0, 1] == batch.image_ids
        sure = 1000.0 * torch.nn.functional.one_hot(codes, 4) * own[:, None, None]
        return {"codes": codes, "logits": sure}


def test_an_oracle_scores_what_it_must(samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer) -> None:
    system: Any = Oracle(tokenizer)
    metrics = probe_objectives(system, samples, recipe, tokenizer, CPU)
    assert metrics == {"itm_accuracy": 1.0, "mlm_content_true": 100, "mlm_content_shuffled": 0, "mlm_content_gap": 100}


def test_mim_is_held_against_the_entropy_of_the_codes(
    samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer
) -> None:
    system: Any = Seer(tokenizer)
    metrics = probe_objectives(system, samples, recipe, tokenizer, CPU)
    assert metrics["code_entropy"] == pytest.approx(math.log(4))
    assert metrics["mim_loss"] == pytest.approx(0)
    assert metrics["mim_below_entropy"] == pytest.approx(math.log(4))
    assert metrics["mim_shuffle_rise"] == pytest.approx(math.log(4))


def test_only_whole_content_words_are_masked(samples: list[Sample], recipe: Recipe, tokenizer: TextTokenizer) -> None:
    asked: list[str] = []

    class Listener(Oracle):
        def word_logits(self, states: Tensor) -> Tensor:
            asked.extend(tokenizer.tokens([int(value) for value in states[:, 0] if value]))
            return super().word_logits(states)

    system: Any = Listener(tokenizer)
    probe_objectives(system, samples, recipe, tokenizer, CPU)
    assert asked
    assert set(asked) <= set(COLOURS)
    assert not set(COLOURS) & FUNCTION_WORDS


def test_an_untrained_system_is_near_chance_and_the_file_says_what_was_probed(
    samples: list[Sample],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    system = build_system(recipe, tokenizer.vocabulary).eval()
    run = SimpleNamespace(
        folder=tmp_path,
        checkpoint=tmp_path / "step-00000003",
        step=3,
        recipe=recipe,
        tokenizer=tokenizer,
        system=system,
        device=CPU,
    )
    monkeypatch.setattr("vlscale.tasks.objectives.load_run", lambda _source: run)
    monkeypatch.setattr("vlscale.tasks.objectives.run_samples", lambda *_arguments: ("test", samples))
    from vlscale.tasks.objectives import run_objectives

    result = json.loads(run_objectives("somewhere").read_text())
    assert result["task"] == "objectives"
    assert result["protocol"]["pairs"] == 16
    assert result["protocol"]["checkpoint"].endswith("step-00000003")
    assert result["protocol"]["split_hash"] == split_hash(samples)
    metrics = result["metrics"]
    assert 0.2 < metrics["itm_accuracy"] < 0.8
    assert abs(metrics["mim_shuffle_rise"]) < 0.2
    assert metrics["mlm_content_true"] < 40
