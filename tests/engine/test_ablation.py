"""Rows as they are written, the runs that they make, and the arithmetic of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlscale.config import load_recipe, write_recipe
from vlscale.engine import ablation, ablation_table
from vlscale.engine.ablation import Plan, Row, Run
from vlscale.engine.ablation_table import Outcome, RowOutcome
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.tasks.recall import both_ways

ROWS = """
title: Two rows
metrics: [t2i_r1, rsum]
rows:
  - {name: "MLM + ITM", set: [weights.pixel=0, weights.mim=0]}
  - {name: all}
"""


def write_rows(folder: Path, text: str = ROWS) -> str:
    path = folder / "rows.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def plan_of(folder: Path, text: str = ROWS, common: tuple[str, ...] = (), seeds: int = 2) -> Plan:
    file = ablation.read_rows(write_rows(folder, text))
    return ablation.make_plan(file, "cb_vila_tiny", common, seeds, folder / "out")


def pretend(run: Run, metrics: dict[str, float] | None = None) -> None:
    """Leave what a run leaves: a checkpoint, and when there are metrics the result and the marker."""
    checkpoint = run.folder / layout.CHECKPOINTS / layout.checkpoint_name(4)
    checkpoint.mkdir(parents=True)
    (checkpoint / layout.COMPLETE).write_text("{}")
    write_recipe(run.recipe, run.folder / layout.RECIPE)
    rows = [{"step": step, "images_per_s": 32.0} for step in range(1, 5)]
    (run.folder / layout.METRICS_JSONL).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if metrics is not None:
        run.result("retrieval").parent.mkdir()
        layout.write_json(run.result("retrieval"), {"metrics": metrics, "protocol": {"step": 4}})
        ablation.finish(run)


def outcome(seed: int, **metrics: float) -> Outcome:
    return Outcome(seed, seed, 4, 8.0, metrics)


def test_rows_are_read(tmp_path: Path) -> None:
    file = ablation.read_rows(write_rows(tmp_path))
    assert (file.title, file.stem, file.metrics) == ("Two rows", "rows", ("t2i_r1", "rsum"))
    assert file.rows == (Row(1, "MLM + ITM", ("weights.pixel=0", "weights.mim=0")), Row(2, "all", ()))
    assert [row.folder for row in file.rows] == ["mlm-itm", "all"]


def test_a_file_beside_the_recipe_is_found(tmp_path: Path) -> None:
    write_rows(tmp_path, "rows: [{name: a}]")
    file = ablation.read_rows("rows.yaml", str(tmp_path / "recipe.yaml"))
    assert file.title == "rows"
    assert file.metrics == ablation.DEFAULT_METRICS


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rows: []", "rows: "),
        ("", "valid dictionary"),
        ("rows: [{name: a}", "not YAML"),
        ("rows: [{name: a}]\ntitel: x", "unknown key titel; there are title, metrics and rows"),
        ("rows: [{name: a}, {name: b, sets: [c=1]}]", "row 2 'b': unknown key sets; there are name and set"),
        ("rows: [{name: a}, {set: [c=1]}]", "row 2: name is missing"),
        ("rows: [{name: a}, null]", "row 2: "),
        ("rows: [{name: a, set: [{c: 1}]}]", "row 1 'a': set.0: "),
        ("rows: [{name: a}, {name: b}, {name: a}]", "row 3 'a': has the same name as row 1 'a'"),
        ("rows: [{name: a + b}, {name: A-B}]", "row 2 'A-B': has the same folder name a-b as row 1 'a + b'"),
        ("rows: [{name: '+'}]", "row 1 '+': the name needs a letter or a digit"),
        ("rows: [{name: a}]\nmetrics: [r1]", "no 'r1'; there are"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_row(text: str, hint: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path, text)
    with pytest.raises(UserError) as caught:
        ablation.read_rows(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["no_such", "no_such.yaml"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(UserError, match="--rows no_such"):
        ablation.read_rows(name)


def test_the_metrics_are_those_of_the_result_file() -> None:
    ranks = torch.zeros(2, dtype=torch.int64)
    names = [name for prefix in ("itc_", "", "sum_") for name in both_ways(ranks, ranks, prefix)]
    assert sorted(ablation.EVALUATIONS[ablation.RETRIEVAL]) == sorted(names)


@pytest.mark.parametrize("name", ablation.ablation_names())
def test_shipped_rows_fit_their_recipe(name: str, tmp_path: Path) -> None:
    file = ablation.read_rows(name)
    plan = ablation.make_plan(file, f"{name.rpartition('_')[0]}_tiny", [], 1, tmp_path)
    recipes = [run.recipe.model_dump() for run in plan.runs(file.rows)]
    assert len({json.dumps(recipe) for recipe in recipes}) == len(file.rows)
    assert len({json.dumps(recipe["train"]) for recipe in recipes}) == 1


def test_a_wrong_override_is_found_in_any_row(tmp_path: Path) -> None:
    text = "rows: [{name: a}, {name: b, set: [system.codebok.size=8]}]"
    with pytest.raises(UserError, match=r"row 2 'b': .*system\.codebok"):
        plan_of(tmp_path, text)
    with pytest.raises(UserError, match=r"row 1 'a': sets train\.seed"):
        plan_of(tmp_path, "rows: [{name: a, set: [train.seed=3]}]")
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, common=("train.lrr=1",))
    assert "row" not in str(caught.value)


def test_rows_come_after_what_is_common_and_seeds_count_from_the_recipes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, common=("weights.mim=2", "weights.itm=5", "train.seed=7"))
    runs = plan.runs(plan.file.rows)
    assert [(run.row.number, run.seed) for run in runs] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert [run.recipe.train.seed for run in runs] == [7, 7, 8, 8]
    assert [run.recipe.weights["mim"] for run in runs] == [0, 2, 0, 2]
    assert {run.recipe.weights["itm"] for run in runs} == {5}
    assert runs[2].folder == tmp_path / "out" / "mlm-itm" / "seed-1"
    assert load_recipe("cb_vila_tiny", list(runs[2].overrides)) == runs[2].recipe


def test_only_chooses_rows_by_number(tmp_path: Path) -> None:
    file = ablation.read_rows(write_rows(tmp_path))
    assert ablation.choose(file, []) == list(file.rows)
    assert ablation.choose(file, [2, 2]) == [file.rows[1]]
    for number in (0, 3):
        with pytest.raises(UserError, match=f"--only {number}: .* rows 1 to 2"):
            ablation.choose(file, [number])


def test_a_result_without_the_marker_is_not_finished(tmp_path: Path) -> None:
    run = plan_of(tmp_path).runs(plan_of(tmp_path).file.rows)[0]
    pretend(run, {"rsum": 1.0})
    assert run.finished
    (run.folder / ablation.FINISHED).unlink()
    assert not run.finished


def test_a_folder_of_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    run, begun = plan.runs(plan.file.rows)[:2]
    pretend(run, {"rsum": 1.0})
    pretend(begun)
    ablation_table.collect(plan)
    with pytest.raises(UserError, match=r"mlm-itm/seed-0/recipe\.yaml: .*train\.lr"):
        ablation_table.collect(plan_of(tmp_path, common=("train.lr=0.5",)))
    with pytest.raises(UserError, match=r"evaluated with eval\.rerank=16, now it is 2"):
        ablation_table.collect(plan_of(tmp_path, common=("eval.rerank=2",)))
    (begun.folder / layout.CHECKPOINTS / layout.checkpoint_name(4) / layout.COMPLETE).unlink()
    ablation.require_same(plan_of(tmp_path, common=("train.lr=0.5",)).run(begun.row, 0))  # nothing to lose


def test_a_run_is_held_by_one_command(tmp_path: Path) -> None:
    run = plan_of(tmp_path).run(Row(1, "a", ()), 0)
    with ablation.claim(run), pytest.raises(UserError, match="another vlscale ablate"):
        ablation.claim(run)
    ablation.claim(run).close()


def test_mean_and_sample_deviation() -> None:
    row = RowOutcome(Row(1, "a", ()), (outcome(0, rsum=1.0), outcome(1, rsum=2.0), outcome(2, rsum=6.0)))
    assert row.mean("rsum") == 3.0
    assert row.deviation("rsum") == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert row.mean("itc_rsum") is None
    one = RowOutcome(Row(1, "a", ()), (outcome(0, rsum=1.0),))
    assert (one.mean("rsum"), one.deviation("rsum")) == (1.0, None)


def test_the_table_tells_missing_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ROWS.replace("name: all", 'name: "all | of it"'))
    first, second = plan.file.rows
    rows = [
        RowOutcome(first, (outcome(0, t2i_r1=10.0, rsum=100.0), outcome(1, t2i_r1=20.0, rsum=100.0))),
        RowOutcome(second, (outcome(1, rsum=50.0),)),
    ]
    lines = ablation_table.as_markdown(plan, rows).splitlines()
    assert lines[0] == "# Two rows"
    assert "2 seeds" in lines[2]
    assert "4 steps" in lines[2]
    assert lines[4:] == [
        "|  | t2i_r1 | rsum |",
        "| --- | ---: | ---: |",
        "| MLM + ITM | 15.0 ± 7.1 | 100.0 ± 0.0 |",
        r"| all \| of it (1 of 2 seeds) | – | 50.0 |",
    ]
    assert ablation_table.as_table(plan, rows).row_count == 2


def test_all_that_is_there_is_written(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=1)
    for seed in (0, 1):  # one more than asked for
        pretend(plan.run(plan.file.rows[0], seed), {"t2i_r1": 10.0 * seed, "rsum": 1.0, "sum_rsum": 2.0})
    pretend(plan.run(plan.file.rows[1], 0))
    ablation_table.write(plan, ablation_table.collect(plan))
    summary: dict[str, Any] = json.loads((plan.out / "ablation.json").read_text())
    row, begun = summary["rows"]
    assert (summary["recipe"], summary["seeds"], summary["columns"]) == ("cb_vila_tiny", 1, ["t2i_r1", "rsum"])
    assert row["overrides"] == ["weights.pixel=0", "weights.mim=0"]
    assert (row["n"], row["mean"]["t2i_r1"], row["mean"]["sum_rsum"]) == (2, 5.0, 2.0)
    assert row["std"]["t2i_r1"] == pytest.approx(50**0.5)
    assert [(run["seed"], run["train_seed"], run["steps"], run["seconds"]) for run in row["runs"]] == [
        (0, 0, 4, 8.0),
        (1, 1, 4, 8.0),
    ]
    assert (begun["n"], begun["runs"], begun["mean"]) == (0, [], {})
    assert "MLM + ITM (2 seeds)" in (plan.out / "ablation.md").read_text()
    assert {path.name for path in plan.out.iterdir() if path.is_file()} == {"ablation.json", "ablation.md"}
