from pathlib import Path

import pytest

from tests.engine.toy import toy_recipe, write_data
from vlscale.config import load_recipe
from vlscale.engine import describe as module
from vlscale.engine.describe import describe
from vlscale.errors import UserError


def test_parts_add_up_and_steps_follow_from_the_data(tmp_path: Path) -> None:
    recipe = load_recipe("cb_vila_tiny", ["train.max_steps=null", "train.epochs=2", "train.micro_batch=16"])
    result = describe(recipe, "zero2_cpu", 2)
    parameters = dict(result["parameters"])
    assert parameters.pop("total") == sum(parameters.values()) > 1e6
    assert result["batch"]["passes accumulated"] == 2
    assert result["steps"]["total"] == round(2 * recipe.data.scenes.train / recipe.train.global_batch)
    assert result["deepspeed_config"]["train_batch_size"] == recipe.train.global_batch
    assert "not counted" in result["memory_per_rank"]["activations"]


def test_nothing_big_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    make = module.build_system
    monkeypatch.setattr(module, "build_system", lambda *args: built.append(make(*args)) or built[0])
    describe(load_recipe("cb_vila_tiny"), "zero2_cpu", 1)
    assert all(parameter.is_meta for parameter in built[0].parameters())


def test_data_is_counted_where_it_is_and_unknown_where_not(tmp_path: Path) -> None:
    recipe = load_recipe("cb_vila_tiny", [f"data.path={write_data(tmp_path)}", "train.global_batch=8"])
    assert describe(recipe, "zero2_cpu", 1)["steps"]["training images"] == 24
    gone = load_recipe("cb_vila_tiny", ["data.path=/nowhere/x.jsonl", "train.max_steps=null", "train.epochs=1"])
    steps = describe(gone, "zero2_cpu", 1)["steps"]
    assert "unknown" in steps["total"]
    assert "unknown" in steps["training images"]


def test_memory_of_a_rank_falls_with_the_ranks() -> None:
    recipe = load_recipe("cb_vila_tiny")
    one, two = (describe(recipe, "zero2_cpu", world)["memory_per_rank"]["total"] for world in (1, 2))
    assert float(one.split()[0]) > float(two.split()[0])


def test_a_batch_that_does_not_divide_is_told_before_the_start() -> None:
    with pytest.raises(UserError, match="not a multiple"):
        describe(toy_recipe(Path("x"), train__micro_batch=3), "zero2_cpu", 1)
