"""MVPTR through the command line, small: both stages, evaluation, grounding; and the mistakes of its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Here, Vlscale
from tests.e2e.small import assert_one_line, settings

MVPTR = {
    "system.text": "{width: 32, heads: 2, intermediate: 64, layers: 3, max_positions: 64, dropout: 0.0, norm: pre}",
    "data.concepts.min_count": "3",
    "data.workers": "0",
    "data.tokenizer": "{vocab_size: 300}",
    "train.global_batch": "8",
    "train.max_steps": "3",
    "checkpoint.every": "2",
    "eval.rerank": "4",
}


@pytest.fixture(scope="module")
def run(vlscale: Vlscale, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mvptr"
    result = vlscale("pretrain", "mvptr_tiny", "--data", scenes, "--out", out, *settings(MVPTR))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stage 2 of 2" in result.stdout
    return out


def test_both_stages_log_their_losses(run: Path) -> None:
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run / "stage-1", run)
    )
    assert len(first) == len(second) == 3
    assert {"mcr_v", "mcr_s", "vsc"} <= first[0].keys()
    assert {"mcr_v", "mcr_s", "vsc", "itm", "mlm", "wpg"} <= second[0].keys()
    assert "wpg" not in first[0]


def test_retrieval_in_two_stages(run: Path, here: Here) -> None:
    assert here("eval", "retrieval", "--from", run) == 0
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    assert {"itc_rsum", "rsum", "sum_rsum"} <= result["metrics"].keys()
    assert result["protocol"]["resolution"].startswith("up to 8 regions")
    assert result["protocol"]["max_tokens"] == 25


def test_what_the_objectives_learned(run: Path, here: Here) -> None:
    assert here("eval", "objectives", "--from", run) == 0
    result = json.loads((run / "eval" / "objectives.json").read_text())
    assert {"itm_accuracy", "mlm_content_true", "mlm_content_shuffled"} <= result["metrics"].keys()


def test_phrases_are_grounded_without_tuning(run: Path, here: Here) -> None:
    assert here("eval", "grounding", "--from", run, "--zero-shot") == 0
    result = json.loads((run / "eval" / "grounding.json").read_text())
    assert 0 <= result["metrics"]["any_r1"] <= 100
    assert (run / "eval" / "grounding" / "index.html").is_file()


def test_a_run_of_the_first_stage_is_a_run(run: Path, here: Here, tmp_path: Path) -> None:
    assert here("eval", "retrieval", "--from", run / "stage-1", "--out", tmp_path / "one.json") == 0
    card = json.loads((tmp_path / "one.json").read_text())["protocol"]
    assert card["checkpoint"].endswith("stage-1/checkpoints/step-00000003")


def test_there_is_no_codebook_to_look_into(run: Path, here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("codebook-inspect", run) == 2
    assert_one_line(capfd.readouterr().err, "codebook")


def test_a_dry_run_tells_the_steps_of_both(here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("pretrain", "mvptr_tiny", "--dry-run") == 0
    assert "562, 1,125" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--stage", "3"], "stages 1 to 2"),
        (["--stage", "2"], "run --stage 1 first"),
        (["--set", "train.stages=[1]"], "1 stages of mvptr, but it has 2"),
        (["--set", "data.concepts.max_words=70"], "data.concepts: 75 tokens"),
        (["--set", "data.concepts.phrases=absent.jsonl"], "absent.jsonl"),
        (["--set", "data.concepts.min_count=100000"], "the most frequent one is in"),
        (["--set", "data.concepts.pixels=4"], "make it 48"),
        (["--set", "system.wpg.layer=7"], "layers 0 to 2"),
    ],
)
def test_what_does_not_fit_is_named(
    options: list[str], hint: str, scenes: Path, here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert here("pretrain", "mvptr_tiny", "--data", scenes, "--out", out, *options) == 2
    assert_one_line(capfd.readouterr().err, hint)
    assert not list(out.glob("**/checkpoints"))
