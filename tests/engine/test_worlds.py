"""A run goes on at another number of ranks with everything that it held, to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import rows
from tests.engine.ranks import run_ranks
from tests.engine.test_mixed import soho_toy
from tests.engine.test_real_systems import small_recipe
from tests.engine.toy import toy_recipe, write_data
from vlscale.config import Recipe, Train, write_recipe
from vlscale.engine import loop, worlds
from vlscale.engine.build import Choice, complete
from vlscale.engine.schedule import batch_plan
from vlscale.engine.worlds import _read_shard
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.export import read_tensors

MAIN = "tests.engine.worlds_main"
CUT, LAST = 7, 12
"""The toy's backbone wakes after step 6, so that at the cut its momentum and its count are not the other groups'."""
REAL = ("cb_vila", "codis", "albef", "soho", "mvptr")
TOYS: dict[str, dict[str, Any]] = {"toy": {}, "toy_sgd": {}, "toy_fp16": {"fp16": True}}


def make_recipe(folder: Path, name: str) -> Recipe:
    if name in REAL:
        return small_recipe(folder, name)
    data = write_data(folder / "data")
    return (
        soho_toy(data, train__max_steps=LAST)
        if name == "toy_sgd"
        else toy_recipe(data, train__max_steps=LAST, train__max_bad_steps=9)
    )


def checkpoint_of(folder: Path, run: str) -> Path:
    return folder / run / "checkpoints" / layout.checkpoint_name(CUT)


class Matrix:
    """Runs of several systems, each saved at 2 ranks, taken to 1 and 4, and from there back to 2."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder = folder
        self.recipes = {name: make_recipe(folder / name, name) for name in names}
        for name, recipe in self.recipes.items():
            write_recipe(recipe, folder / name / "recipe.yaml")

    def at(self, world: int, *runs: tuple[str, str | None, int]) -> str:
        """Every system's runs (folder, folder of the run to go on from, last step) at `world` ranks → what was said."""
        requests = [self.request(name, *run) for name in self.recipes for run in runs]
        ended = run_ranks(MAIN, {"runs": requests}, world, timeout=900)
        assert [code for code, _ in ended] == [0] * world, "\n".join(text[-3000:] for _, text in ended)
        assert not any(text.strip() for _, text in ended[1:]), "only rank 0 speaks"
        return ended[0][1]

    def request(self, name: str, out: str, source: str | None, last: int) -> dict[str, Any]:
        folder = self.folder / name
        request = {"recipe": str(folder / "recipe.yaml"), "out": str(folder / out), "stop_after": last}
        request |= {"toy": name in TOYS, "report": str(folder / f"{out}.held"), **TOYS.get(name, {})}
        if source is not None:
            request |= {"resume": str(checkpoint_of(folder, source)), "save": last == CUT}
        return request

    def there_and_back(self) -> dict[int, str]:
        self.at(2, ("two", None, CUT))
        said = {world: self.at(world, (f"at_{world}", "two", CUT), (f"on_{world}", "two", LAST)) for world in (1, 4)}
        said[2] = self.at(2, ("from_1", "at_1", CUT), ("from_4", "at_4", CUT), ("straight", "two", LAST))
        return said

    def assert_same(self, name: str) -> None:
        held = read_tensors(self.folder / name / "two.held")
        for other in ("at_1", "at_4", "from_1", "from_4"):
            assert_equal(read_tensors(self.folder / name / f"{other}.held"), held)
        before = checkpoint_of(self.folder / name, "two")
        for other in ("at_1", "at_4", "from_1", "from_4"):
            after = checkpoint_of(self.folder / name, other)
            for file in (layout.MODEL, layout.CARRIED):
                assert_equal(read_tensors(after / file), read_tensors(before / file))
        for other in ("from_1", "from_4"):
            for rank in range(2):
                assert_equal(_read_shard(checkpoint_of(self.folder / name, other), rank), _read_shard(before, rank))
        assert json.loads((checkpoint_of(self.folder / name, "at_4") / layout.STATE).read_text())["world_size"] == 4


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the bit, in whatever they are nested."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_equal(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for place, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(value, other, f"{where}/{place}")
    elif hasattr(ours, "cur_scale"):
        assert_equal(vars(ours), vars(theirs), where)
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, dict[int, str]]:
    matrix = Matrix(tmp_path_factory.mktemp("toys"), tuple(TOYS))
    return matrix, matrix.there_and_back()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    matrix = Matrix(tmp_path_factory.mktemp("real"), REAL)
    matrix.there_and_back()
    return matrix


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_everything_of_a_toy_is_the_same(toys: tuple[Matrix, dict[int, str]], name: str) -> None:
    toys[0].assert_same(name)


