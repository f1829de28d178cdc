"""`vlscale finetune` with a stand-in for systems: recipe, weights, validation after every epoch, resume, origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.toy import WIDTH, ToySystem, build_toy, toy_recipe
from tests.tasks.classified_data import LABELS, write_data, write_pairs
from vlscale.cli.main import main
from vlscale.config import Recipe, load_recipe, tuning
from vlscale.config.tasks import VqaTask
from vlscale.data.sample import Batch, Vocabulary
from vlscale.data.text import TextTokenizer
from vlscale.engine import loop
from vlscale.engine.loop import RunResult
from vlscale.interop import layout, run
from vlscale.interop.export import read_tensors
from vlscale.interop.origin import learned
from vlscale.nn.writer import ParameterWriter
from vlscale.systems.protocol import Choices, Progress, StepOutput

Finetune = Callable[..., int]


class ToyTuned(nn.Module):
    """A linear head over the toy's two encoders."""

    def __init__(self, system: ToySystem, task: str, classes: int) -> None:
        super().__init__()
        self.system, self.task = system, task
        self.head = nn.Linear(2 * WIDTH, classes)
        for name in ("norm", "late"):
            getattr(system, name).requires_grad_(False)
        for parameter in (system.codes, system.temperature):
            parameter.requires_grad_(False)

    def start_head(self) -> None:
        self.head.bias.data.fill_(0.25)

    def _logits(self, batch: Batch) -> Tensor:
        words = self.system.text(batch.input_ids) * batch.attention_mask[..., None]
        return self.head(torch.cat([self.system.image(batch.images.flatten(1)), words.sum(1)], 1)).float()

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        logits = self._logits(batch)
        if self.task == "vqa":
            loss = F.binary_cross_entropy_with_logits(logits, batch.targets["scores"])
        else:
            loss = F.cross_entropy(logits, batch.targets["labels"])
        return StepOutput({self.task: loss}, {})

    def predict(self, batch: Batch) -> Tensor:
        assert not self.training
        return self._logits(batch)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        pass

    def carried_state(self) -> dict[str, Tensor]:
        return {}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        assert not state

    def place(self, device: torch.device) -> None:
        pass

    def no_weight_decay(self) -> set[str]:
        return set()

    def rest(self, progress: Progress) -> bool:
        return False


