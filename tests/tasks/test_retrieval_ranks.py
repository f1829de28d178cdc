"""Retrieval shared by ranks, in folds, and query by query: predictions and the page."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.ranks import run_ranks
from tests.small_run import make_parts, make_run
from tests.tasks import retrieval_main
from tests.tasks.test_retrieval import Parts
from tests.tasks.test_stages import plant
from tests.tasks.test_stages import run as run_stages
from vlscale.cli.main import main
from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.inspect.retrieval import chosen, draw_retrieval
from vlscale.tasks import features
from vlscale.tasks.folds import fold_size, subsets
from vlscale.tasks.rankings import predictions, ranking
from vlscale.tasks.retrieval import RetrievalResult, evaluate_retrieval, retrieval_table, run_retrieval


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic on every machine."""
    monkeypatch.setattr(features.Precision, "of", lambda device, _system: features.Precision(device, torch.float32))
    monkeypatch.setattr(features, "IMAGE_TOKEN_BUDGET", features.IMAGE_TOKEN_BUDGET)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("data"), "cb_vila")


def evaluate(parts: Parts, samples: list[Sample] | None = None, rerank: int = 3, **options: Any) -> RetrievalResult:
    system, own, recipe, tokenizer = parts
    return evaluate_retrieval(
        system,  # type: ignore[arg-type]
        own if samples is None else samples,
        recipe,
        tokenizer,
        rerank=rerank,
        batch_size=4,
        device="cpu",
        **options,
    )


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.Precision, "of", None)
        patch.setattr(features, "IMAGE_TOKEN_BUDGET", features.IMAGE_TOKEN_BUDGET)
        found = retrieval_main.cases(tmp_path_factory.mktemp("alone"))
        return {name: json.loads(json.dumps(retrieval_main.as_json(result))) for name, result in found.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_agree_with_one(world: int, alone: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks("tests.tasks.retrieval_main", {"data": str(tmp_path / "data"), "out": str(tmp_path)}, world)
    assert [code for code, _ in results] == [0] * world, results
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world))
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        for other in others:
            assert other[name]["metrics"] == first[name]["metrics"], "the same on every rank"
            assert other[name]["folds"] == first[name]["folds"]
        assert first[name]["metrics"] == pytest.approx(expected["metrics"])
        if expected["folds"] is not None:
            assert first[name]["folds"]["metrics"] == pytest.approx(expected["folds"]["metrics"])
        for ours, theirs in zip(first[name]["rankings"], expected["rankings"], strict=True):
            for field in ("queries", "rank", "candidates", "relevant"):
                assert ours[field] == theirs[field], (name, field)
            np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-5)
        card, known = (
            {k: v for k, v in one[name]["card"].items() if k != "unreadable_images"} for one in (first, alone)
        )
        assert card == known
        assert len(first[name]["card"]["unreadable_images"]) == len(expected["card"]["unreadable_images"])


def test_from_the_command_line_with_two_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    program = [str(Path(sys.executable).parent / "vlscale"), "eval", "retrieval", "--from", str(run)]
    done = subprocess.run([*program, "--nproc", "2", "--folds", "5"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    assert (result["folds"]["count"], result["folds"]["images"]) == (2, 5)
    assert (run / "eval" / "retrieval" / "index.html").is_file()
    assert done.stderr.count("retrieval among 10 images and 19 captions: at most 19") == 1
    assert "on 2 ranks" in done.stderr
    assert done.stdout.count("mean of 2 folds of 5 images") == 1


# --- folds ------------------------------------------------------------------------------------------------------------


def test_a_fold_is_what_its_images_alone_would_give(parts: Parts) -> None:
    samples = parts[1]
    result = evaluate(parts, folds="4")
    assert result.metrics == evaluate(parts).metrics, "the whole is as without folds"
    assert result.folds is not None
    alone = [evaluate(parts, samples[start : start + 4]) for start in (0, 4)]
    assert (result.folds["count"], result.folds["images"]) == (2, 4)
    for fold, own in zip(result.folds["each"], alone, strict=True):
        assert fold == pytest.approx(own.metrics)
    for name, value in result.folds["metrics"].items():
        assert value == pytest.approx(sum(own.metrics[name] for own in alone) / 2)
    levels = [own.protocol["chance"]["i2t_r1"] for own in alone]
    assert result.folds["chance"]["i2t_r1"] == pytest.approx(sum(levels) / 2)
    assert result.folds["metrics"] != result.metrics


def test_folds_are_cut_by_the_place_in_the_split() -> None:
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    first, second = subsets([1, 2, 3, 6, 7], owner, size=4, images=9)
    assert (first.images.tolist(), first.texts.tolist()) == ([0, 1, 2], [0, 1, 2, 3])
    assert (second.images.tolist(), second.texts.tolist()) == ([3, 4], [4, 5, 6])
    with pytest.raises(UserError, match="images 1 to 2 of the split have no captions"):
        subsets([0, 1, 2], torch.tensor([2]), size=2, images=3)


@pytest.mark.parametrize(("folds", "size"), [("1k", 1000), ("5k", 5000), ("500", 500), (None, None)])
def test_sizes_of_folds(folds: str | None, size: int | None) -> None:
    assert fold_size(folds, 5000) == size


@pytest.mark.parametrize("folds", ["0", "1m", "", "-5", "k", "6k"])
def test_sizes_that_there_are_not(folds: str) -> None:
    with pytest.raises(UserError, match=f"--folds {folds}: "):
        fold_size(folds, 5000)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 13])
