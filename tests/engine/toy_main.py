"""One rank of a toy run in a process of its own: `python -m tests.engine.toy_main JSON`.

JSON: {"data": path, "runs": [{"out", "resume"?, "stop_after"?, "kill"?, "recipe"?: {…}}]}.
`kill` is the number of the os.replace under the run's checkpoints instead of which the process gets SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.engine.toy import build_toy, toy_recipe


def kill_at(call: int) -> None:
    """SIGKILL this process instead of the `call`-th os.replace in a folder of checkpoints."""
    left = [call]
    replace = os.replace

    def replace_or_die(source: Any, target: Any) -> None:
        if "checkpoints" in str(target):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def main(request: dict[str, Any]) -> None:
    from vlscale.engine import loop

    loop.build_system = build_toy
    for run in request["runs"]:
        if "kill" in run:
            kill_at(run["kill"])
        recipe = toy_recipe(Path(request["data"]), **run.get("recipe", {}))
        loop.pretrain(
            recipe,
            ds_config="zero2_cpu",
            out=Path(run["out"]),
            resume=run.get("resume"),
            threads=1,
            stop_after=run.get("stop_after"),
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
