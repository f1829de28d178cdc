"""The process group and its collectives. Without a process group every function is the one-rank identity.

Whatever starts the ranks (`--nproc`, torchrun, the deepspeed launcher, srun, plain variables), the environment is
brought into the one form that torch and DeepSpeed read: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlscale.errors import UserError

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_PIECE = 64 << 20
"""Bytes that one rank sends at a time where rows are gathered."""
_TIMEOUT = timedelta(hours=2)
"""Rank 0 may render data or train a tokenizer while the others wait at a barrier."""
_HANG_SECONDS = 1800.0
_GONE = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed|Timed out waiting|"
    r"remote process exited or there was a network error"
)
"""How gloo and NCCL say that the other side is not there any more."""


def init_from_environment() -> None:
    """Complete the launcher's variables and join the process group (gloo on a CPU, nccl on GPUs).

    Does nothing when a group exists. Alone, it makes a group of one rank: DeepSpeed wants one, and without RANK and
    its companions it would look for MPI.

    Raises:
        UserError: a launcher set some of the variables but not all, or VLSCALE_HANG_SECONDS is no number.
    """
    if dist.is_initialized():
        return
    complete_environment(os.environ)
    # Longer than the watchdog of a training, which says where each rank stands.
    timeout = max(_TIMEOUT, timedelta(seconds=2 * hang_seconds()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        # Told its device, NCCL need not guess it from the rank (and warn that the guess may hang).
        dist.init_process_group("nccl", timeout=timeout, device_id=device())
    else:
        dist.init_process_group("gloo", timeout=timeout)


def complete_environment(environment: Any) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in `environment`, in place."""
    # A batch script has SLURM_PROCID too (0, in the shell that started srun); only srun's tasks have a step.
    if "RANK" not in environment and "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        for name, slurm in _SLURM.items():
            environment[name] = environment[slurm]
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_slurm_host(environment)
        # Every task of a job derives the same port, two jobs on one host hardly ever do.
        environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    world = int(environment.setdefault("WORLD_SIZE", "1"))
    if world > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(f"WORLD_SIZE is {world} but {', '.join(missing)} not set: the launcher must set them")
    environment.setdefault("RANK", "0")
    environment.setdefault("LOCAL_RANK", environment["RANK"] if world == 1 else environment.get("SLURM_LOCALID", "0"))
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(free_port())


def hang_seconds() -> float:
    """How long a rank may stand still while it trains: VLSCALE_HANG_SECONDS, else half an hour; 0 is for ever.

    Raises:
        UserError: no number of seconds.
    """
    text = os.environ.get("VLSCALE_HANG_SECONDS", "")
    try:
        seconds = float(text or _HANG_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e8:
        raise UserError(f"VLSCALE_HANG_SECONDS={text}: expected a number of seconds, or 0 for no limit")
    return seconds


def lost_rank(error: RuntimeError) -> str | None:
    """What a collective says when another rank is gone, in a few words; None for every other error."""
    found = _GONE.search(str(error))
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # asked of the environment: the group may not have come about
    if alone or not (found or isinstance(error, dist.DistNetworkError)):
        return None
    return found[0] if found else "the network failed"


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this host, as far as the launcher tells; else all ranks."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return max(1, int(text))
    return world_size()


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def gather(tensor: Tensor) -> Tensor:
    """Concatenate [B, …] of every rank along the first dimension, in rank order; no gradient. Equal shapes."""
    if world_size() == 1:
        return tensor.detach()
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_list(own: list[Any]) -> list[Any]:
    """Picklable things of every rank behind one another, in rank order; ranks may give different numbers."""
    if world_size() == 1:
        return list(own)
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, own)
    return [one for part in parts for one in part]


