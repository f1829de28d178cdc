"""One of N ranks that evaluate retrieval: `python -m tests.tasks.retrieval_main JSON`.

JSON: {"data": folder, "out": folder}. Every rank writes what it got of every case to `out/<rank>.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.small_run import make_parts
from tests.tasks.joint import Joint
from vlscale import distributed
from vlscale.data.sample import Sample
from vlscale.tasks import features
from vlscale.tasks.retrieval import RetrievalResult, evaluate_retrieval

COUNT = 10
"""Images."""


def cases(folder: Path) -> dict[str, RetrievalResult]:
    """Two stages, kept and encoded again, with folds and unreadable images; fewer images than ranks; and all pairs."""
    features.Precision.of = lambda device, _system: features.Precision(device, torch.float32)  # type: ignore[method-assign,assignment]
    folder.mkdir(parents=True, exist_ok=True)
    system, samples, recipe, tokenizer = make_parts(folder, "cb_vila", COUNT)
    torch.manual_seed(0)
    joint: Any = Joint(vocabulary=tokenizer.vocabulary.size).eval()

    def run(asked: list[Sample], of: Any = system, **options: Any) -> RetrievalResult:
        return evaluate_retrieval(of, asked, recipe, tokenizer, rerank=3, batch_size=4, device="cpu", **options)

    missing = [Sample(f"none-{i}", folder / f"none-{i}.png", (f"it is not there {i}",)) for i in range(4)]
    found = {"two stages": run(samples), "few": run(samples[:2]), "every pair": run(samples, joint)}
    found["unreadable, folds"] = run([*missing, *samples[:4], missing[0], *samples[4:]], folds="5")
    features.IMAGE_TOKEN_BUDGET = 0
    return found | {"encoded again": run(samples), "every pair again": run(samples, joint)}


def as_json(result: RetrievalResult) -> dict[str, Any]:
    rankings = [{name: getattr(one, name).tolist() for name in one._fields[:-1]} for one in result.rankings]
    return {"metrics": result.metrics, "card": result.protocol, "folds": result.folds, "rankings": rankings}


def main(request: dict[str, str]) -> None:
    distributed.init_from_environment()
    rank = distributed.rank()
    found = {name: as_json(result) for name, result in cases(Path(request["data"]) / str(rank)).items()}
    Path(request["out"], f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