@pytest.mark.slow
def test_what_the_toys_held_is_worth_comparing(toys: tuple[Matrix, dict[int, str]]) -> None:
    """Moments that move, groups that count differently, a scale that was lowered, a parameter without dimensions."""
    folder = toys[0].folder
    for name in TOYS:
        held = read_tensors(folder / name / "two.held")
        assert held["master/temperature"].shape == ()
        assert held["exp_avg/temperature"] != 0
        assert held["exp_avg_sq/temperature"] > 0
        assert held["carried/pushed"] == CUT - held["number/skipped"]
        assert held["number/global_steps"] == CUT
        assert all(torch.isfinite(value.float()).all() for value in held.values())
    sgd = read_tensors(folder / "toy_sgd/two.held")
    assert sgd["step/backbone_decay"] == 1
    assert sgd["step/decay"] == CUT
    assert sgd["exp_avg/backbone.weight"].any()
    assert not sgd["exp_avg_sq/backbone.weight"].any()
    fp16 = read_tensors(folder / "toy_fp16/two.held")
    assert fp16["module/image.weight"].dtype == torch.float16
    assert fp16["number/skipped_steps"] > 0
    assert fp16["number/cur_scale"] != 2**17
    assert fp16["number/last_overflow_iter"] >= 0


@pytest.mark.slow
def test_the_change_is_said_once(toys: tuple[Matrix, dict[int, str]]) -> None:
    said = toys[1]
    line = "the run had {}, now {}: going on; random draws differ from here"
    assert said[1].count(line.format("2 ranks", 1)) == 2 * len(TOYS)
    assert said[4].count(line.format("2 ranks", 4)) == 2 * len(TOYS)
    assert said[2].count(line.format("1 rank", 2)) == len(TOYS)
    assert said[2].count(line.format("4 ranks", 2)) == len(TOYS)
    assert said[2].count("the run had") == 2 * len(TOYS), "the same number is not worth a word"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", ["toy", "toy_sgd"])
def test_losses_go_on_where_nothing_is_drawn(toys: tuple[Matrix, dict[int, str]], name: str, world: int) -> None:
    """Same samples, same losses but for the order of sums."""
    straight, on = (rows(toys[0].folder / name / run) for run in ("straight", f"on_{world}"))
    assert [row["step"] for row in on] == list(range(CUT + 1, LAST + 1))
    for ours, theirs in zip(on, straight, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert math.isclose(value, theirs[key], rel_tol=1e-5, abs_tol=1e-7), (key, value, theirs[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_everything_of_a_system_is_the_same(real: Matrix, name: str) -> None:
    real.assert_same(name)
    for world in (1, 4):
        log = rows(real.folder / name / f"on_{world}")
        assert [row["step"] for row in log] == list(range(CUT + 1, LAST + 1))
        assert log[-1]["skipped_steps"] == 0


def test_two_ranks_save_and_one_goes_on(
    pretrain: Callable[..., loop.RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank's images of a pass may change with the number of ranks, and only then."""
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    run = {"out": str(out), "stop_after": 5, "recipe": {"train__micro_batch": 2}}
    ended = run_ranks("tests.engine.toy_main", {"data": str(data), "runs": [run]}, 2)
    assert [code for code, _ in ended] == [0, 0], ended
    saved = read_tensors(out / "checkpoints/step-00000005" / layout.MODEL)
    with pytest.raises(UserError, match=r"train\.lr"):
        pretrain(toy_recipe(data, train__lr=1.0), out, resume="auto")
    result = pretrain(toy_recipe(data, train__micro_batch=4), out, resume="auto", stop_after=6)
    assert "the run had 2 ranks, now 1: going on" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert result.checkpoint is not None
    state = json.loads((result.checkpoint / layout.STATE).read_text())
    assert (state["world_size"], state["step"]) == (1, 6)
    moved = read_tensors(result.checkpoint / layout.MODEL)
    assert 0 < (moved["image.weight"] - saved["image.weight"]).abs().max() < 0.05
    with pytest.raises(UserError, match=r"train\.micro_batch=4, now it is 2"):
        pretrain(toy_recipe(data, train__micro_batch=2), out, resume="auto")
    assert pretrain(toy_recipe(data, train__micro_batch=4), out, resume="auto").finished


def test_the_recipe_of_a_checkpoint_holds_after_a_failed_try(
    pretrain: Callable[..., loop.RunResult], data: Path, tmp_path: Path
) -> None:
    """A start at other ranks rewrites recipe.yaml; when it dies before a save, the old number can still go on."""
    pretrain(toy_recipe(data, train__micro_batch=2), tmp_path / "run", stop_after=5)
    write_recipe(toy_recipe(data, train__micro_batch=4), tmp_path / "run" / layout.RECIPE)
    assert pretrain(toy_recipe(data, train__micro_batch=2), tmp_path / "run", resume="auto", stop_after=6).step == 6


@pytest.mark.parametrize("key", ["round_robin_gradients", "elastic_checkpoint"])
def test_layouts_that_deepspeed_gets_wrong_are_refused(key: str) -> None:
    choice = Choice("my.json", {"zero_optimization": {key: True}}, "")
    with pytest.raises(UserError, match=rf"my\.json: zero_optimization\.{key}: .*: remove it"):
        complete(choice, batch_plan(Train(global_batch=4), 1), Train())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the optimizer state of rank 0 is missing"):
        worlds.load_optimizer(None, tmp_path, 2)
