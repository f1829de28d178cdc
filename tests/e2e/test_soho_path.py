"""SOHO through the command line, small: train, evaluate every pair, look inside; and the mistakes of its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Here, Vlscale
from tests.e2e.small import assert_one_line, settings

SOHO = {
    "system.backbone.overrides": "{layers: [1, 1, 1, 1], channels: [8, 8, 8, 16], output_stride: 8}",
    "system.dictionary": "{size: 8, init: kmeans, init_step: 2}",
    "system.text": "{width: 32, heads: 2, intermediate: 64, layers: 1, max_positions: 64, dropout: 0.0, norm: pre}",
    "data.aspect": "{short: 32, long: 64, multiple: 16, window: 16}",
    "data.workers": "0",
    "data.tokenizer": "{vocab_size: 300, max_tokens: 16, sep: true}",
    "train.global_batch": "8",
    "train.max_steps": "4",
    "train.warmup_steps": "2",
    "train.backbone.warmup_steps": "2",
    "checkpoint.every": "2",
}


@pytest.fixture(scope="module")
def soho_run(vlscale: Vlscale, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "soho"
    result = vlscale("pretrain", "soho_tiny", "--data", scenes, "--out", out, *settings(SOHO))
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_a_run_logs_its_three_losses_and_both_rates(soho_run: Path) -> None:
    rows = [json.loads(line) for line in (soho_run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {"itm", "mlm", "mvm", "lr", "lr_backbone", "codebook_perplexity", "codebook_zero", "padding"} <= set(rows[0])


def test_every_pair_of_the_first_images_is_scored(soho_run: Path, here: Here) -> None:
    assert here("eval", "retrieval", "--from", soho_run, "--first", "3") == 0
    result = json.loads((soho_run / "eval" / "retrieval.json").read_text())
    card = result["protocol"]
    assert (card["images"], card["first"], card["split_images"]) == (3, 3, 8)
    assert card["rerank"] == "every pair"
    assert {"t2i_r1", "i2t_r1", "rsum"} <= set(result["metrics"])
    assert not any(name.startswith("itc_") for name in result["metrics"])


def test_the_dictionary_is_drawn(soho_run: Path, here: Here) -> None:
    assert here("codebook-inspect", soho_run, "--show-patches") == 0
    for name in ("index.html", "codebook.json", "dictionary/map-00.png", "dictionary/map-legend.png"):
        assert (soho_run / "codebook" / name).is_file()


def test_stages_are_timed(soho_run: Path, here: Here, tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    arguments = ("--height", "48", "--width", "80", "--repeats", "2", "--out", out)
    assert here("bench", "inference", soho_run, *arguments) == 0
    assert "fusion" in out.read_text()


@pytest.mark.parametrize(
    ("recipe", "change", "hint"),
    [
        ("soho_tiny", "data.texts.negative=0", "data.texts.negative (2 in the paper"),
        ("soho_tiny", "system.backbone.model=vit_tiny_patch16_224", "timm can't build"),
        ("soho_tiny", "system.dictionary.update=release", "need update: paper"),
        ("soho_tiny", "train.schedule=steps", "milestones"),
        ("albef_tiny", "data.aspect={short: 32, long: 64}", "takes square images only"),
        ("albef_tiny", "data.texts.negative=1", "one text per image"),
        ("albef_tiny", "train.backbone={lr: 0.1}", "no backbone of its own"),
        ("albef_tiny", "data.second_view=true", "no use for another crop"),
        ("albef_tiny", "data.concepts={region_width: 8}", "reads no phrases, tags or regions"),
    ],
)
def test_what_does_not_fit_is_named(
    recipe: str, change: str, hint: str, scenes: Path, here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = settings(SOHO) if recipe == "soho_tiny" else []
    out = tmp_path / "run"
    assert here("pretrain", recipe, "--data", scenes, "--out", out, *sizes, "--set", change) == 2
    assert_one_line(capfd.readouterr().err, hint)
    assert not (out / "checkpoints").exists()
