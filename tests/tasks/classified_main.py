"""One of N ranks that evaluates examples: `python -m tests.tasks.classified_main JSON`.

JSON: {"data", "task", "first", "again", "out"}; every rank writes what it got to OUT/<world>-<rank>.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.tasks.classified_data import LABELS, Known, recipe_of, tokenizer_of
from vlscale import distributed
from vlscale.data.open import read_data
from vlscale.tasks.classified import evaluate_classified, split_examples


def evaluate(data: Path, task: str, first: int, again: int = 0) -> dict[str, Any]:
    """What is the result, as JSON; the first `again` examples come twice."""
    recipe = recipe_of(data, task)
    examples = split_examples(read_data(recipe.data), recipe, ["test"])[:first]
    system = Known(len(LABELS[task])).eval()
    result = evaluate_classified(
        system,
        [*examples, *examples[:again]],
        recipe,
        tokenizer_of(recipe),
        classes=LABELS[task],
        batch_size=3,
        device="cpu",
    )
    return {
        "verdict": asdict(result.verdict),
        "predictions": result.predictions,
        "protocol": result.protocol,
        "asked": sum(system.sizes),
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    distributed.init_from_environment()
    found = evaluate(Path(request["data"]), request["task"], request["first"], request["again"])
    name = f"{distributed.world_size()}-{distributed.rank()}.json"
    (Path(request["out"]) / name).write_text(json.dumps(found))
    distributed.shutdown()
