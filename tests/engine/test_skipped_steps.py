"""A step that is not finite, on one rank or on all, moves nothing: no teacher, no queue, no code, no statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import rows
from tests.engine.test_faults import Pretrain, live
from tests.engine.test_real_systems import small_recipe
from tests.engine.toy import toy_recipe
from vlscale.config import write_recipe
from vlscale.engine import build
from vlscale.errors import UserError

CARRIED = {
    "albef": ("carried/image_queue.", "carried/text_queue.", "carried/teacher."),
    "codis": ("carried/image_queue.", "carried/teacher.", "carried/codebook.", "module/codebook."),
    "cb_vila": ("carried/codebook.", "module/codebook.codes"),
    "soho": ("carried/dictionary.", "module/neck.dictionary.codes", "module/backbone.net.layer2.0.bn1.running_mean"),
}
"""What must have moved in the steps that were applied."""
FP16 = ("cb_vila", "codis", "albef")
"""The CPU has no BatchNorm of fp16."""


class Systems:
    """Real systems at two ranks: what each step changed."""

    NAN, STEPS = 8, 12

    def __init__(self, folder: Path) -> None:
        self.folder, lives = folder, []
        for name in CARRIED:
            recipe = small_recipe(folder / name, name)
            train = recipe.train.model_copy(update={"max_bad_steps": 30})
            write_recipe(recipe.model_copy(update={"train": train}), folder / name / "recipe.yaml")
            life = {"recipe": str(folder / name / "recipe.yaml"), "watch": True}
            nan = {"kind": "nan", "step": self.NAN, "rank": 1}
            lives += [{**life, "out": str(folder / name / "nan"), "fault": nan}]
            if name in FP16:
                lives += [{**life, "out": str(folder / name / "fp16"), "fp16": True}]
        self.ended = dict(zip([Path(life["out"]) for life in lives], live(folder, lives), strict=True))

    def steps(self, name: str, run: str) -> list[dict[str, Any]]:
        """The same on both ranks."""
        logs = [(self.folder / name / f"{run}.watched-{rank}").read_text() for rank in (0, 1)]
        assert logs[0] == logs[1]
        return [json.loads(line) for line in logs[0].splitlines()]


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Systems:
    return Systems(tmp_path_factory.mktemp("systems"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [*((name, "nan") for name in CARRIED), *((name, "fp16") for name in FP16)])
def test_a_skipped_step_moves_nothing(systems: Systems, name: str, run: str) -> None:
    """NaN on one rank alone; overflows of native fp16: no weight, moment, teacher, queue or code, on no rank."""
    ended = systems.ended[systems.folder / name / run]
    assert [code for code, _ in ended] == [0, 0], ended
    steps = systems.steps(name, run)
    skipped = [step["step"] for step in steps if not step["applied"]]
    assert len(steps) == Systems.STEPS
    assert skipped == [Systems.NAN] if run == "nan" else 0 < len(skipped) < Systems.STEPS
    assert rows(systems.folder / name / run)[-1]["skipped_steps"] == len(skipped)
    for step in steps:
        if step["applied"]:
            assert any(changed.startswith("master/") for changed in step["changed"])
        else:
            assert step["changed"] == [], step
    moved = {changed for step in steps for changed in step["changed"]}
    for prefix in CARRIED[name]:
        assert any(changed.startswith(prefix) for changed in moved), (prefix, sorted(moved))


def pretend_fp16(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> str:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(build.Machine, "here", staticmethod(lambda: build.Machine(cuda=True, bf16=False)))
    config = folder / "fp16.json"
    config.write_text(json.dumps({"fp16": {"enabled": True, "hysteresis": 1, **settings}}))
    return str(config)


def test_a_loss_scale_at_its_floor_is_an_alarm_and_no_end(
    pretrain: Pretrain, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed itself would raise at the first overflow there."""
    config = pretend_fp16(monkeypatch, tmp_path, initial_scale_power=2, min_loss_scale=2)
    recipe = toy_recipe(data, train__max_bad_steps=4, train__max_steps=12)
    bad = dict.fromkeys((3, 4, 5), float("nan"))
    result = pretrain(recipe, tmp_path / "run", {"poison": bad}, ds_config=config)
    assert result.finished
    assert result.metrics["skipped_steps"] == 3
    assert [row["loss_scale"] for row in rows(tmp_path / "run")][2:6] == [4.0, 2.0, 2.0, 2.0]
    alarm = "in a row; the loss scale is at its floor 2: lower train.lr, or use bfloat16"
    assert capsys.readouterr().out.count(alarm) == 3
    with pytest.raises(UserError, match="4 steps in a row were not finite"):
        pretrain(recipe, tmp_path / "worse", {"poison": dict.fromkeys(range(3, 9), float("nan"))}, ds_config=config)
