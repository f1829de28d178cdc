"""One rank of a stream in a process of its own: prints step and sample ids of every micro-batch, a JSON line each.

python -m tests.data.stream_main DATA GLOBAL_BATCH RANK WORLD START_STEP STEPS WORKERS
"""

from __future__ import annotations

import itertools
import json
import sys

from tests.data.corpus import make_tokenizer
from vlscale.config import Data, Tokenizer
from vlscale.data.open import read_data, training_split
from vlscale.data.sample import Sample
from vlscale.data.stream import Stream


def main(path: str, batch: int, rank: int, world: int, start: int, steps: int, workers: int) -> None:
    data = Data(path=path, image_size=32, window=1000, tokenizer=Tokenizer(max_tokens=7))
    stream = Stream(
        training_split(read_data(data)),
        data,
        make_tokenizer([Sample("t", None, ("a dog",))], max_tokens=7),  # type: ignore[arg-type]
        seed=3,
        global_batch=batch,
        micro_batch=batch // world,
        rank=rank,
        world=world,
        start_step=start,
        workers=workers,
    )
    for step, found in enumerate(itertools.islice(stream, steps), start=start):
        print(json.dumps({"step": step, "ids": found.sample_ids}), flush=True)
    stream.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))  # type: ignore[arg-type]
