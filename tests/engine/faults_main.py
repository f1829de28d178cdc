"""Ranks of runs that something happens to: `python -m tests.engine.faults_main JSON`.

JSON: {"report": path, "lives": [{"out", "data" or "recipe": path, "world"?, "resume"?, "fp16"?, "watch"?,
"environment"?, "changes"?, "remove"?: path, "fault"?: {"kind", "step", "rank"}}]}; the report gets exit code and output
of every rank of every life. Where a launcher's variables are set, this process is a rank of the first life instead.

Faults come in or right after the step of that number (from 1), on that rank. `watch` has every rank write down, for
every step, whether it was applied and which tensors changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.lives import Ranks, import_everything

FOREVER = 10_000.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, act: Callable[..., Any]) -> None:
    """Have `act` called with the arguments before each call of `module.name`."""
    function = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        act(*arguments)
        return function(*arguments, **options)

    setattr(module, name, call)


def in_step(step: int, act: Callable[[Any], Any]) -> None:
    from vlscale.engine import loop

    before(loop, "train_step", lambda run, batches: run.state.step + 1 == step and act(run))


def while_saving(step: int, arrange: Callable[[Any, Path], Any]) -> None:
    """Call `arrange` with the engine and the checkpoint's folder when the checkpoint of that step begins."""
    from vlscale.engine import checkpoint
    from vlscale.interop import layout

    def act(engine: Any, system: Any, run: Path, state: Any, keep: int) -> None:
        if state.step == step:
            arrange(engine, run / layout.CHECKPOINTS / layout.checkpoint_name(step))

    before(checkpoint, "save", act)


def write_half_and(act: Callable[[], Any]) -> Callable[[Any, Path], None]:
    """Instead of writing this rank's shard."""

    def arrange(engine: Any, folder: Path) -> None:
        def save(state_dict: Any, path: str) -> None:
            Path(path).write_bytes(b"half")
            act()

        engine.checkpoint_engine.save = save

    return arrange


def die_after_deepspeed(engine: Any, folder: Path) -> None:
    from vlscale.engine import checkpoint

    before(checkpoint, "consolidated", lambda *_: die())


def die_renaming(name: str) -> Callable[[Any, Path], None]:
    def arrange(engine: Any, folder: Path) -> None:
        before(os, "replace", lambda source, target: Path(target).name == name and die())

    return arrange


def die_pruning(engine: Any, folder: Path) -> None:
    from vlscale.engine import checkpoint

    def act(victim: Path) -> None:
        (victim / "model.safetensors").unlink()
        die()

    before(checkpoint.shutil, "rmtree", act)


def no_space() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nframe #0")


def fill(run: Path) -> None:
    """Leave nothing free on the disk that the run lies on."""
    with (run.parent / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def make_nan(step: int) -> None:
    from vlscale.engine import loop

    now = [0]
    weighted = loop.weighted_sum
    before(loop, "train_step", lambda run, batches: now.__setitem__(0, run.state.step + 1))
    loop.weighted_sum = lambda *given: weighted(*given) * (math.nan if now[0] == step else 1.0)


def bug(run: Any) -> None:
    raise ValueError("a bug on one rank")


def kill_loader(run: Any) -> None:
    import torch

    for child in torch.multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)


def lose_file(run: Any) -> None:
    (Path(run.recipe.data.path).parent / "007.png").unlink()


FAULTS: dict[str, Callable[[int], None]] = {
    "kill": lambda step: in_step(step, lambda run: die()),
    "hang": lambda step: in_step(step, lambda run: time.sleep(FOREVER)),
    "bug": lambda step: in_step(step, bug),
    "loader": lambda step: in_step(step, kill_loader),
    "file": lambda step: in_step(step, lose_file),
    "nan": make_nan,
    "slow save": lambda step: while_saving(step, lambda engine, folder: time.sleep(1.5)),
    "full": lambda step: in_step(step, lambda run: fill(run.out)),
    "full in a save": lambda step: while_saving(step, lambda engine, folder: fill(folder.parent.parent)),
    "no space": lambda step: while_saving(step, write_half_and(no_space)),
    "in a shard": lambda step: while_saving(step, write_half_and(die)),
    "after deepspeed": lambda step: while_saving(step, die_after_deepspeed),
    "at the marker": lambda step: while_saving(step, die_renaming("COMPLETE")),
    "at latest": lambda step: while_saving(step, die_renaming("latest")),
    "in pruning": lambda step: while_saving(step, die_pruning),
}


def held(run: Any) -> dict[str, Any]:
    """Copies of what this rank holds: weights, masters, moments, teacher, queues, codes."""
    zero = run.engine.optimizer
    tensors = {f"module/{name}": value for name, value in run.system.state_dict().items()}
    tensors |= {f"carried/{name}": value for name, value in run.system.carried_state().items()}
    for group, partition in zip(zero.optimizer.param_groups, zero.single_partition_of_fp32_groups, strict=True):
        tensors[f"master/{group['name']}"] = partition
        state = zero.optimizer.state.get(partition, {})  # none before a first step
        tensors |= {f"{key}/{group['name']}": value for key, value in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def watch(log: Path) -> None:
    """Note for every step whether it was applied and what of all that a run holds it changed."""
    import torch

    from vlscale.engine import loop

    train = loop.train_step

    def step(run: Any, batches: Any) -> Any:
        first = held(run)
        row = train(run, batches)
        changed = [name for name, now in held(run).items() if name not in first or not torch.equal(now, first[name])]
        line = {"step": run.state.step, "applied": run.engine.was_step_applied(), "changed": sorted(changed)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return row

    loop.train_step = step


def be_rank(life: dict[str, Any]) -> int:
    from tests.engine.toy import build_toy, toy_recipe
    from tests.engine.worlds_main import pretend_fp16
    from vlscale import distributed
    from vlscale.cli.errors import exit_code
    from vlscale.config import load_recipe
    from vlscale.engine import build, loop

    os.environ.update(life.get("environment", {}))
    rank, out, fault = int(os.environ["RANK"]), Path(life["out"]), life.get("fault")
    if fault and rank == fault["rank"]:
        FAULTS[fault["kind"]](fault["step"])
    if life.get("watch"):
        watch(out.with_name(f"{out.name}.watched-{rank}"))
    if "recipe" in life:
        recipe = load_recipe(life["recipe"])
    else:
        loop.build_system = build_toy
        recipe = toy_recipe(Path(life["data"]), **life.get("changes", {}))

    def train() -> None:
        distributed.init_from_environment()
        build.import_deepspeed().init_distributed()
        config = pretend_fp16(out.parent) if life.get("fp16") else "zero2_cpu"
        loop.pretrain(recipe, ds_config=config, out=out, resume=life.get("resume"), threads=1)

    return exit_code(train)


def main(request: dict[str, Any]) -> int:
    if "RANK" in os.environ:
        return be_rank(request["lives"][0])
    import_everything()
    ended = []
    report = Path(request["report"])
    for number, life in enumerate(request["lives"]):
        if "remove" in life:
            Path(life["remove"]).unlink()
        ranks = Ranks(lambda life=life: be_rank(life), life.get("world", 2), report.parent / f"logs-{number}")
        ended.append(ranks.wait(120))
    report.write_text(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