def test_lists_begin_with_what_was_re_ranked(levels: int, k: int) -> None:
    system, image_of_text = plant(levels)
    (t2i, i2t), _ = run_stages(system, image_of_text, k)
    for direction, sims, odds in ((i2t, system.sims, system.odds), (t2i, system.sims.T, system.odds.T)):
        scores = odds.gather(1, direction.candidates[:, : direction.reranked])
        found = ranking(direction, scores)
        assert found.candidates.shape[1] == min(10, sims.shape[1])
        for query, (named, given, right) in enumerate(
            zip(found.candidates.tolist(), found.scores.tolist(), found.relevant.tolist(), strict=True)
        ):
            assert len(set(named)) == len(named)
            top, rest = named[: found.reranked], named[found.reranked :]
            assert given == [*(float(odds[query, i]) for i in top), *(float(sims[query, i]) for i in rest)]
            assert given[: len(top)] == sorted(given[: len(top)], reverse=True)
            assert given[len(top) :] == sorted(given[len(top) :], reverse=True)
            chosen_ones = direction.candidates[query, : direction.reranked].tolist()
            assert set(top) <= set(chosen_ones)
            if min(k, len(chosen_ones)) <= 10:
                assert set(top) == set(chosen_ones)
                if any(right[: len(top)]):
                    assert right.index(True) == found.rank[query], "ties count against us, in the list too"


def test_a_line_per_query(parts: Parts) -> None:
    system, samples, recipe, tokenizer = parts
    bare = Sample("bare", samples[0].image, ())
    result = evaluate((system, [*samples, bare], recipe, tokenizer), rerank=4)
    lines = list(predictions(*result.rankings, result.samples))
    captions, images = ([line for line in lines if line["way"] == way] for way in ("t2i", "i2t"))
    assert (len(captions), len(images)) == (19, 11)
    assert [line["text"] for line in captions] == [caption for sample in samples for caption in sample.captions]
    for way, of_way in (("t2i", captions), ("i2t", [line for line in images if line["rank"] is not None])):
        for k in (1, 5, 10):
            reached = 100 * sum(line["rank"] <= k for line in of_way) / len(captions if way == "t2i" else images)
            assert result.metrics[f"{way}_r{k}"] == pytest.approx(reached)
        for line in of_way:
            for one in line["top"]:
                assert one["right"] == (one["image"] == line["image"])
                assert one["id"] == result.samples[one["image"]].id
            assert [one["reranked"] for one in line["top"]] == [True] * 4 + [False] * 6
    assert images[-1] == {"way": "i2t", "id": "bare", "image": 10, "rank": None, "top": images[-1]["top"]}
    one = images[0]["top"][0]
    assert one["text"] == samples[one["image"]].captions[one["caption"]]


# --- the page ---------------------------------------------------------------------------------------------------------


def query(image: int, rank: int | None, *scores: float, way: str = "t2i") -> dict[str, Any]:
    top = [
        {"id": "x", "image": 0, "score": s, "right": at + 1 == rank, "reranked": True} for at, s in enumerate(scores)
    ]
    return {"way": way, "id": str(image), "image": image, "rank": rank, "top": top}


def test_best_and_worst_queries() -> None:
    sure, sure_too, close = query(0, 1, 5.0, 1.0), query(0, 1, 4.5, 1.0), query(1, 1, 5.0, 4.9)
    third, far, none = query(2, 3, 5.0, 4.0, 3.0), query(3, 90, 5.0, 1.0), query(4, None, 5.0)
    groups = chosen([close, sure_too, third, sure, none, far], 4)
    assert groups == {"best": [sure, close], "worst": [far, third]}
    assert chosen([none], 4) == {}


def test_the_page_shows_queries_both_ways(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path, lines, samples = run_retrieval(str(run), folds="5")
    page = draw_retrieval(path, lines, samples, 4)
    assert page == run / "eval" / "retrieval" / "index.html"
    text = page.read_text()
    pictures = sorted(entry.name for entry in page.parent.glob("*.png"))
    assert pictures
    assert all(f'src="{name}"' in text for name in pictures)
    assert {name.split("-")[0] for name in pictures} == {"t2i", "i2t"}
    assert "<b>&amp; co" not in text
    assert html.escape("<b>& co") in text
    assert "mean of 2 folds of 5 images, first stage (uni-modal)" in text
    assert draw_retrieval(path, lines, samples, 2) == page, "an earlier page goes"


def test_a_broken_image_is_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path, lines, samples = run_retrieval(str(run))
    for sample in samples:
        Path(str(sample.image)).write_bytes(b"no picture")
    text = draw_retrieval(path, lines, samples, 4).read_text()
    assert "Not drawn:" in text
    assert "<img" not in text


def test_wrong_names_and_what_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)

    def vlscale(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["vlscale", "eval", "retrieval", "--from", str(run), *options])
        return main()

    for options, hint in ((["--folds", "x"], "--folds x: expected"), (["--out", "result.txt"], ".json")):
        assert vlscale(*options) == 2
        error = capfd.readouterr().err
        assert hint in error
        assert error.count("\n") == 1
    assert vlscale("--rerank", "0") == 0
    shown = capfd.readouterr()
    assert "first stage (uni-modal)" in shown.out
    assert "re-ranked by ITM " not in shown.out
    assert "a pre-trained checkpoint, not tuned" in " ".join(shown.out.split())
    assert "no pairs to score" in shown.err


def test_the_table_names_what_a_checkpoint_was_tuned_on(parts: Parts, tmp_path: Path) -> None:
    result = evaluate(parts)
    card = result.protocol | {"tuned_on": {"task": "retrieval", "data": "coco[x]", "samples_seen": 3, "from": None}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"metrics": result.metrics, "protocol": card}))
    assert r"tuned for retrieval on coco\[x]" in str(retrieval_table(path).caption)