def share(count: int) -> range:
    """This rank's part of `count` things: what stands together stays together, and no two parts differ by more than
    one."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


def gather_rows(tensor: Tensor | None) -> Tensor:
    """Concatenate [n, …] of every rank along the first dimension, in rank order; n may differ. No gradient.

    The result lies where the input does. Rows travel as bytes (gloo does not know every type), a piece at a time, so
    that what a GPU has to hold of a tensor in host memory stays small.

    Args:
        tensor: None where this rank has no rows and does not know what they look like; some rank does.
    """
    if world_size() == 1:
        assert tensor is not None
        return tensor.detach()
    own = None if tensor is None else (tensor.shape, tensor.dtype)
    known = gather_list([own])
    shape, dtype = next(one for one in known if one is not None)
    if tensor is None:
        tensor = torch.empty(0, *shape[1:], dtype=dtype)
    counts = [0 if one is None else one[0][0] for one in known]
    gathered = torch.empty(sum(counts), *shape[1:], dtype=dtype, device=tensor.device)
    if gathered.numel():
        rows = _as_bytes(gathered)
        sent = _as_bytes(tensor.detach().contiguous()) if len(tensor) else rows[:0]
        step = max(1, _PIECE // rows.shape[1])
        for start in range(0, max(counts), step):
            _gather_piece(sent, rows, counts, start, step)
    return gathered


def gather_with_grad(tensor: Tensor) -> Tensor:
    """`gather` whose gradient reaches the tensors of every rank.

    Backward sums the gathered tensor's gradient over the ranks and gives each rank its slice: dΣ_r L_r / d(local).
    With the average of parameter gradients over ranks that DDP and ZeRO take, the parameters get exactly the gradient
    of mean_r L_r, as if one process had computed it.
    """
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, a new tensor without gradient."""
    result = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result)
    return result


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite `tensor` in place by rank `src`'s values and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src)
    return tensor


def average(tensors: list[Tensor]) -> None:
    """Every rank's mean of each tensor, in place; the ranks give the same shapes in the same order."""
    if world_size() == 1 or not tensors:
        return
    sums = all_reduce_sum(torch.cat([tensor.flatten().float() for tensor in tensors])) / world_size()
    for tensor, mean in zip(tensors, sums.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def broadcast_object(value: Any, src: int = 0) -> Any:
    """Rank `src`'s picklable object on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[bool]:
    """Run the block on rank 0, then on the others; yields whether this is rank 0.

    An error on rank 0 is not waited for: it ends that process, and the launcher the others.
    """
    main = rank() == 0
    if not main:
        barrier()
    yield main
    if main:
        barrier()


def on_main(function: Callable[[], Any]) -> Any:
    """Call on rank 0 only and give its (picklable) result to every rank; a UserError is raised on every rank."""
    outcome: tuple[Any, str | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, message = broadcast_object(outcome)
    if message is not None:
        barrier()  # whoever leaves first takes what the others have not read yet along
        raise UserError(message)
    return result


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _as_bytes(tensor: Tensor) -> Tensor:
    """[n, …] as [n, w] uint8, the same memory; not empty."""
    return tensor.view(len(tensor), -1).view(torch.uint8)


def _gather_piece(sent: Tensor, rows: Tensor, counts: list[int], start: int, step: int) -> None:
    """Rows `start` to `start + step` of every rank, [n, w] uint8, into their places in `rows`."""
    piece = torch.zeros(min(step, max(counts) - start), sent.shape[1], dtype=torch.uint8, device=device())
    mine = sent[start : start + step]
    piece[: len(mine)] = mine
    parts = [torch.empty_like(piece) for _ in counts]
    dist.all_gather(parts, piece)
    first = 0
    for part, count in zip(parts, counts, strict=True):
        there = max(0, min(step, count - start))
        rows[first + start : first + start + there] = part[:there]
        first += count


def _first_slurm_host(environment: Any) -> str:
    """First host of the job; MASTER_ADDR overrides it where the names don't resolve."""
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"cannot read the first host of SLURM_JOB_NODELIST={nodes!r} by scontrol: export MASTER_ADDR yourself"
        ) from None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = tensor.shape[0]
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return all_reduce_sum(grad.contiguous())[start : start + ctx.rows]
