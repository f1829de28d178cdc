import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import rows
from tests.engine.toy import ToySystem, toy_recipe, write_data
from vlscale.config import Recipe
from vlscale.data.text import TextTokenizer
from vlscale.engine import build, loop
from vlscale.engine.loop import RunResult, poison, weighted_sum
from vlscale.errors import UserError
from vlscale.interop.export import read_tensors

Pretrain = Callable[..., RunResult]


def test_a_run_learns_and_leaves_its_folder(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = pretrain(recipe, out)
    assert (result.step, result.finished, result.checkpoint) == (20, True, out / "checkpoints/step-00000020")
    log = rows(out)
    assert [row["step"] for row in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"] / 1.5
    for key in ("epoch", "loss", "itc", "itm", "mlm", "accuracy", "lr", "grad_norm", "skipped_images", "skipped_steps"):
        assert isinstance(log[3][key], int | float), key
    assert log[2]["epoch"] == 1.0
    with (out / "metrics.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in log]
    for name in ("recipe.yaml", "ds_config.json", "tokenizer", "checkpoints/latest"):
        assert (out / name).exists(), name


def test_a_folder_that_holds_a_run_is_refused(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    pretrain(recipe, tmp_path / "run", stop_after=1)
    with pytest.raises(UserError, match=r"holds a run already: go on with --resume auto"):
        pretrain(recipe, tmp_path / "run")


def test_losses_of_weight_zero_are_logged_and_not_trained(pretrain: Pretrain, data: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(data, weights={"itm": 0.0, "itc": 2.0}, train__max_steps=3)
    pretrain(recipe, tmp_path / "run")
    for row in rows(tmp_path / "run"):
        assert row["itm"] > 0
        assert row["loss"] == pytest.approx(2 * row["itc"] + row["mlm"])
    weights = read_tensors(tmp_path / "run/checkpoints/step-00000003/model.safetensors")
    torch.manual_seed(0)  # as the engine does before it builds the system
    fresh = ToySystem(TextTokenizer.load(tmp_path / "run/tokenizer").vocabulary)
    assert torch.equal(weights["codes"], fresh.codes)
    assert not torch.equal(weights["image.weight"], fresh.image.weight)


def test_weighted_sum_leaves_out_what_has_no_weight() -> None:
    losses = {"itc": torch.tensor(2.0), "itm": torch.tensor(torch.nan)}
    assert weighted_sum(losses, {"itm": 0.0, "itc": 0.5}).item() == 1.0
    with pytest.raises(UserError, match="every loss has weight 0"):
        weighted_sum(losses, {"itm": 0.0, "itc": 0.0})


def test_poison_makes_gradients_nan_exactly_where_the_loss_is_not_finite() -> None:
    parameter = torch.tensor(1.5, requires_grad=True)
    (total,) = (parameter * 2,)
    (total * poison(total)).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 2.0
    parameter.grad = None
    total = parameter * 2 + torch.inf  # its own gradient is finite
    (total * poison(total)).backward()
    assert parameter.grad is not None
    assert torch.isnan(parameter.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_skips_the_step_and_everything_after_it(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(recipe, tmp_path / "good", stop_after=5)
    before = read_tensors(tmp_path / "good/checkpoints/step-00000005/model.safetensors")
    pretrain(recipe, tmp_path / "bad", {"poison": {5: value}}, stop_after=6)
    after = read_tensors(tmp_path / "bad/checkpoints/step-00000006/model.safetensors")
    # Step 6 was poisoned: parameters, average and queue are those of step 5. (`seen` is counted in the forward.)
    for name in before.keys() - {"seen"}:
        assert torch.equal(before[name], after[name]), name
    assert pretrain.system.pushed.item() == 5  # type: ignore[attr-defined]
    log = rows(tmp_path / "bad")
    assert [row["skipped_steps"] for row in log] == [0, 0, 0, 0, 0, 1]
    assert log[-1]["itc"] is None
    assert "step 6: itc" in capsys.readouterr().out


def test_training_goes_on_after_a_skipped_step(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    result = pretrain(recipe, tmp_path / "run", {"poison": {2: float("nan"), 3: float("nan"), 9: float("inf")}})
    assert result.finished
    assert result.metrics["skipped_steps"] == 3
    assert pretrain.system.pushed.item() == 17  # type: ignore[attr-defined]


def test_too_many_bad_steps_in_a_row_stop_with_a_report(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    poisoned = dict.fromkeys(range(4, 20), float("nan"))
    with pytest.raises(UserError) as caught:
        pretrain(recipe, tmp_path / "run", {"poison": poisoned})
    message = str(caught.value)
    assert "stopped at step 7: 3 steps in a row" in message
    assert "itc nan" in message
    report = json.loads((tmp_path / "run/non_finite.json").read_text())
    assert len(report["sample_ids"]) == 8
    assert report["sample_ids"][0] in message
    assert report["values"]["itc"] == "nan"


def test_micro_batches_add_up_to_the_same_gradient(pretrain: Pretrain, data: Path, tmp_path: Path) -> None:
    """Codes are trained by a mean over samples, so accumulation changes nothing but rounding."""
    only = {"itc": 0.0, "mlm": 0.0}
    recipes = [toy_recipe(data, train__micro_batch=size, weights=only, train__max_steps=1) for size in (8, 2)]
    pretrain(recipes[0], tmp_path / "whole", {"dropout": 0.0})
    pretrain(recipes[1], tmp_path / "parts", {"dropout": 0.0})
    whole, parts = rows(tmp_path / "whole")[0], rows(tmp_path / "parts")[0]
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert parts["itm"] == pytest.approx(whole["itm"], rel=1e-5)
    saved = [
        read_tensors(tmp_path / name / "checkpoints/step-00000001/model.safetensors") for name in ("whole", "parts")
    ]
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-5, atol=1e-6)


def test_unreadable_images_are_counted_and_named(pretrain: Pretrain, tmp_path: Path) -> None:
    recipe = toy_recipe(write_data(tmp_path / "data", broken=5), train__max_steps=6)
    pretrain(recipe, tmp_path / "run")
    counts = [row["skipped_images"] for row in rows(tmp_path / "run")]
    named = (tmp_path / "run/skipped_images.txt").read_text().splitlines()
    assert counts[-1] == len(named) >= 2
    assert all("005.png" in line for line in named)


def test_revived_codes_and_their_moments_reach_the_master(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    revived = torch.tensor([True] + [False] * 5)
    pretrain(recipe, tmp_path / "run", {"revive_rows": revived}, stop_after=2)
    saved = read_tensors(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert torch.equal(saved["codes"], pretrain.system.codes.detach())  # type: ignore[attr-defined]


def test_bfloat16_keeps_parameters_in_fp32(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    result = pretrain(recipe, tmp_path / "run", ds_config="zero2_bf16", stop_after=4)
    assert all(parameter.dtype == torch.float32 for parameter in pretrain.system.parameters())  # type: ignore[attr-defined]
    assert result.metrics["loss"] < rows(tmp_path / "run")[0]["loss"]


def test_fp16_overflow_lowers_the_scale_and_is_counted(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss scaling path, on a CPU that is told it can do fp16."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(build.Machine, "here", staticmethod(lambda: build.Machine(cuda=True, bf16=False)))
    config = tmp_path / "fp16.json"
    config.write_text(json.dumps({"fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}}))
    recipe = toy_recipe(Path(recipe.data.path or ""), train__max_bad_steps=30, train__max_steps=24)
    pretrain(recipe, tmp_path / "run", ds_config=str(config))
    log = rows(tmp_path / "run")
    assert log[0]["skipped_steps"] == 1
    assert log[1]["loss_scale"] == log[0]["loss_scale"] / 2
    system: Any = pretrain.system  # type: ignore[attr-defined]
    assert all(parameter.dtype == torch.float16 for parameter in system.parameters())
    assert system.pushed.item() == 24 - log[-1]["skipped_steps"] > 0
    saved = read_tensors(tmp_path / "run/checkpoints/step-00000024/model.safetensors")
    assert saved["image.weight"].dtype == torch.float32
    assert not torch.equal(saved["image.weight"], saved["image.weight"].half().float())


def test_steps_make_no_other_host_sync(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    """`Tally.reduce` copies once; the loop itself reads no other tensor."""
    source = Path(loop.__file__).read_text()
    assert ".item()" not in source
    assert ".tolist()" not in source
    assert ".cpu()" not in source
