"""One rank of a toy run that gets a signal: `python -m tests.engine.signals_main JSON`.

JSON: {"data", "out", "signal", "rank", "during": "step" or "save", "step", "resume"?, "workers"?}: the rank signals
itself, and the processes of its loader, in or right after the step of that number.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlscale.engine import signals


def tree(root: int) -> list[int]:
    """Process ids of a process and all below it, as Slurm signals them."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in lines)}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def signalling(function: Callable[..., Any], number: signal.Signals, due: Callable[[Any], bool]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if due(arguments):
            for pid in reversed(tree(os.getpid())):
                os.kill(pid, number)
        return function(*arguments, **options)

    return call


def main(request: dict[str, Any]) -> int:
    with signals.heeded():
        from tests.engine.toy import build_toy, toy_recipe
        from vlscale.engine import checkpoint, loop

        loop.build_system = build_toy
        if os.environ["RANK"] == str(request.get("rank")):
            number, step = signal.Signals[request["signal"]], request["step"]
            if request["during"] == "save":
                checkpoint.save = signalling(checkpoint.save, number, lambda given: given[3].step == step)
            else:
                loop.train_step = signalling(loop.train_step, number, lambda given: given[0].state.step + 1 == step)
        result = loop.pretrain(
            toy_recipe(Path(request["data"]), data__workers=request.get("workers", 0)),
            ds_config="zero2_cpu",
            out=Path(request["out"]),
            resume=request.get("resume"),
            threads=1,
        )
    print(f"at step {result.step}, finished: {result.finished}")
    return 0 if result.stopped is None else signals.EXIT_CODES[result.stopped]


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)
