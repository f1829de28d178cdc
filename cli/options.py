"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DsConfig = Annotated[
    str, typer.Option(help="DeepSpeed config: a shipped name, a JSON file, or auto (what this machine can do).")
]
ImageRoot = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder that image paths are relative to.")
]
Nproc = Annotated[int | None, typer.Option(help="Ranks on this machine; default: one per GPU, else one.")]
Nnodes = Annotated[
    int | None, typer.Option(metavar="N", help="Machines that train together; start the same command on each.")
]
NodeRank = Annotated[int | None, typer.Option(metavar="I", help="Which of the machines this is, from 0.")]
Rdzv = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: node 0 and a free port of it.")
]
RdzvTimeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the other machines.")]
RankThreads = Annotated[int | None, typer.Option(help="CPU threads per rank; default: the cores shared out.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as train.lr=1e-4; repeatable."),
]
Resume = Annotated[
    str | None, typer.Option(metavar="auto|PATH", help="Go on from the newest complete checkpoint, or from PATH.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and build nothing big.")]
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]
"""Set by the deepspeed launcher."""
EvaluatedRun = Annotated[str, typer.Option("--from", metavar="RUN", help="A run folder or one of its checkpoints.")]
EvaluatedData = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Annotations, shards, tars or a data recipe (.yaml); default: the run's own."),
]
Split = Annotated[str | None, typer.Option(help="Split to read; default: test, else val.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]
