"""Stages timed on a clock that the stages move, inputs of the size that each system takes, and every small recipe."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from tests.small_run import make_run
from tests.tasks.joint import CELL, Joint
from vlscale.config import Recipe, load_recipe, recipe_names
from vlscale.data.sample import Batch, Vocabulary
from vlscale.errors import UserError
from vlscale.systems.protocol import System
from vlscale.tasks import inference
from vlscale.tasks.features import Precision
from vlscale.tasks.inference import Subject, find_subject, make_inputs, run_inference

CPU = torch.device("cpu")
VOCABULARY = Vocabulary(200, 0, 1, 2, 3)


def subject(tree: dict[str, Any], data: dict[str, Any]) -> Subject:
    recipe = Recipe.model_validate({"name": "asked", "system": tree, "weights": {"itm": 0}, "data": data})
    return Subject(cast(System, Joint()), recipe, VOCABULARY, "none", CPU)


@pytest.mark.parametrize(
    ("data", "shape"), [({"aspect": {}}, (640, 1024)), ({"aspect": {"multiple": 32}}, (608, 1024)), ({}, (640, 1024))]
)
def test_padded_inputs(data: dict[str, Any], shape: tuple[int, int]) -> None:
    batch = make_inputs(subject({"name": "soho"}, data), 600, 1000, 16, 3)
    assert batch.images.shape == (3, 3, *shape)
    assert batch.image_sizes is not None
    assert batch.image_sizes.tolist() == [[600, 1000]] * 3
    assert batch.input_ids.shape == (3, 16)
    assert batch.attention_mask.all()


def test_square_systems_get_their_own_size() -> None:
    batch = make_inputs(subject({"name": "albef"}, {"image_size": 48}), 600, 1000, 5, 1)
    assert batch.images.shape == (1, 3, 48, 48)
    assert batch.image_sizes is None


def test_stages_are_those_of_the_system() -> None:
    torch.manual_seed(0)
    system = Joint().eval()
    asked = subject({"name": "soho"}, {"aspect": {"multiple": CELL}})
    batch = make_inputs(asked, 5 * CELL - 3, 3 * CELL, 6, 2)
    with torch.inference_mode():
        stages, visual_tokens = inference.system_stages(cast(System, system), batch, Precision(CPU, torch.float32))
        found = {name: run() for name, run in stages}
        expected = system.match_logits(system.fuse(system.encode_text(batch), system.encode_image(batch)))
    assert list(found) == ["vision", "text", "fusion"]
    assert visual_tokens == 15
    assert torch.equal(cast(torch.Tensor, found["fusion"]), expected)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: now[0])
    return now


def takes(clock: list[float], milliseconds: list[float]) -> Callable[[], object]:
    """A stage that takes the next of these times at each call."""
    times = iter(milliseconds)

    def stage() -> None:
        clock[0] += next(times) / 1000

    return stage


def test_medians_and_shares(clock: list[float]) -> None:
    warm_up = [1000.0] * inference.WARM_UP
    stages = [("cnn", takes(clock, [*warm_up, 6, 7, 100])), ("joint", takes(clock, [*warm_up, 21, 20, 30]))]
    seen: list[tuple[int, int]] = []
    passes = inference.time_stages(stages, CPU, 3, lambda _, done, total: seen.append((done, total)))
    assert passes == [pytest.approx(times) for times in ([6, 21], [7, 20], [100, 30])]
    cnn, joint = inference.summary(["cnn", "joint"], passes)
    assert (cnn.name, joint.name) == ("cnn", "joint")
    assert (cnn.ms.lowest, cnn.ms.median, cnn.ms.highest) == pytest.approx((6, 7, 100))
    assert (cnn.share, joint.share) == pytest.approx((0.25, 0.75))
    assert seen[-1] == (inference.WARM_UP + 3,) * 2


def test_cuda_is_waited_for_around_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read only when the device has done what was queued."""
    events: list[str] = []

    def read() -> float:
        events.append("read")
        return 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(inference.time, "perf_counter", read)
    stages = [("one", lambda: events.append("one")), ("two", lambda: events.append("two"))]
    inference.time_stages(stages, torch.device("cuda"), 1, lambda *_: None)
    around = [["wait", "read", name, "wait", "read"] for name in ("one", "two")]
    assert events == list(itertools.chain(*around)) * (inference.WARM_UP + 1)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("_tiny")])
def test_every_small_recipe(name: str) -> None:
    report = run_inference(name, height=50, width=70, tokens=7, batch=2, repeats=2)
    recipe = load_recipe(name)
    side = 0 if recipe.system.concepts else recipe.data.image_size  # regions are no pixels
    assert report.seen_size == ((64, 128) if recipe.system.padded_inputs else (side, side))
    assert (report.recipe, report.asked_size, report.text_tokens, report.batch) == (name, (50, 70), 7, 2)
    assert "random" in report.weights
    assert [stage.name for stage in report.stages] == ["vision", "text", "fusion"]
    assert sum(stage.share for stage in report.stages) == pytest.approx(1)
    assert all(0 < stage.ms.lowest <= stage.ms.median <= stage.ms.highest for stage in report.stages)
    assert report.total.lowest >= sum(stage.ms.lowest for stage in report.stages)
    assert report.visual_tokens > 1


def test_a_run_and_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    checkpoint = next((run / "checkpoints").iterdir())
    for source in (run, checkpoint):
        report = run_inference(str(source), tokens=4, repeats=1)
        assert report.weights.endswith("step-00000003")
        assert (report.seen_size, report.visual_tokens) == ((32, 32), 17)
    path = tmp_path / "times.json"
    report.write(path)
    written = json.loads(path.read_text())
    assert (written["task"], written["stages"][0]["name"]) == ("inference", "vision")
    assert written["total"]["median"] == report.total.median
    with pytest.raises(UserError, match="can't be written"):
        report.write(tmp_path)


def test_no_weights_are_fetched(tmp_path: Path) -> None:
    tree = load_recipe("albef_tiny", ["system.text.init=no/such-model"]).model_dump(mode="json")
    path = tmp_path / "fetches.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = find_subject(str(path))
    assert found.recipe.system.text.init == "random"
    assert isinstance(found.system, torch.nn.Module)
    assert not found.system.training


def test_dropout_is_off() -> None:
    found = find_subject("albef_tiny")
    batch: Batch = make_inputs(found, 8, 8, 4, 1)
    with torch.inference_mode():
        stages, _ = inference.system_stages(found.system, batch, Precision(CPU, torch.float32))
        for _, run in stages:
            first, second = run(), run()
            assert all(map(torch.equal, first, second))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["height", "width", "tokens", "batch", "repeats"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} 0: expected 1 or more"):
        run_inference("albef_tiny", **{name: 0})  # type: ignore[arg-type]


def test_more_tokens_than_positions() -> None:
    with pytest.raises(UserError, match="--tokens 65: albef_tiny has positions for 64"):
        run_inference("albef_tiny", tokens=65)


def test_nothing_by_that_name() -> None:
    with pytest.raises(UserError, match=r"no such run folder or checkpoint, and no recipe .* albef_tiny"):
        find_subject("runs/none")
