"""Recipes: what ships loads, what is typed is read as meant, what is wrong is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlscale.config import LOSSES, load_recipe, recipe_names, write_recipe
from vlscale.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert set(recipe.weights) <= set(LOSSES[recipe.system.name])
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_base_recipes_carry_the_papers_numbers() -> None:
    albef, cb_vila = load_recipe("albef_base"), load_recipe("cb_vila_base")
    for recipe in (albef, cb_vila):
        train = recipe.train
        assert (train.epochs, train.global_batch, train.weight_decay) == (30, 512, 0.02)
        assert (train.warmup_lr, train.lr, train.min_lr) == (1e-5, 1e-4, 1e-5)
        assert recipe.data.image_size == 256
        assert recipe.weights == {}
    assert (albef.train.warmup_steps, cb_vila.train.warmup_steps) == (2000, 1000)
    assert albef.system.name == "albef"
    assert (albef.system.teacher.momentum, albef.system.teacher.queue_size) == (0.995, 65536)
    assert cb_vila.system.name == "cb_vila"
    assert (cb_vila.system.codebook.size, cb_vila.system.mim.ratio, cb_vila.system.warmup_steps) == (3072, 0.75, 1000)


@pytest.mark.parametrize(
    ("override", "read"),
    [("train.lr=1e-4", 1e-4), ("train.lr=2", 2.0), ("train.lr=+1.5E-3", 1.5e-3)],
)
def test_numbers_are_read_as_people_type_them(override: str, read: float) -> None:
    assert load_recipe("cb_vila_tiny", [override]).train.lr == read


def test_overrides_reach_nested_and_new_keys_in_order() -> None:
    recipe = load_recipe("cb_vila_tiny", ["weights.mlm=2", "data.augment.randaugment=[2, 7]", "weights.mlm=0.5"])
    assert recipe.weights["mlm"] == 0.5
    assert recipe.data.augment.randaugment == (2, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected KEY=VALUE"),
        ("train.speed=1", r"train\.speed: unknown key"),
        ("train.global_batch=0", r"train\.global_batch: .*greater than 0, got 0"),
        ("train.lr=fast", r"train\.lr: .*got 'fast'"),
        ("train.lr.peak=1", "lr is a value, not a section"),
        ("system.codebook.tau_until=1.5", r"system\.codebook\.tau_until"),
        ("system.name=clip", r"system: .*'albef', 'cb_vila'"),
        ("weights.clip=1", "clip is no loss of cb_vila; it has itc, itm, mlm, mim, pixel, codebook"),
        ("system.text.heads=3", r"system\.text: width 128 is no multiple of heads 3"),
        ("data.tokenizer.max_tokens=65", r"max_positions is 64"),
        ("data.augment=[1", "not YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("cb_vila_tiny", [override])
    assert "\n" not in str(caught.value)


def test_recipe_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(str(path))
    path.write_text("- a list")
    with pytest.raises(UserError, match="expected a mapping"):
        load_recipe(str(path))
    path.write_text("system: {name: albef")
    with pytest.raises(UserError, match="not YAML"):
        load_recipe(str(path))
    path.write_text(yaml.safe_dump({"system": {"name": "albef"}, "train": {"lr": "1e-3"}}))
    assert load_recipe(str(path)).name == "mine"
    assert load_recipe(str(path)).train.lr == 1e-3
    with pytest.raises(UserError, match="use one of albef_base"):
        load_recipe("albef_huge")
