"""One rank of runs that change their number of ranks: `python -m tests.engine.worlds_main JSON`.

JSON: {"runs": [{"recipe": path, "out", "stop_after", "resume"?, "toy"?, "fp16"?, "report"?, "save"?}]}.
`toy` trains the toy system without random draws; `report` is where rank 0 writes everything that a run holds;
`save` writes a checkpoint although no step was made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.engine.toy import ToySystem, build_toy
from vlscale import distributed
from vlscale.config import Recipe, load_recipe
from vlscale.data.sample import Vocabulary
from vlscale.engine import build, checkpoint, loop
from vlscale.engine.writer import EngineWriter
from vlscale.interop.export import write_tensors
from vlscale.systems.registry import build_system

FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 17, "hysteresis": 1, "loss_scale_window": 3},
    "zero_optimization": {"stage": 1, "parameter_alignment": True},
}
"""Also with gaps between parameters."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def quiet_toy(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    """The toy without dropout and noise: ranks and their number draw nothing."""
    system = build_toy(recipe, vocabulary)
    assert isinstance(system, ToySystem)
    system.dropout = system.noise = 0.0
    return system


def holdings(run: loop.Run) -> dict[str, Tensor]:
    """Everything that a run holds, put together by DeepSpeed's own means; collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero, writer = run.engine.optimizer, EngineWriter()
    zero._lazy_init_hp_params_optimizer_state()
    held = {f"module/{name}": value for name, value in run.system.state_dict().items()}
    held |= {f"carried/{name}": value for name, value in run.system.carried_state().items()}  # type: ignore[operator]
    for name, parameter in run.system.named_parameters():
        held[f"master/{name}"] = writer.read(parameter)
        if hasattr(parameter, "_hp_mapping"):  # else it was frozen before the engine was made
            for key in ("exp_avg", "exp_avg_sq"):
                held[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key)
    for group, partition in zip(zero.optimizer.param_groups, zero.single_partition_of_fp32_groups, strict=True):
        held[f"step/{group['name']}"] = zero.optimizer.state[partition]["step"]
        held[f"lr/{group['name']}"] = torch.tensor(group["lr"])
    numbers = {name: getattr(run.engine, name) for name in _COUNTERS}
    numbers |= {name: getattr(zero.loss_scaler, name, 0) for name in _SCALER}
    numbers |= {"step": run.state.step, "skipped": run.state.skipped_steps}
    return held | {f"number/{name}": torch.tensor(float(value)) for name, value in numbers.items()}


def digest(held: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(held):
        total.update(name.encode())
        total.update(held[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def pretend_fp16(folder: Path) -> str:
    """Native fp16 on a CPU that is told it can; the path of its configuration."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    build.Machine.here = staticmethod(lambda: build.Machine(cuda=True, bf16=False))  # type: ignore[method-assign]
    config = folder / f"fp16-{distributed.rank()}.json"
    config.write_text(json.dumps(FP16))
    return str(config)


def perform(request: dict[str, Any]) -> None:
    train = loop._train

    def train_and_report(run: loop.Run, *arguments: Any) -> Any:
        row = train(run, *arguments)
        if "report" in request:
            held = holdings(run)
            digests = distributed.gather_list([digest(held)])
            assert len(set(digests)) == 1, "the ranks hold different things"
            if distributed.rank() == 0:
                write_tensors(Path(request["report"]), held)
        if request.get("save"):
            checkpoint.save(run.engine, run.system, run.out, run.state, keep=3)
        return row

    loop.build_system = quiet_toy if request.get("toy") else build_system
    loop._train = train_and_report  # type: ignore[assignment]
    out = Path(request["out"])
    ds_config = pretend_fp16(Path(request["recipe"]).parent) if request.get("fp16") else "zero2_cpu"
    try:
        loop.pretrain(
            load_recipe(request["recipe"]),
            ds_config=ds_config,
            out=out,
            resume=request.get("resume"),
            threads=1,
            stop_after=request["stop_after"],
        )
    finally:
        loop._train = train


def main(request: dict[str, Any]) -> None:
    distributed.init_from_environment()
    build.import_deepspeed().init_distributed()
    for run in request["runs"]:
        perform(run)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
