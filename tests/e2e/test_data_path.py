"""Any data through the command line: shards train as their source, recipes join, paths hold from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Here, Vlscale
from tests.e2e.small import SMALL, settings
from tests.e2e.test_first_path import losses_of, metrics_of

SIZES = settings({**SMALL["cb_vila_tiny"], "train.max_steps": "4"})


@pytest.fixture(scope="module")
def shards(vlscale: Vlscale, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "scenes"
    result = vlscale("data", "shards", scenes, "--out", out, "--max-size", "70000")
    assert result.returncode == 0, result.stderr
    assert "split train" in result.stdout
    assert len(list(out.glob("train-*.tar"))) > 1
    return out


def test_shards_give_the_losses_of_their_source(
    shards: Path, scenes: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    assert here("pretrain", "--data", "scenes", "--out", tmp_path / "a", *SIZES) == 0
    monkeypatch.chdir(tmp_path)
    assert here("pretrain", "--data", scenes, "--out", "b", *SIZES) == 0
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    # The run knows where its data is, whatever directory it is evaluated from.
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["data"]["path"] == str(shards)
    assert here("eval", "retrieval", "--from", "a") == 0
    assert here("eval", "retrieval", "--from", "b", "--data", f"shards:{shards}", "--out", "b.json") == 0
    assert Path("b.page/index.html").is_file(), "b is the run"
    ours, theirs = (json.loads(Path(name).read_text()) for name in ("a/eval/retrieval.json", "b.json"))
    assert ours["metrics"] == theirs["metrics"]
    assert (theirs["protocol"]["split"], theirs["protocol"]["images"]) == ("test", 8)


def test_a_corpus_of_several_sources_on_two_ranks(shards: Path, scenes: Path, tmp_path: Path, vlscale: Vlscale) -> None:
    corpus = tmp_path / "corpus.yaml"
    sources = [{"path": str(shards), "weight": 0.5}, f"jsonl:{scenes / 'captions.jsonl'},only=train"]
    corpus.write_text(yaml.safe_dump({"sources": sources}))
    dry = vlscale("pretrain", "--data", corpus, "--dry-run", *SIZES)
    assert dry.returncode == 0, dry.stderr
    assert "36" in next(line for line in dry.stdout.splitlines() if "training images" in line)
    options = ["--nproc", "2", "--set", "train.micro_batch=4", "--set", "data.workers=1"]
    result = vlscale("pretrain", "--data", corpus, "--out", tmp_path / "run", *SIZES, *options)
    assert result.returncode == 0, result.stderr
    assert metrics_of(tmp_path / "run")[-1]["epoch"] == pytest.approx(4 * 8 / 36)


def test_a_broken_shard_stops_the_start_and_may_be_skipped(shards: Path, tmp_path: Path, here: Here) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    for path in shards.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    (place / "train-00000.tar").write_bytes(b"")
    assert here("pretrain", "--data", place, "--out", tmp_path / "run", *SIZES) == 2
    assert not (tmp_path / "run").exists()
    option = ["--set", "data.skip_broken_shards=true"]
    assert here("pretrain", "--data", place, "--out", tmp_path / "run", *SIZES, *option) == 0


def test_validate_and_show_and_formats(
    shards: Path, tmp_path: Path, here: Here, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here("data", "validate", shards) == 0
    assert here("data", "show", shards, "--count", "3", "--out", tmp_path / "sheet.png") == 0
    assert (tmp_path / "sheet.png").is_file()
    assert here("data", "formats") == 0
    printed = capfd.readouterr().out
    for name in ("karpathy", "vg-regions", "open-images", "img2dataset"):
        assert name in printed
