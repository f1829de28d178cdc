"""A run at two ranks that is killed again and again: `python -m tests.engine.kills_main --kills 200 --out DIR`.

CODIS, small: teacher, queues and a codebook that starts by k-means, a checkpoint every second step. Every life is ended
by SIGKILL at a random moment, of all ranks or of one; the next goes on by `--resume auto`. Once all kills are done the
run may end, and its losses, weights and carried state are compared with those of a run that nobody disturbed.

DIR/kills.jsonl has a line for every kill (`half`: checkpoints that it left half written): start the same command again
to go on after an interruption. The moments are drawn from (seed, number of the kill), but where in the work they fall
is up to the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.engine.lives import Ranks, import_everything
from vlscale.interop import layout

WORLD = 2
STEPS_PER_KILL, REST = 2, 20
"""Steps of the run: so many for every kill, and after the last one."""
BOUND = 30.0
"""Seconds in which a survivor has to notice and end."""
PATIENCE = 300.0
"""Seconds without a step after which something is wrong."""


def be_rank(recipe: Path, out: Path) -> int:
    from vlscale import distributed
    from vlscale.config import load_recipe
    from vlscale.engine import build, loop
    from vlscale.errors import RunBroken

    distributed.init_from_environment()
    build.import_deepspeed().init_distributed()
    try:
        loop.pretrain(load_recipe(str(recipe)), ds_config="zero2_cpu", out=out, resume="auto", threads=1)
    except RunBroken as error:
        print(error, flush=True)
        return 1
    return 0


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides, and without a line that is being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in found]


def last_step(run: Path) -> int:
    found = rows(run)
    return found[-1]["step"] if found else 0


class Killer:
    """One run, its kills and where they fell."""

    def __init__(self, out: Path, kills: int, seed: int) -> None:
        self.out, self.run, self.kills, self.seed = out, out / "killed", kills, seed
        self.steps = STEPS_PER_KILL * kills + REST
        self.recipe, self.log = out / "recipe.yaml", out / "kills.jsonl"
        self.done = len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def prepare(self) -> None:
        from tests.engine.test_real_systems import small_recipe
        from vlscale.config import write_recipe

        if self.recipe.exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = small_recipe(self.out, "codis")
        train = recipe.train.model_copy(update={"max_steps": self.steps})
        often = recipe.checkpoint.model_copy(update={"every": 2, "keep": 2})
        write_recipe(recipe.model_copy(update={"train": train, "checkpoint": often}), self.recipe)

    def live(self, out: Path) -> Ranks:
        return Ranks(lambda: be_rank(self.recipe, out), WORLD, self.out / "logs")

    def undisturbed(self) -> None:
        if not (self.out / "undisturbed" / "checkpoints" / f"step-{self.steps:08d}" / "COMPLETE").exists():
            ended = self.live(self.out / "undisturbed").wait(PATIENCE + self.steps)
            assert [code for code, _ in ended] == [0] * WORLD, ended

    def kill_one_life(self) -> None:
        draw = random.Random(f"{self.seed} {self.done}")
        first = last_step(self.run)
        # As fast as there are steps for all kills; some fall on the way up, before the first step.
        pace = max(0, self.steps - REST - first) / (self.kills - self.done)
        goal = first + round(draw.uniform(0, 2 * pace))
        early = draw.random() < 0.1
        victims = draw.choice([[0, 1], [0], [1]])
        ranks, began = self.live(self.run), time.monotonic()
        pause = draw.uniform(0, 1.0 if early else 0.4)
        while not early and ranks.alive() and last_step(self.run) < max(goal, 1):
            assert time.monotonic() - began < PATIENCE, "no step"
            time.sleep(0.005)
        time.sleep(pause)
        assert None in ranks.codes(), f"ended before the kill: {ranks.wait(0)}"
        before = early or goal <= first  # the kill may fall before the ranks have met
        ranks.kill(victims)
        killed = time.monotonic()
        ended = ranks.wait(BOUND)
        # One that died before the ranks met is missed by nobody but their launcher.
        codes = [code for rank, (code, _) in enumerate(ended) if rank not in victims]
        assert all(code == 1 or (code is None and before) for code in codes), f"a survivor stayed: {ended}"
        self.done += 1
        half = [path.name for path in layout.all_checkpoints(self.run) if not layout.is_complete(path)]
        line = {"kill": self.done, "from": first, "at": last_step(self.run), "ranks": victims, "half": half}
        line["seconds"] = round(time.monotonic() - began, 1)
        line["others_ended_after"] = round(time.monotonic() - killed, 1)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    def finish(self) -> None:
        ended = self.live(self.run).wait(PATIENCE + self.steps)
        assert [code for code, _ in ended] == [0] * WORLD, ended

    def differences(self) -> list[str]:
        """What is not the same to the bit as in the run that nobody disturbed."""
        ours, theirs = rows(self.run), rows(self.out / "undisturbed")
        if [row["step"] for row in ours] != list(range(1, self.steps + 1)) or len(theirs) != self.steps:
            return [f"{len(ours)} and {len(theirs)} steps, expected {self.steps}"]
        pairs = zip(ours, theirs, strict=True)
        found = [f"step {row['step']}: {row} instead of {other}" for row, other in pairs if row != other]
        for name in ("model.safetensors", "carried.safetensors"):
            last = Path("checkpoints") / f"step-{self.steps:08d}" / name
            now, before = load_file(self.run / last), load_file(self.out / "undisturbed" / last)
            if now.keys() != before.keys() or any(not torch.equal(now[key], before[key]) for key in now):
                found.append(f"{name} of the last checkpoint")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import_everything()
    killer = Killer(given.out, given.kills, given.seed)
    killer.prepare()
    killer.undisturbed()
    while killer.done < killer.kills:
        killer.kill_one_life()
    killer.finish()
    found = killer.differences()
    print("\n".join(found[:10]) if found else f"{killer.kills} kills, {killer.steps} steps: the same to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
