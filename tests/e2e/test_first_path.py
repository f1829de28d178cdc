"""From data to pictures through the command line: the whole path, small."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import STEPS, Here, Vlscale
from tests.e2e.small import SMALL, assert_one_line, settings
from vlscale.interop import layout


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run)]


def test_the_first_run_ends_with_one_table(
    first_run: tuple[Path, list[str | Path], str], vlscale: Vlscale, cache: Path
) -> None:
    out, command, printed = first_run
    table = printed[printed.rindex("first run") :]
    for expected in ("retrieval.json", "index.html", "first stage", "itm_accuracy", "perplexity", "seconds, all"):
        assert expected in table
    for name in ("eval/retrieval.json", "eval/objectives.json", "codebook/index.html", "codebook/reconstructions.png"):
        assert (out / name).is_file()
    again = vlscale(*command)
    assert again.returncode == 0, again.stderr
    assert "remove the folder to start over" in again.stdout
    assert again.stdout[again.stdout.rindex("first run") :] == table
    assert len(list(cache.glob("scenes-*/captions.jsonl"))) == 1


def test_a_run_leaves_what_the_manual_promises(trained: Path) -> None:
    rows = metrics_of(trained)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {"loss", "itc", "itm", "pixel", "codebook", "lr", "images_per_s"}
    names |= {"codebook_perplexity", "codebook_dead", "gumbel_agreement"}
    assert names <= set(rows[0])
    assert {"mim", "mlm"} <= set(rows[-1])
    with (trained / "metrics.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in table] == losses_of(trained)
    assert (trained / "recipe.yaml").is_file()
    assert [path.name for path in layout.complete_checkpoints(trained)] == [f"step-0000000{n}" for n in (2, 4, 6)]


def test_a_finished_run_has_nothing_to_resume(vlscale: Vlscale, trained: Path) -> None:
    before = metrics_of(trained)
    result = vlscale("pretrain", trained / "recipe.yaml", "--out", trained, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert metrics_of(trained) == before


def test_a_folder_that_holds_a_run_is_refused(vlscale: Vlscale, trained: Path, scenes: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    arguments = ["pretrain", "--data", scenes, "--out", trained, "--nproc", "2", *settings(SMALL["cb_vila_tiny"])]
    result = vlscale(*arguments)
    assert result.returncode == 2, result.stderr
    assert_one_line(result.stderr, "--resume auto")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_retrieval_is_evaluated(trained: Path, here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("eval", "retrieval", "--from", trained) == 0
    result = json.loads((trained / "eval" / "retrieval.json").read_text())
    assert result["task"] == "retrieval"
    ways = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    for prefix in ("", "itc_", "sum_"):
        assert all(0 <= result["metrics"][prefix + name] <= 100 for name in [*ways])
        assert result["metrics"][prefix + "rsum"] == pytest.approx(sum(result["metrics"][prefix + n] for n in ways))
    assert result["protocol"]["split"] == "test"
    assert str(trained / "eval" / "retrieval.json") in capfd.readouterr().out.replace("\n", "")


def test_a_checkpoint_and_other_data_can_be_named(trained: Path, scenes: Path, tmp_path: Path, here: Here) -> None:
    checkpoint, out = trained / "checkpoints" / "step-00000004", tmp_path / "result.json"
    options = ["--data", str(scenes), "--split", "train", "--rerank", "2", "--out", str(out)]
    assert here("eval", "retrieval", "--from", checkpoint, *options) == 0
    card = json.loads(out.read_text())["protocol"]
    assert (card["split"], card["rerank"], card["images"]) == ("train", 2, 24)


def test_without_a_test_split_the_validation_split_is_taken_and_named(
    trained: Path, scenes: Path, tmp_path: Path, here: Here, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "captions.jsonl"
    lines = [json.loads(line) for line in (scenes / "captions.jsonl").read_text().splitlines()]
    data.write_text("".join(json.dumps(line | {"split": "dev"}) + "\n" for line in lines if line["split"] == "test"))
    options = ["--data", data, "--image-root", scenes, "--rerank", "0", "--out", tmp_path / "result.json"]
    assert here("eval", "retrieval", "--from", trained, *options) == 0
    assert "no split test: took " in capfd.readouterr().out


def test_objectives_are_probed(trained: Path, here: Here) -> None:
    assert here("eval", "objectives", "--from", trained) == 0
    metrics = json.loads((trained / "eval" / "objectives.json").read_text())["metrics"]
    assert {"itm_accuracy", "mlm_content_gap", "mim_below_entropy", "mim_shuffle_rise"} <= set(metrics)


def test_the_codebook_becomes_a_page(trained: Path, here: Here) -> None:
    assert here("codebook-inspect", trained, "--show-patches", "--codes", "4") == 0
    page = trained / "codebook" / "index.html"
    assert "perplexity" in page.read_text().lower()
    assert list((trained / "codebook").rglob("*.png"))


def test_reconstructions_become_a_picture(trained: Path, here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("inspect", "reconstructions", trained, "--count", "2") == 0
    picture = Path(capfd.readouterr().out.strip().splitlines()[-1])
    with Image.open(picture) as image:
        assert min(image.size) >= 32


def test_two_ranks_train_albef(vlscale: Vlscale, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["pretrain", "albef_tiny", "--data", scenes, "--out", out, *settings(SMALL["albef_tiny"])]
    result = vlscale(*arguments, "--set", "train.max_steps=2", "--nproc", "2")
    assert result.returncode == 0, result.stderr
    assert len(metrics_of(out)) == 2
    state = json.loads((layout.complete_checkpoints(out)[-1] / layout.STATE).read_text())
    assert state["world_size"] == 2


@pytest.mark.slow
def test_every_launcher_gives_the_same_losses(vlscale: Vlscale, scenes: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", "--data", str(scenes), *settings(SMALL["cb_vila_tiny"]), "--set", "train.max_steps=3"]
    assert vlscale(*arguments, "--out", tmp_path / "own", "--nproc", "2").returncode == 0
    programs = Path(sys.executable).parent
    launchers = {
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "vlscale.cli"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--module", "vlscale.cli"],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    for name, (program, *options) in launchers.items():
        command = [str(programs / program), *options, *arguments, "--out", str(tmp_path / name)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "own")