def build(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    system = build_toy(recipe, vocabulary)
    if recipe.task is None or recipe.task.name == "retrieval":
        return system
    name = recipe.task.name
    assert isinstance(system, ToySystem)
    return ToyTuned(system, name, len(vocabulary.answer_pieces) if name == "vqa" else len(LABELS[name]))


@pytest.fixture
def base(pretrain: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was pre-trained for three steps on images with questions and hypotheses."""
    pretrain(toy_recipe(write_splits(tmp_path / "data"), train__max_steps=3), tmp_path / "runs" / "base")
    monkeypatch.setattr(loop, "build_system", build)
    monkeypatch.setattr(run, "build_system", build)
    return tmp_path / "runs" / "base"


@pytest.fixture
def finetune(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """`vlscale finetune` from the base, in `tmp_path`, with a recipe file; an epoch is two steps."""
    recipe = tmp_path / "task.yaml"
    monkeypatch.chdir(tmp_path)
    # as `launch.settle` sets them, so that they are undone
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        monkeypatch.setenv(name, value)

    def call(task: str, *words: str | Path, **sections: Any) -> int:
        tree = {
            "task": {"name": task, **({"mode": "classify", "min_count": 1} if task == "vqa" else {})},
            "train": {"epochs": 2, "global_batch": 7, "lr": 0.02, "warmup_steps": 1},
            **sections,
        }
        recipe.write_text(json.dumps(tree))  # JSON is YAML
        command = ["vlscale", "finetune", task, "--from", base, "--recipe", recipe, "--ds-config", "zero2_cpu"]
        monkeypatch.setattr("sys.argv", [*map(str, command), *map(str, words)])
        return main()

    return call


def write_splits(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """The images of `write_data` once per split, in one file."""
    lines = []
    for split in splits:
        for line in write_data(folder, split=split).read_text().splitlines():
            row = json.loads(line)
            row["id"] = f"{split}-{row['id']}"
            for place, one in enumerate([*row["questions"], *row["statements"]]):
                one["id"] = f"{row['id']}-{place}"
            lines.append(json.dumps(row) + "\n")
    path = folder / "all.jsonl"
    path.write_text("".join(lines))
    return path


def test_a_run_is_tuned_judged_after_every_epoch_and_evaluated(
    finetune: Finetune, base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune("vqa") == 0
    out, printed = tmp_path / "runs" / "base-vqa", capsys.readouterr().out
    assert "every epoch is judged by 14 examples of the validation split" in printed
    best = json.loads((out / layout.BEST).read_text())
    assert (best["metric"], [row["step"] for row in best["epochs"]]) == ("accuracy", [2, 4])
    assert printed.endswith(f"{best['best']['step']:08d}: the best epoch\n")
    newest = base.resolve() / "checkpoints" / "step-00000003"
    noted = json.loads((out / layout.ORIGIN).read_text())
    assert (noted["checkpoint"], noted["recipe"], noted["tuned_on"]) == (str(newest), "toy", None)

    monkeypatch.setattr("sys.argv", ["vlscale", "eval", "vqa", "--from", str(out), "--split", "val"])
    assert main() == 0
    result = json.loads((out / "eval" / "vqa.json").read_text())
    assert result["metrics"]["accuracy"] == pytest.approx(best["best"]["accuracy"]), "by the same evaluation"
    assert result["protocol"]["step"] == best["best"]["step"]
    assert result["protocol"]["samples_seen"] == 3 * 8
    assert result["protocol"]["tuned_on"]["from"] == str(newest)


def test_what_is_new_starts_from_the_weights_and_a_resumed_run_from_its_own(
    finetune: Finetune, base: Path, tmp_path: Path, capsys: Any
) -> None:
    still = (
        "--set",
        "train.lr=1e-12",
        "--set",
        "train.warmup_lr=0",
        "--set",
        "train.min_lr=0",
        "--out",
        tmp_path / "a",
    )
    assert finetune("snli-ve", *still) == 0
    tuned = read_tensors(tmp_path / "a" / "checkpoints" / "step-00000004" / layout.MODEL)
    before = read_tensors(base / "checkpoints" / "step-00000003" / layout.MODEL)
    torch.testing.assert_close(tuned["system.image.weight"], before["image.weight"])
    torch.testing.assert_close(tuned["head.bias"], torch.full((3,), 0.25))
    assert finetune("snli-ve", *still) == 2
    assert "holds a run already" in capsys.readouterr().err
    (tmp_path / "a" / layout.ORIGIN).write_text("{}")
    assert finetune("snli-ve", *still, "--resume", "auto") == 0
    assert f"weights of {base}" not in capsys.readouterr().out
    assert (tmp_path / "a" / layout.ORIGIN).read_text() == "{}", "it still began where it began"


def test_from_scratch_no_weight_is_read(finetune: Finetune, base: Path, tmp_path: Path, capsys: Any) -> None:
    still = [word for key in ("lr=1e-12", "warmup_lr=0", "min_lr=0") for word in ("--set", f"train.{key}")]
    longer = TextTokenizer.load(base / layout.TOKENIZER).max_tokens + 3
    still += ["--set", "task.from_scratch=true", "--set", f"data.tokenizer.max_tokens={longer}"]
    assert finetune("snli-ve", *still, "--out", tmp_path / "a") == 0
    tuned = read_tensors(tmp_path / "a" / "checkpoints" / "step-00000004" / layout.MODEL)
    before = read_tensors(base / "checkpoints" / "step-00000003" / layout.MODEL)
    assert TextTokenizer.load(tmp_path / "a" / layout.TOKENIZER).max_tokens == longer
    assert not torch.allclose(tuned["system.image.weight"], before["image.weight"], atol=1e-3)
    assert f"tokenizer alone of {base}" in capsys.readouterr().out
    told = learned(tmp_path / "a", load_recipe(str(tmp_path / "a" / layout.RECIPE)), 4)
    assert (told["trained_on"], told["samples_seen"]) == ("nothing (task.from_scratch)", 0)
    assert told["tuned_on"]["from"] is None


def test_paths_in_the_written_recipe_hold_from_any_directory(finetune: Finetune, tmp_path: Path) -> None:
    assert finetune("vqa", "--out", tmp_path / "a") == 0
    answers = "a/answers.json"  # the fixture works in tmp_path
    assert finetune("vqa", "--set", f"task.answers={answers}", "--out", tmp_path / "b") == 0
    written = load_recipe(str(tmp_path / "b" / layout.RECIPE)).task
    assert isinstance(written, VqaTask)
    assert written.answers == str(tmp_path / answers)


def test_pairs_have_data_of_their_own(finetune: Finetune, tmp_path: Path) -> None:
    """What `--data` names comes with its own images: the base's image root is forgotten."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [write_pairs(tmp_path / split, split=split).read_text().splitlines() for split in ("train", "dev")]
    folders = [tmp_path / "train", tmp_path / "dev"]
    with pairs.open("w") as file:
        for folder, lines in zip(folders, rows, strict=True):
            for row in map(json.loads, lines):
                images = {key: str(folder / row[key]) for key in ("image", "second")}
                file.write(json.dumps({**row, **images}) + "\n")
    assert finetune("nlvr2", "--data", pairs) == 0
    row = json.loads((tmp_path / "runs" / "base-nlvr2" / layout.BEST).read_text())["best"]
    assert row.keys() == {"step", "epoch", "accuracy", "consistency"}


def test_retrieval_is_judged_by_its_recalls(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vlscale.tasks import validation

    asked: list[Any] = []

    class Result:
        metrics: ClassVar = {"rsum": 12.0}

    def evaluate(system: nn.Module, samples: list[Any], *rest: Any, **options: Any) -> Result:
        asked.append((system.training, len(samples), options["rerank"]))
        return Result()

    monkeypatch.setattr(validation, "evaluate_retrieval", evaluate)
    assert finetune("retrieval", "--set", "eval.validation=5", "--set", "eval.rerank=3") == 0
    assert asked[-1] == (False, 5, 3)
    best = json.loads((tmp_path / "runs" / "base-retrieval" / layout.BEST).read_text())
    assert best["best"]["rsum"] == 12.0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"eval": {"validation": 0}}, "eval.validation is 0"),
        ({"data": {"path": "train"}}, "no split val or dev in the data"),
        ({"data": {"path": "captions"}}, "no question with an answer in split"),
    ],
)
def test_without_validation_the_last_epoch_counts(
    finetune: Finetune, tmp_path: Path, capsys: Any, options: dict[str, Any], why: str
) -> None:
    if "data" in options:
        data = write_splits(tmp_path / "other", ("train",))
        if options["data"]["path"] == "captions":
            rows = [json.loads(line) for line in data.read_text().splitlines()]
            plain = [{**row, "questions": [], "split": "val", "id": f"{row['id']}v"} for row in rows]
            data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *plain]))
        options = {"data": {"path": str(data)}}
    assert finetune("vqa", **options) == 0
    printed = capsys.readouterr().out
    assert printed.count(why) == 1
    assert "the last one counts" in printed
    out = tmp_path / "runs" / "base-vqa"
    assert not (out / layout.BEST).exists()
    assert f"{out.relative_to(tmp_path)}/checkpoints/step-" in printed


def test_mistakes_are_one_line(finetune: Finetune, base: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.resources, "files", lambda package: base)
    (base / "vqa.yaml").write_text("albef_tiny: {task: {name: vqa}}")
    start = ["vlscale", "finetune"]
    for words, hint in (
        ([*start, "vqa", "--from", str(base)], "there is none for toy, only for albef_tiny; give --recipe FILE"),
        ([*start, "vqa", "--from", str(base / "nothing")], "no such folder"),
        ([*start, "dance", "--from", str(base)], "task dance: use one of retrieval, vqa"),
        ([*start, "vqa", "--from", str(base), "--recipe", "no.yaml"], "no such file"),
        ([*start, "vqa"], "--from"),
    ):
        monkeypatch.setattr("sys.argv", words)
        assert main() == 2
        error = capsys.readouterr().err
        assert hint in error
        assert error.count("\n") == 1
