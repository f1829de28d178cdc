"""Which rank this process is, and starting the other ranks where no launcher did. Imports no torch."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vlscale.engine.signals import EXIT_CODES
from vlscale.errors import UserError

from .meeting import ONE, Meeting, Nodes

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl."""
TERMINATE_SECONDS = 15.0
"""How long a rank may take to end after SIGTERM before it is killed."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = tuple(EXIT_CODES.values())
"""Exit codes of a rank that a signal told to save and end."""
GOOD = (0, *STOPPED)


def joined() -> bool:
    """Whether a launcher (ours, torchrun, deepspeed, srun) started this process as one of its ranks."""
    return "RANK" in os.environ or _in_slurm_step()


def rank() -> int:
    """Rank of this process; 0 when nothing launched it."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _in_slurm_step() else 0


def world_size(nproc: int | None, machines: int = 1) -> int:
    """Number of ranks: what the launcher says, else on each machine `--nproc`, else one per GPU, else one.

    Raises:
        UserError: `--nproc` contradicts the launcher or is not positive.
    """
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: expected at least one rank")
    if not joined():
        return machines * (nproc or max(1, count_gpus()))
    found = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if nproc is not None and nproc * machines != found:
        raise UserError(f"--nproc {nproc}: the launcher already started {found} ranks; leave --nproc out")
    return found


def has_company() -> bool:
    """Whether this process is one of several ranks."""
    return joined() and world_size(None) > 1


def require_alone(command: str) -> None:
    """For a command that does not share its work: ranks would write over one another.

    Raises:
        UserError: there are several.
    """
    if has_company():
        raise UserError(f"{command}: runs on one rank, the launcher started {world_size(None)}: start it once")


def local_world_size(world: int) -> int:
    """Ranks that share this machine."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        first = os.environ.get(name, "").split("(")[0].split(",")[0]  # Slurm writes 2(x3),1
        if joined() and first.isdigit():
            return int(first)
    return world


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        # CUDA ignores everything from the first invalid entry on; -1 is the usual one.
        return names.index("-1") if "-1" in names else len(names)
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None, world: int) -> int:
    """Threads per rank: `--threads`, else OMP_NUM_THREADS, else Slurm's cores per task, else the cores shared out.

    Must run before torch is imported: OpenMP reads the environment once.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: expected at least one thread")
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        text = os.environ.get(name, "").split(",")[0]  # OpenMP takes a list, one per nesting level
        threads = threads or (int(text) if text.isdigit() else None)
    threads = threads or max(1, count_cores() // local_world_size(world))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def settle(world: int) -> None:
    """Say that a process that nobody launched is the only rank; a batch script's variables may tell otherwise."""
    if world == 1 and not joined():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


def become_rank(world: int, threads: int | None, nodes: Nodes = ONE) -> int | None:
    """Make this process one of `world` ranks and give its threads; must run before torch is imported.

    Where no launcher started the ranks, this machine's are started here, with this process's own arguments, and waited
    for; then there is nothing left to do, and the result is None.
    """
    if world > 1 and not joined():
        code = start_ranks(sys.argv[1:], world, nodes)
        if code:
            sys.exit(code)
        return None
    own = set_threads(threads, world)
    settle(world)
    # DeepSpeed calls what torch has deprecated; whoever trains can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return own


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(arguments: Sequence[str], world: int, nodes: Nodes = ONE) -> int:
    """Start this machine's share of `world` ranks of `vlscale ARGUMENTS` and wait for them.

    When a rank fails, here or elsewhere, the others are ended; SIGTERM, SIGINT and SIGUSR1 reach every rank. Returns
    the exit code: 0, that of ranks that all saved and ended on a signal, or that of the rank that failed first (128 +
    signal number where a signal ended it).

    Raises:
        UserError: a machine did not come, or they contradict each other.
    """
    local = world // nodes.count
    meeting = Meeting(nodes, local)
    shared = {"MASTER_ADDR": nodes.host, "MASTER_PORT": str(nodes.port or free_port()), "WORLD_SIZE": str(world)}
    shared["LOCAL_WORLD_SIZE"] = str(local)
    command = [sys.executable, "-m", "vlscale.cli", *arguments]
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in FORWARDED}
    ranks: list[subprocess.Popen[bytes]] = []
    code = 1
    try:
        for index in range(local):
            rank = nodes.rank * local + index
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(index)}
            # A session of its own: Ctrl-C reaches the ranks once, through us, not a second time from the terminal.
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent))
        code = _wait(ranks, received, meeting)
        return code
    finally:
        meeting.leave(code, good=code in GOOD)
        end(ranks, seconds=0)  # without the others they can't save any more
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Runs in a rank before its program: have Linux kill it when the launcher is killed.

    Otherwise it would go on training, and `--resume auto` would start a second run in the same folder.
    """
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _wait(ranks: list[subprocess.Popen[bytes]], received: list[int], meeting: Meeting) -> int:
    patience_ends = math.inf
    while True:
        while received:
            number = received.pop(0)
            for process in ranks:
                process.send_signal(number)
        codes = [_exit_code(process.poll()) for process in ranks]
        if all(code in GOOD for code in codes):
            return max(code for code in codes if code is not None)
        if any(code in STOPPED for code in codes):  # the others are about to
            patience_ends = min(patience_ends, time.monotonic() + TERMINATE_SECONDS)
        fine = (None, *GOOD) if time.monotonic() < patience_ends else (None, 0)
        for index, code in enumerate(codes):
            if code is not None and code not in fine:
                _name_failure(index, len(ranks), code)
                return code
        if failure := meeting.failure():
            print(f"vlscale: {failure[0]}; ending the ranks of this machine", file=sys.stderr, flush=True)
            return failure[1]
        time.sleep(POLL_SECONDS)


def _exit_code(code: int | None) -> int | None:
    """Of a process, as a shell counts; one that SIGUSR1 ended before it listened to it had nothing to save either."""
    if code is None or code >= 0:
        return code
    return EXIT_CODES.get(signal.Signals(-code), 128 - code)


def _name_failure(index: int, ranks: int, code: int) -> None:
    if ranks > 1 and code not in (2, 130):
        how = f"was ended by {signal.Signals(code - 128).name}" if code > 128 else f"failed with exit code {code}"
        if code == 128 + signal.SIGKILL:
            how += " (did memory run out?)"
        print(f"vlscale: rank {index} of {ranks} {how}; ending the others", file=sys.stderr, flush=True)


def end(processes: Sequence[subprocess.Popen[bytes]], seconds: float = TERMINATE_SECONDS) -> None:
    """End processes: SIGTERM, and SIGKILL for what is still there after some seconds."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in alive:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _in_slurm_step() -> bool:
    # A batch script has SLURM_PROCID too (0, in the shell that srun has not left); only srun's tasks have a step.
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ
