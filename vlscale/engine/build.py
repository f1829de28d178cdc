"""The DeepSpeed configuration — by name, by path or by what the machine can do — and the engine made from it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlscale import distributed
from vlscale.config import Train
from vlscale.config.tasks import TaskConfig
from vlscale.engine.mixed import MixedOptimizer
from vlscale.engine.optim import build_optimizer
from vlscale.engine.schedule import BatchPlan
from vlscale.errors import UserError

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_BROKEN = {
    "round_robin_gradients": "DeepSpeed looks for fp32 weights in the wrong place then, checkpoints would be wrong",
    "elastic_checkpoint": "DeepSpeed can't resume from what it saves then",
}
"""Switches of ZeRO that don't work with DeepSpeed 0.19 and an optimizer of torch."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides the precision."""

    cuda: bool
    bf16: bool
    """Fast bfloat16: a GPU from Ampere on, a CPU with AVX-512-BF16 or AMX."""

    @staticmethod
    def here() -> Machine:
        if torch.cuda.is_available():
            return Machine(True, torch.cuda.is_bf16_supported(including_emulation=False))
        return Machine(False, not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags()))


@dataclass(frozen=True, slots=True)
class Choice:
    """A DeepSpeed configuration without batch sizes, and how it came about."""

    name: str
    config: dict[str, Any]
    reason: str
    """One line for people."""

    @property
    def precision(self) -> str:
        """`fp16` and `bf16` cast the parameters; `autocast_…` leaves them in fp32."""
        autocast = self.config.get("torch_autocast", {})
        if autocast.get("enabled"):
            return f"autocast_{autocast.get('dtype', 'bfloat16')}"
        for name in ("fp16", "bf16"):
            if self.config.get(name, {}).get("enabled"):
                return name
        return "fp32"

    @property
    def parameter_bytes(self) -> int:
        """Of one value."""
        return 2 if self.precision in ("fp16", "bf16") else 4


def config_names() -> list[str]:
    """Names that `--ds-config` takes, besides `auto` and a path."""
    folder = resources.files("vlscale.ds_configs")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def choose(ds_config: str, machine: Machine | None = None) -> Choice:
    """Find the configuration and hold it against the machine.

    Raises:
        UserError: unknown name, unreadable file, or something the machine or the systems can't do.
    """
    machine = machine or Machine.here()
    path = Path(ds_config)
    if ds_config == "auto":
        name, reason = _automatic(machine)
        choice = Choice(name, _shipped(name), f"DeepSpeed config {name}: {reason}")
    elif path.suffix == ".json":
        choice = Choice(ds_config, _from_file(path, machine), f"DeepSpeed config {ds_config}")
    elif ds_config in config_names():
        choice = Choice(ds_config, _shipped(ds_config), f"DeepSpeed config {ds_config}")
    else:
        raise UserError(
            f"--ds-config {ds_config}: use auto, {', '.join(config_names())}, or the path of a file ending in .json"
        )
    _check_machine(choice, machine)
    return choice


def complete(choice: Choice, plan: BatchPlan, train: Train) -> dict[str, Any]:
    """The configuration with batch sizes and clipping from the recipe.

    Raises:
        UserError: the file says otherwise than the recipe, or asks for something of ZeRO that doesn't work here.
    """
    config: dict[str, Any] = json.loads(json.dumps(choice.config))
    for section in ("optimizer", "scheduler"):
        if _says_something(config.pop(section, None)):
            raise UserError(f"{choice.name}: {section}: the recipe's train.* keys rule it; remove the section")
    _check_zero(choice.name, config.setdefault("zero_optimization", {}))
    wanted = dict(zip(_BATCH_KEYS, (plan.global_batch, plan.micro_batch, plan.accumulation), strict=True))
    for key, value in {**wanted, "gradient_clipping": train.clip}.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f"{choice.name}: {key} is {config[key]} but the recipe gives {value} ({plan}): remove it")
        config[key] = value
    if choice.precision == "autocast_float16" and train.clip > 0:
        raise UserError(
            f"{choice.name}: torch_autocast float16 with train.clip={train.clip} would clip gradients that are still "
            "scaled: use fp16 (zero2_fp16), bfloat16, or train.clip=0"
        )
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    return _without_auto(config)


