"""Runs compared: what is read of a folder, which curves are drawn together, tables, and one page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.small_run import make_recipe, make_run
from vlscale.cli.main import main
from vlscale.config import Recipe, load_recipe, write_recipe
from vlscale.errors import UserError
from vlscale.inspect.compare import as_table, compare_runs, curves_of, sections_of
from vlscale.inspect.curves import last_value, limits_of, smooth, stages_of
from vlscale.inspect.run_log import Curve, read_run, with_own_names
from vlscale.interop import layout
from vlscale.interop.run import load_run


def rows(steps: int, **columns: float) -> list[dict[str, Any]]:
    """Steps at 16 images a second; each column falls from its value to 0."""
    fixed = {"lr": 1e-3, "images_per_s": 16.0, "skipped_steps": 0}
    return [
        {"step": step, "epoch": step / 10, **{k: v * (1 - step / steps) for k, v in columns.items()}, **fixed}
        for step in range(1, steps + 1)
    ]


def log_steps(folder: Path, lines: list[dict[str, Any]], rest: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / layout.METRICS_JSONL).write_text(text + rest, encoding="utf-8")


def run_of(folder: Path, recipe: Recipe, lines: list[dict[str, Any]]) -> Path:
    log_steps(folder, lines)
    write_recipe(recipe, folder / layout.RECIPE)
    return folder


def result(folder: Path, task: str, metrics: dict[str, float], **card: Any) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    content = {"task": task, "metrics": metrics, "protocol": {"split_hash": "a", **card}}
    layout.write_json(folder / "eval" / f"{task}.json", content)


@pytest.fixture
def albef(tmp_path: Path) -> Path:
    recipe = make_recipe(tmp_path / "none.jsonl", "albef")
    return run_of(tmp_path / "a" / "mine", recipe, rows(40, loss=9.0, itc=4.0, itm=1.0, mlm=4.0, itc_accuracy=1.0))


@pytest.fixture
def cb_vila(tmp_path: Path) -> Path:
    recipe = make_recipe(tmp_path / "none.jsonl", "cb_vila")
    lines = rows(20, loss=9.0, itc=5.0, itm=1.0, pixel=2.0, codebook_dead=1.0)
    return run_of(tmp_path / "b" / "mine", recipe, lines)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_a_folder_tells(albef: Path) -> None:
    log = read_run(albef)
    assert (log.name, log.steps, log.begins) == ("mine", 40, [])
    assert log.seconds == pytest.approx(40 * 512 / 16)
    assert log.weights is None
    assert set(log.curves) == {"loss", "itc", "itm", "mlm", "itc_accuracy", "lr", "images_per_s"}
    assert log.curves["itm"].steps.tolist() == list(range(1, 41))
    assert log.curves["itm"].values[:2].tolist() == pytest.approx([0.975, 0.95])


def test_a_line_that_is_being_written_and_values_that_are_not_finite(albef: Path) -> None:
    lines = rows(3, loss=1.0)
    lines[1]["loss"] = None
    log_steps(albef, lines, rest='{"step": 4, "lo')
    log = read_run(albef)
    assert log.steps == 3
    assert np.isnan(log.curves["loss"].values).tolist() == [False, True, False]


def test_stages_stand_behind_one_another(tmp_path: Path) -> None:
    recipe = load_recipe("mvptr_tiny")
    run = run_of(tmp_path / "run", recipe, rows(30, vsc=2.0, itm=1.0))
    for stage in ("stage-1", "stage-x"):
        log_steps(run / stage, rows(20, vsc=3.0))
    log = read_run(run)
    assert (log.steps, log.begins) == (50, [20])
    assert log.curves["vsc"].steps.tolist() == list(range(1, 51))
    assert log.curves["itm"].steps.tolist() == list(range(21, 51))
    log_steps(run, [])
    assert (read_run(run).steps, read_run(run).begins) == (20, [20]), "the second stage has not begun"


def test_weights_are_counted_from_the_file_s_header(tmp_path: Path) -> None:
    run = make_run(tmp_path, "albef")
    log_steps(run, rows(3, loss=1.0))
    system = load_run(str(run)).system
    assert read_run(run).weights == sum(value.numel() for value in system.state_dict().values())


def test_folders_without_a_run_are_named(tmp_path: Path, albef: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no recipe\.yaml in it"):
        read_run(tmp_path / "nothing")
    (albef / layout.METRICS_JSONL).unlink()
    with pytest.raises(UserError, match="mine: no step was logged yet"):
        read_run(albef)


def test_names_tell_runs_apart(albef: Path, cb_vila: Path) -> None:
    logs = [read_run(albef), read_run(cb_vila)]
    with_own_names(logs, [albef, cb_vila])
    assert [log.name for log in logs] == ["a/mine", "b/mine"]
    with_own_names(logs, [albef, albef])  # the same twice: nothing tells them apart
    assert logs[0].name == logs[1].name


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 99])
def test_smoothing_is_a_mean_of_what_is_finite(window: int) -> None:
    values = np.random.default_rng(0).normal(size=23)
    values[[3, 4, 5, 11]] = [math.nan, math.inf, math.nan, -math.inf]
    found = smooth(values, window)
    for place in range(len(values)):
        around = values[max(0, place - (window - 1) // 2) : place + window // 2 + 1]
        finite = around[np.isfinite(around)]
        expected = finite.mean() if len(finite) else math.nan
        assert found[place] == pytest.approx(expected, nan_ok=True)


def test_curves_are_cut_where_a_stage_begins() -> None:
    curve = Curve(np.array([2.0, 3.0, 4.0, 5.0]), np.array([1.0, 3.0, 10.0, 30.0]))
    assert [part.values.tolist() for part in stages_of(curve, [1, 3])] == [[1.0, 3.0], [10.0, 30.0]]
    assert last_value(curve, [1, 3], 9) == 20.0
    assert last_value(curve, window=9) == 11.0


def test_first_steps_far_off_don_t_squeeze_the_rest_flat() -> None:
    steps = np.arange(1.0, 101.0)
    falling = np.where(steps <= 3, 50.0, 2.0 - steps / 100)
    assert limits_of([Curve(steps, falling), Curve(steps, falling + 1)]) == pytest.approx((0.61, 3.33), abs=0.01)
    assert limits_of([Curve(steps, 2.0 - steps / 100)]) is None
    assert limits_of([Curve(steps, np.full(100, math.nan))]) is None
    assert limits_of([]) is None


def test_systems_share_some_curves(albef: Path, cb_vila: Path) -> None:
    losses, shared, alone = curves_of([read_run(albef), read_run(cb_vila)])
    assert losses == ["loss", "itc", "itm", "mlm", "pixel"]
    assert shared == ["lr", "images_per_s"]
    assert alone == ["codebook_dead", "itc_accuracy"]


# --- tables and page --------------------------------------------------------------------------------------------------


def test_numbers_side_by_side(albef: Path, cb_vila: Path) -> None:
    result(albef, "retrieval", {"rsum": 300.5, "t2i_r1": 20.0}, rerank=16)
    result(cb_vila, "retrieval", {"rsum": 280.25, "t2i_r1": 20.0}, rerank=32)
    result(cb_vila, "objectives", {"mim_loss": 2.5})
    (cb_vila / "eval" / "broken.json").write_text("{")
    logs = [read_run(albef), read_run(cb_vila)]
    with_own_names(logs, [albef, cb_vila])
    sections = {section.title: section for section in sections_of(logs, None)}
    assert list(sections) == ["run", "at the end, smoothed", "eval retrieval", "eval objectives"]
    assert dict(sections["run"].rows)["steps"] == ["40", "20"]
    assert dict(sections["at the end, smoothed"].rows)["pixel"] == ["", "0"]
    retrieval = sections["eval retrieval"]
    assert retrieval.rows == [("rsum", ["300.5", "280.2"]), ("t2i_r1", ["20", "20"])]
    assert retrieval.warning == "not measured alike: rerank differ"
    assert sections["eval objectives"].rows == [("mim_loss", ["", "2.5"])]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table(logs, list(sections.values())))
    shown = console.export_text(styles=True)
    assert "\x1b[1m300.5\x1b[0m" in shown
    assert "\x1b[1m280.2" not in shown
    assert "\x1b[1m20\x1b[0m" not in shown, "equal numbers are not told apart"


def test_folds_are_rows_of_their_own(albef: Path, cb_vila: Path) -> None:
    result(albef, "retrieval", {"rsum": 300.0})
    path = albef / "eval" / "retrieval.json"
    content = json.loads(path.read_text()) | {"folds": {"images": 1000, "count": 5, "metrics": {"rsum": 420.0}}}
    layout.write_json(path, content)
    [*_, section] = sections_of([read_run(albef), read_run(cb_vila)], None)
    assert section.rows == [("rsum", ["300", ""]), ("rsum, folds of 1000", ["420", ""])]
    assert not section.warning


def test_one_page_of_everything(albef: Path, cb_vila: Path, tmp_path: Path) -> None:
    tuned = json.loads((albef / layout.METRICS_JSONL).read_text().splitlines()[-1])
    assert tuned["step"] == 40
    epochs = [{"step": step, "epoch": step / 20, "rsum": float(step)} for step in (20, 40)]
    layout.write_json(albef / layout.BEST, {"metric": "rsum", "best": epochs[1], "epochs": epochs})
    result(albef, "retrieval", {"rsum": 300.0})
    page, _ = compare_runs([albef, cb_vila], tmp_path / "out", 5)
    assert page == tmp_path / "out" / "index.html"
    text = page.read_text()
    for name in ("losses.png", "metrics.png", "validation.png"):
        assert f'src="{name}"' in text
        picture = np.asarray(Image.open(page.parent / name).convert("RGB")).astype(int)
        for colour in ((214, 39, 40), (31, 98, 200)):  # of both runs
            near = (np.abs(picture - colour).sum(axis=2) < 30).sum()
            assert (near > 20) == (name != "validation.png" or colour[0] == 214), (name, colour)
    assert "Of one run alone, not drawn: codebook_dead, itc_accuracy." in text
    assert "a/mine" in text
    before = (page.parent / "losses.png").read_bytes()
    compare_runs([albef, cb_vila], tmp_path / "out", 5)
    assert (page.parent / "losses.png").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        compare_runs([albef, cb_vila], tmp_path / "mine")


def test_names_from_outside_are_escaped(tmp_path: Path, cb_vila: Path) -> None:
    recipe = make_recipe(tmp_path / "none.jsonl", "albef")
    run = run_of(tmp_path / "<b>$x$ [red]", recipe, rows(5, loss=1.0, **{"<i>m</i>": 1.0}))
    result(run, "retrieval", {"<u>": 3.0})
    page, table = compare_runs([run, cb_vila], tmp_path / "out")
    text = page.read_text()
    assert not {tag for tag in ("<b>$", "<i>m", "<u>") if tag in text}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    assert "[red]" in console.export_text()


def test_from_the_command_line(
    albef: Path, cb_vila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def vlscale(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["vlscale", "compare", *map(str, arguments)])
        return main()

    assert vlscale(albef, cb_vila, "--out", tmp_path / "out") == 0
    assert str(tmp_path / "out" / "index.html") in capfd.readouterr().out
    for arguments, hint in (([albef], "two or more"), ([albef, tmp_path], "no recipe.yaml")):
        assert vlscale(*arguments, "--out", tmp_path / "other") == 2
        error = capfd.readouterr().err
        assert hint in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
