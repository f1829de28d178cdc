"""One process group of one rank for the tests of this folder, and the toy system in the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.toy import ToySystem, build_toy, toy_recipe, write_data
from vlscale import distributed
from vlscale.config import Recipe
from vlscale.data.sample import Vocabulary
from vlscale.engine import build, loop


@pytest.fixture(scope="session")
def joined() -> None:
    """Join a group of one rank; the environment stays as it was, so that other tests' processes are no ranks."""
    before = dict(os.environ)
    distributed.init_from_environment()
    build.import_deepspeed().init_distributed()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def group(joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine needs: the group, and LOCAL_RANK for as long as the test runs."""
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def pretrain(group: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., loop.RunResult]:
    """`loop.pretrain` with the toy system; `system.*` attributes can be set through `attributes`."""
    threads = torch.get_num_threads()

    def run(recipe: Recipe, out: Path, attributes: dict[str, Any] | None = None, **options: Any) -> loop.RunResult:
        def build_with_attributes(recipe: Recipe, vocabulary: Vocabulary) -> ToySystem:
            system = build_toy(recipe, vocabulary)
            assert isinstance(system, ToySystem)
            for name, value in (attributes or {}).items():
                setattr(system, name, value)
            run.system = system  # type: ignore[attr-defined]
            return system

        monkeypatch.setattr(loop, "build_system", build_with_attributes)
        options.setdefault("ds_config", "zero2_cpu")
        return loop.pretrain(recipe, out=out, threads=threads, **options)

    return run


@pytest.fixture
def recipe(data: Path) -> Recipe:
    return toy_recipe(data)


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]