def build_engine(
    system: nn.Module, config: dict[str, Any], choice: Choice, train: Train, task: TaskConfig | None = None
) -> Any:
    """The DeepSpeed engine around a system that is on its device already; collective over all ranks."""
    deepspeed = import_deepspeed()
    if choice.precision in ("fp16", "bf16"):
        # DeepSpeed casts the parameters but not what the system makes of them in fp32: autocast settles each operation.
        device = next(system.parameters()).device.type
        dtype = torch.float16 if choice.precision == "fp16" else torch.bfloat16
        system.forward = torch.autocast(device, dtype)(system.forward)
    with _scalars_broadcast(system):
        engine, *_ = deepspeed.initialize(model=system, optimizer=build_optimizer(system, train, task), config=config)
    _link_moments_of_every_group(engine.optimizer)
    # At the floor of the loss scale DeepSpeed would raise; a skipped step is the loop's to count and to give up on.
    engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the kernels that it would compile for 40 to 90 s and that training never calls."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.14 has renamed; every rank would say so.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Shared memory collectives of CPU inference. DeepSpeed keeps this dict for such edits (`ops/__init__.py`).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Our optimizer is tested with ZeRO; DeepSpeed would tell every run to be careful with it.
    if MixedOptimizer not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(MixedOptimizer)
    return deepspeed


@contextmanager
def _scalars_broadcast(system: nn.Module) -> Iterator[None]:
    """Broadcast parameters without dimensions (the temperature) ourselves: DeepSpeed fails on them.

    It sends `p.data.view(torch.uint8)`, which needs a dimension, but passes over parameters with this attribute.
    """
    scalars = [parameter for parameter in system.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        distributed.broadcast(parameter.data)
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    yield
    for parameter in scalars:
        del parameter.ds_optim_param  # type: ignore[attr-defined]


def _link_moments_of_every_group(zero: Any) -> None:
    """Let DeepSpeed link the optimizer's moments to the parameters when all groups have them.

    It links once, after the first group's first step; the later groups have no moments then and would never get a link
    (`safe_get_full_optimizer_state`: "exp_avg not found").
    """
    link = zero._lazy_init_hp_params_optimizer_state

    def link_when_complete() -> None:
        if all(zero.optimizer.state.get(partition) for partition in zero.single_partition_of_fp32_groups):
            link()

    zero._lazy_init_hp_params_optimizer_state = link_when_complete


def _automatic(machine: Machine) -> tuple[str, str]:
    if machine.cuda:
        return ("zero2_bf16", "a GPU with bfloat16") if machine.bf16 else ("zero2_fp16", "a GPU without bfloat16")
    if machine.bf16:
        return "zero2_bf16", "no GPU, a CPU with bfloat16 instructions (parameters and optimizer stay fp32)"
    return "zero2_cpu", "no GPU, a CPU without bfloat16 instructions: fp32"


def _check_machine(choice: Choice, machine: Machine) -> None:
    alternative = _automatic(machine)[0]
    if not machine.cuda and choice.precision in ("fp16", "autocast_float16"):
        raise UserError(f"--ds-config {choice.name}: fp16 needs a GPU and there is none: use --ds-config {alternative}")
    if machine.cuda and not machine.bf16 and choice.precision in ("bf16", "autocast_bfloat16"):
        raise UserError(f"--ds-config {choice.name}: this GPU has no bfloat16: use --ds-config {alternative}")


def _check_zero(name: str, zero: dict[str, Any]) -> None:
    stage = zero.setdefault("stage", 2)
    if stage == 3:
        raise UserError(
            f"{name}: ZeRO stage 3 splits the parameters, and the momentum teacher would average empty shards: "
            "use stage 2"
        )
    if stage not in (1, 2):
        raise UserError(f"{name}: ZeRO stage {stage} does not skip steps with non-finite gradients: use stage 1 or 2")
    for key, reason in _BROKEN.items():
        if zero.get(key) is True:
            raise UserError(f"{name}: zero_optimization.{key}: {reason}: remove it")


def _shipped(name: str) -> dict[str, Any]:
    return json.loads((resources.files("vlscale.ds_configs") / f"{name}.json").read_text(encoding="utf-8"))


def _from_file(path: Path, machine: Machine) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ds-config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--ds-config {path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {path}: expected an object of DeepSpeed's sections")
    # Hugging Face's "auto": DeepSpeed itself fails on it.
    picked = _automatic(machine)[0]
    if config.get("fp16", {}).get("enabled") == "auto":
        config["fp16"]["enabled"] = picked == "zero2_fp16"
    if config.get("bf16", {}).get("enabled") == "auto":
        del config["bf16"]
        if picked == "zero2_bf16" and not config.get("fp16", {}).get("enabled"):
            config.setdefault("torch_autocast", _shipped(picked)["torch_autocast"])
    return config


def _says_something(section: Any) -> bool:
    """Whether a Hugging Face section holds more than a type and "auto" values."""
    values = (section or {}).get("params", {}).values()
    return any(value != "auto" for value in values)


def _without_auto(node: dict[str, Any]) -> dict[str, Any]:
    """Drop what is still "auto": DeepSpeed's default rules."""
    kept = {key: value for key, value in node.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def cpu_flags() -> set[str]:
    """Instruction sets that Linux names; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
