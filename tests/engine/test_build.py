import json
from pathlib import Path
from typing import Any

import pytest

from vlscale.config import Train
from vlscale.engine.build import Choice, Machine, choose, complete, config_names
from vlscale.engine.schedule import batch_plan
from vlscale.errors import UserError

GPU, OLD_GPU = Machine(cuda=True, bf16=True), Machine(cuda=True, bf16=False)
CPU, OLD_CPU = Machine(cuda=False, bf16=True), Machine(cuda=False, bf16=False)


def written(tmp_path: Path, config: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def completed(tmp_path: Path, config: Any, machine: Machine = CPU, **train: Any) -> dict[str, Any]:
    settings = Train(**{"global_batch": 16, "micro_batch": 4, "clip": 1.0, **train})
    return complete(choose(written(tmp_path, config), machine), batch_plan(settings, 2), settings)


@pytest.mark.parametrize(
    ("machine", "name", "precision"),
    [
        (GPU, "zero2_bf16", "autocast_bfloat16"),
        (OLD_GPU, "zero2_fp16", "fp16"),
        (CPU, "zero2_bf16", "autocast_bfloat16"),
        (OLD_CPU, "zero2_cpu", "fp32"),
    ],
)
def test_auto_picks_by_the_machine_and_says_what(machine: Machine, name: str, precision: str) -> None:
    choice = choose("auto", machine)
    assert (choice.name, choice.precision) == (name, precision)
    assert name in choice.reason
    assert "GPU" in choice.reason


def test_what_the_machine_cannot_do_names_the_alternative() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU and there is none: use --ds-config zero2_bf16"):
        choose("zero2_fp16", CPU)
    with pytest.raises(UserError, match="use --ds-config zero2_cpu"):
        choose("zero2_fp16", OLD_CPU)
    with pytest.raises(UserError, match="no bfloat16: use --ds-config zero2_fp16"):
        choose("zero2_bf16", OLD_GPU)


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="auto, zero2_bf16, zero2_cpu, zero2_fp16"):
        choose("zero9", CPU)
    with pytest.raises(UserError, match="No such file"):
        choose(str(tmp_path / "none.json"), CPU)
    with pytest.raises(UserError, match="not JSON"):
        choose(written(tmp_path, "{"), CPU)
    with pytest.raises(UserError, match="expected an object"):
        choose(written(tmp_path, "[1]"), CPU)


@pytest.mark.parametrize("name", ["zero2_bf16", "zero2_cpu", "zero2_fp16"])
def test_shipped_configs_leave_batch_clipping_and_optimizer_to_the_recipe(name: str) -> None:
    assert name in config_names()
    config = choose(name, GPU).config
    assert config.keys().isdisjoint({"train_batch_size", "gradient_clipping", "optimizer", "scheduler"})
    assert config["zero_optimization"]["stage"] == 2


def test_hugging_face_auto_values_are_filled(tmp_path: Path) -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    result = completed(tmp_path, config)
    assert result["train_batch_size"] == 16
    assert result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 2
    assert result["gradient_clipping"] == 1.0
    assert result["torch_autocast"]["dtype"] == "bfloat16"
    assert result["fp16"]["enabled"] is False
    assert '"auto"' not in json.dumps(result)
    assert result.keys().isdisjoint({"optimizer", "scheduler", "bf16"})
    assert completed(tmp_path, config, OLD_GPU)["fp16"]["enabled"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 32),
        ("train_micro_batch_size_per_gpu", 8),
        ("gradient_accumulation_steps", 1),
        ("gradient_clipping", 0.5),
    ],
)
def test_contradictions_with_the_recipe_are_errors(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{key} is {value} but the recipe gives .*: remove it"):
        completed(tmp_path, {key: value})


def test_agreement_with_the_recipe_is_fine(tmp_path: Path) -> None:
    assert completed(tmp_path, {"train_batch_size": 16, "gradient_clipping": 1.0})["train_batch_size"] == 16


def test_what_does_not_work_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 3 splits the parameters.*use stage 2"):
        completed(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="stage 0 does not skip"):
        completed(tmp_path, {"zero_optimization": {"stage": 0}})
    with pytest.raises(UserError, match=r"torch_autocast float16 with train\.clip"):
        completed(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, GPU)
    with pytest.raises(UserError, match=r"optimizer: the recipe's train\.\* keys rule it"):
        completed(tmp_path, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})


def test_kernels_are_never_compiled(tmp_path: Path) -> None:
    result = completed(tmp_path, {})
    assert result["zero_allow_untested_optimizer"] is True
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert result["zero_optimization"]["stage"] == 2


def test_precision_of_a_config_without_any() -> None:
    assert Choice("x", {}, "").precision == "fp32"
