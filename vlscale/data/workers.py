"""The loader's processes: how they start, and how they end with the training whatever happens to it.

Workers fork from a server that has only imported this room. Forking the training process itself would copy its OpenMP
pool, gloo's threads and a CUDA context, all of which may hang a child; spawning imports torch once per worker.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import forkserver, parent_process
from typing import Any

import torch


def context() -> Any:
    """The multiprocessing context for a DataLoader."""
    server = torch.multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["vlscale.data.worker_server"])
    return server


def warm_up() -> None:
    """Start the server in the background; it takes seconds to import torch."""
    context()
    # Blocked for the server and its helper from their start: later they ignore it, or it stays blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """The loader's `worker_init_fn`."""
    # One process, one core: torch's threads are limited by the loader, the tokenizer's pool is not.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of a terminal, Slurm's SIGTERM every process of a step: the training process decides
    # when its workers end. Here, because torch gives a worker a handler of its own for SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """torch's own watchdog watches the server, and the server waits for its workers: both would outlive a SIGKILL."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
