"""`--dry-run` tells what a recipe would do, on any machine, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Here
from vlscale.config import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_described(
    name: str, here: Here, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here("pretrain", name, "--dry-run", "--nproc", "2", "--set", "train.seed=7") == 0
    printed = capfd.readouterr().out
    tables, _, recipe = printed.partition("\nname: ")
    assert yaml.safe_load(f"name: {recipe}") == load_recipe(name, ["train.seed=7"]).model_dump(mode="json")
    assert "parameters" in tables
    assert "global_batch" in tables or "global batch" in tables
    assert not list(tmp_path.iterdir())
