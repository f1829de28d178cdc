"""VQA, NLVR2 and SNLI-VE of a system whose scores are known: ranks, unreadable images, files, page, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.engine.ranks import run_ranks
from tests.tasks import classified_data
from tests.tasks.classified_data import ANSWERS, LABELS, Known, make_run, recipe_of, write_data, write_pairs
from tests.tasks.classified_main import evaluate
from vlscale.cli.main import main
from vlscale.config import Recipe
from vlscale.data.sample import Batch
from vlscale.errors import UserError
from vlscale.interop import layout, origin, run
from vlscale.systems.protocol import offers
from vlscale.tasks.classified import classified_table, run_classified
from vlscale.tasks.features import Precision
from vlscale.tasks.predicting import Predicts
from vlscale.tasks.submission import write_submission


@pytest.fixture(autouse=True)
def known_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "build_system", classified_data.build_known)


def vlscale(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["vlscale", *map(str, words)])
    return main()


def assert_close(found: Any, expected: Any) -> None:
    """Numbers agree within 1e-5, everything else exactly."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


# --- scores ------------------------------------------------------------------------------------------------------


def test_what_was_answered_is_the_class_of_the_highest_score(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    found = evaluate(data, "vqa", 14)
    recipe = recipe_of(data, "vqa")
    images = torch.tensor([[37 * n % 256, 90, 255 - 20 * n % 256] for n in range(7)])
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    pixels = ((images / 255 - mean) / std).mean(1)
    tokenizer = classified_data.tokenizer_of(recipe)
    for number, row in enumerate(found["predictions"]):
        ids, mask = tokenizer.encode([row["text"]])
        words = ids.sum() / mask.sum() / 10
        facts = torch.tensor([float(words), float(pixels[number // 2]), float(pixels[number // 2])])
        scores = Known(len(ANSWERS)).weight @ facts
        assert row["predicted"] == ANSWERS[int(scores.argmax())]
        assert row["score"] == pytest.approx(scores.softmax(0).max().item(), abs=1e-5)
        assert [answer for answer, _ in row["top"]] == [ANSWERS[one] for one in scores.argsort(descending=True)[:5]]
        true = scores.softmax(0)[ANSWERS.index(row["true"])].item()
        assert row["true_score"] == pytest.approx(true, abs=1e-5)
    assert found["verdict"]["kinds"].keys() == {"yes/no", "other"}


@pytest.mark.parametrize(("task", "world", "first", "again"), [("vqa", 2, 13, 3), ("snli-ve", 3, 2, 0)])
def test_any_number_of_ranks_gives_the_same(tmp_path: Path, task: str, world: int, first: int, again: int) -> None:
    """Shares of different sizes, one of them empty; an image that can't be read; examples that come twice."""
    data = write_data(tmp_path / "data", broken=2)
    alone = json.loads(json.dumps(evaluate(data, task, first)))
    request = {"data": str(data), "task": task, "first": first, "again": again, "out": str(tmp_path)}
    results = run_ranks("tests.tasks.classified_main", request, world)
    assert [code for code, _ in results] == [0] * world, results
    together = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    assert sum(one.pop("asked") for one in together) == alone.pop("asked"), "each rank asks for its share"
    assert all(one == together[0] for one in together)
    assert together[0]["protocol"].pop("examples_with_an_id_of_another") == again
    alone["protocol"].pop("examples_with_an_id_of_another")
    assert_close(together[0], alone)


def test_examples_of_unreadable_images_count_as_wrong_and_are_named(tmp_path: Path) -> None:
    whole, found = (evaluate(write_data(tmp_path, broken=broken), "snli-ve", 14) for broken in (None, 2))
    card, rows = found["protocol"], found["predictions"]
    assert (card["examples"], card["unreadable_examples"]) == (14, 2)
    assert [Path(reason.split(":")[0]).name for reason in card["unreadable_images"]] == ["2.png"]
    assert [row["id"] for row in rows if row["predicted"] is None] == ["2#0", "2#1"]
    assert [(row["points"], row["score"], row["top"]) for row in rows[4:6]] == [(0.0, None, [])] * 2
    kept = [point for n, point in enumerate(whole["verdict"]["points"]) if n not in (4, 5)]
    assert found["verdict"]["metrics"]["accuracy"] == pytest.approx(100 * sum(kept) / 14)
    assert sum(own["unreadable"] for own in found["verdict"]["confusion"].values()) == 2


def test_nothing_readable_is_still_a_result(tmp_path: Path) -> None:
    found = evaluate(write_data(tmp_path, count=1, broken=0), "snli-ve", 2)
    assert found["verdict"]["metrics"] == {"accuracy": 0.0}


def test_answers_that_are_no_candidates_have_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(self: Known, batch: Batch) -> Tensor:
        return torch.tensor([0.0, 1.0, -torch.inf, -torch.inf, 0.0, -torch.inf]).expand(len(batch), -1)

    monkeypatch.setattr(Known, "predict", few)
    row = evaluate(write_data(tmp_path), "vqa", 1)["predictions"][0]
    assert [answer for answer, share in row["top"] if share > 0] == ["red", "yes", "blue"], "ties: the first class"
    assert row["top"][0][1] == pytest.approx(torch.tensor([0.0, 1, 0]).softmax(0)[1].item(), abs=1e-6)


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "predict", lambda self, batch: torch.full((len(batch), 3), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        evaluate(write_data(tmp_path), "snli-ve", 2)


def test_parameters_that_training_holds_in_half_precision_are_evaluated_in_it() -> None:
    """Validation within a run of native fp16, whose systems take fp32 images through autocast alone."""
    half, cpu = nn.Linear(1, 1).half(), torch.device("cpu")
    with Precision.of(cpu, half).autocast():
        assert half(torch.ones(1, 1)).dtype == torch.float16
    assert Precision.of(cpu, nn.Linear(1, 1)) == Precision.of(cpu)


def test_a_system_that_predicts_is_known_by_it() -> None:
    assert offers(Known(2), Predicts)
    assert not offers(nn.Linear(1, 1), Predicts)


# --- command line, files, page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli-ve"])
def test_from_the_command_line(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = (write_pairs if task == "nlvr2" else write_data)(tmp_path / "data")
    folder = make_run(tmp_path / "run", recipe_of(data, task))
    assert vlscale(monkeypatch, "eval", task, "--from", folder, "--count", "6") == 0
    printed = capsys.readouterr().out
    assert "guessing" in printed
    path = folder / "eval" / f"{task}.json"
    assert str(path) in printed
    result = json.loads(path.read_text())
    card = result["protocol"]
    assert result["task"] == task
    assert result["metrics"].keys() == ({"accuracy", "consistency"} if task == "nlvr2" else {"accuracy"})
    examples = 8 if task == "nlvr2" else 14
    assert (card["split"], card["examples"], card["classes"], card["step"]) == ("test", examples, len(LABELS[task]), 3)
    assert (card["resolution"], card["precision"]) == (8, card["precision"])
    assert card["tuned_on"] == {"task": task, "data": str(data), "samples_seen": 24, "from": None}
    assert set(result["metrics"]) == set(card["chance"]["guessing"])
    lines = [json.loads(line) for line in (folder / "eval" / f"{task}.predictions.jsonl").read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(examples))
    assert result["metrics"]["accuracy"] == pytest.approx(100 * sum(line["points"] for line in lines) / examples)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(classified_table(path))
    assert f"{result['metrics']['accuracy']:.1f}" in console.export_text()

    page = folder / "eval" / task / "index.html"
    html = page.read_text()
    assert "<b>&" not in html, "texts are escaped"
    shown = set(re.findall(r'<img src="([^"]+)"', html))
    assert len(shown) == 6
    assert {entry.name for entry in page.parent.iterdir()} == shown | {"index.html"}

    again = run_classified(str(folder), task, out=tmp_path / "again.json")
    assert again.path.read_text() == path.read_text(), "nothing in the file depends on when it was made"
    first = run_classified(str(folder), task, first=2, out=tmp_path / "first.json")
    card = json.loads(first.path.read_text())["protocol"]
    assert (card["first"], card["split_examples"], card["examples"]) == (2, examples, 2)


def test_a_submission_has_every_question_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of VQA v2 as published: one image can't be read, one is not there at all, and nothing is known to be right."""
    write_data(tmp_path / "images", count=4, broken=2)
    questions = [{"question_id": 1000 + n, "image_id": n // 2, "question": f"what is {n} ?"} for n in range(8)]
    questions.append({"question_id": 77, "image_id": 5, "question": "gone ?"})
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").rename(tmp_path / "images" / f"COCO_test2015_{number:012d}.jpg")
    asked = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    asked.write_text(json.dumps({"data_subtype": "test2015", "questions": questions}))
    folder = make_run(tmp_path / "run", recipe_of(write_data(tmp_path / "data"), "vqa"))
    command = ["eval", "vqa", "--from", folder, "--data", asked, "--image-root", tmp_path / "images"]
    assert vlscale(monkeypatch, *command) == 2
    out = tmp_path / "submission.json"
    assert vlscale(monkeypatch, *command, "--submission", out) == 0
    rows = json.loads(out.read_text())
    assert [row["question_id"] for row in rows] == [*range(1000, 1008), 77]
    assert all(row.keys() == {"question_id", "answer"} for row in rows)
    assert [row["answer"] for row in rows if row["question_id"] in (1004, 1005, 77)] == ["yes"] * 3
    result = json.loads((folder / "eval" / "vqa.json").read_text())
    assert result["metrics"] == {}
    assert result["protocol"]["submission"]["questions"] == 9
    lines = (folder / "eval" / "vqa.predictions.jsonl").read_text().splitlines()
    predicted = {int(line["id"]): line["predicted"] for line in map(json.loads, lines)}
    assert all(row["answer"] == (predicted.get(row["question_id"]) or "yes") for row in rows)


def test_ids_of_submissions_are_numbers_where_they_are_written_so(tmp_path: Path) -> None:
    asked = ["12", "012", "s1-q0", "٣"]
    assert write_submission(tmp_path / "s.json", asked, {"12": "yes"}, "no") == 3
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["question_id"] for row in rows] == [12, "012", "s1-q0", "٣"]
    assert [row["answer"] for row in rows] == ["yes", "no", "no", "no"]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = write_data(tmp_path / "data")
    folder = make_run(tmp_path / "run", recipe_of(data, "vqa"))
    lost = make_run(tmp_path / "lost", recipe_of(data, "vqa"))
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"image": "data/0.png", "captions": ["x"], "split": "test"}) + "\n")
    way = f"vlscale finetune snli-ve --from {folder}"
    for words, hint in (
        (["eval", "snli-ve", "--from", folder], f"was tuned for vqa; snli-ve needs a run that was tuned for it: {way}"),
        (["eval", "vqa", "--from", folder, "--first", "15"], "--first 15: expected a number of examples from 1 to 14"),
        (["eval", "vqa", "--from", folder, "--split", "val"], "no question with an answer in split dev or val"),
        (["eval", "vqa", "--from", folder, "--data", captions], "no question with an answer"),
        (["eval", "vqa", "--from", folder, "--out", tmp_path / "x"], "expected the name of a .json file"),
        (["eval", "vqa", "--from", folder, "--submission", tmp_path / "no" / "x.json"], "in a folder that exists"),
        (["eval", "vqa", "--from", tmp_path / "nothing"], "no such folder"),
    ):
        assert vlscale(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert hint in error
        assert error.startswith("vlscale: error: ")
        assert error.count("\n") == 1
    assert not (folder / "eval").exists()
    (lost / layout.ANSWERS).unlink()
    monkeypatch.setattr(run, "build_system", lambda recipe, vocabulary: Known(len(ANSWERS)))
    with pytest.raises(UserError, match="the run has lost its answers"):
        run_classified(str(lost), "vqa")


def test_a_run_that_was_not_tuned_is_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(write_data(tmp_path / "data"), "nlvr2").model_copy(update={"task": None})
    folder = make_run(tmp_path / "run", recipe)
    monkeypatch.setattr(run, "build_system", lambda recipe, vocabulary: Known(2))
    with pytest.raises(UserError, match=r"was pre-trained only; vqa needs a run .*: vlscale finetune vqa --from "):
        run_classified(str(folder), "vqa")


# --- where a run comes from --------------------------------------------------------------------------------------


def test_the_card_tells_what_a_run_was_tuned_on_and_from_where(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")

    def learned(name: str, recipe: Recipe, weights: Path | None = None) -> dict[str, Any]:
        folder = make_run(tmp_path / name, recipe)
        if weights is not None:
            origin.note_origin(folder, weights)
        return origin.learned(folder, recipe, 3)

    newest = "checkpoints/step-00000003"
    plain = recipe_of(data, "nlvr2").model_copy(update={"task": None})
    pretrained = {"trained_on": str(data), "samples_seen": 24, "tuned_on": None}
    assert learned("a", plain) == pretrained
    assert learned("stage 2", plain, tmp_path / "a" / newest) == pretrained
    once = learned("b", recipe_of(data, "vqa", train__global_batch=16), tmp_path / "a" / newest)
    tuned = {"task": "vqa", "data": str(data), "samples_seen": 48, "from": str(tmp_path / "a" / newest)}
    assert once == {"trained_on": str(data), "samples_seen": 24, "tuned_on": tuned}
    twice = learned("c", recipe_of(data, "snli-ve"), tmp_path / "b" / newest)
    assert twice["trained_on"] == str(data)
    assert twice["samples_seen"] == 24
    assert twice["tuned_on"]["before"] == tuned
    assert twice["tuned_on"]["from"] == str(tmp_path / "b" / newest)
