"""Checks of the machine alone: versions, accelerator, backend, limits. No GPU is touched before `accelerator`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vlscale.engine.checks_finding import Case, Finding
from vlscale.engine.room import shown_size

_SHOWN = ("torch", "torchvision", "deepspeed", "transformers", "timm", "webdataset", "pot", "scipy")
_ENOUGH_FILES = 1024
_ENOUGH_SHARED = 1 << 30
_PREFETCHED = 2
"""Batches that torch's loader has every worker prepare."""


def versions() -> list[Finding]:
    """What pyproject.toml asks for, against what is installed."""
    try:
        own = metadata.metadata("vlscale")
    except metadata.PackageNotFoundError:
        return [Finding("versions", "failed", "vlscale is not installed", "pip install -e . in the clone")]
    python = platform.python_version()
    if python not in SpecifierSet(own["Requires-Python"]):
        return [Finding("versions", "failed", f"python {python}", f"use python {own['Requires-Python']}")]
    wanted = _requirements("vlscale")
    wrong = {f"{need.name}{need.specifier}": have for need in wanted if (have := _misfit(need)) is not None}
    if wrong:
        found = "; ".join(f"{need}: {have}" for need, have in wrong.items())
        return [Finding("versions", "failed", found, f"pip install {' '.join(repr(need) for need in wrong)}")]
    shown = [f"{name} {metadata.version(name)}" for name in _SHOWN]
    found = f"python {python}, vlscale {own['Version']}, {', '.join(shown)}; {len(wanted)} packages as required"
    return [Finding("versions", "ok", found), *_torchvision()]


def _requirements(package: str) -> list[Requirement]:
    """Of the package itself on this platform, without its extras."""
    needs = [Requirement(text) for text in metadata.requires(package) or ()]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _misfit(need: Requirement) -> str | None:
    """What is there instead of what is needed; None when it fits."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return "missing"
    return None if need.specifier.contains(version, prereleases=True) else f"{version} is installed"


def _torchvision() -> list[Finding]:
    """It works with one version of torch only, and pip lets the two drift apart."""
    for need in _requirements("torchvision"):
        if need.name == "torch" and (have := _misfit(need)) is not None:
            found = f"torchvision {metadata.version('torchvision')} needs torch{need.specifier}, {have}"
            return [Finding("torchvision", "failed", found, "install torch and torchvision together, from one index")]
    return []


def accelerator(case: Case) -> list[Finding]:
    """GPUs, or the CPU's cores and instruction sets."""
    import torch

    from vlscale.engine import build

    if torch.cuda.is_available():
        return [_gpus(case)]
    flags = build.cpu_flags()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    cores = len(os.sched_getaffinity(0))
    found = f"CPU, {cores} cores, {case.threads} threads a rank, {', '.join(sets) or 'no vector instructions known'}"
    devices = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    if devices and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1"):
        fix = "install the CUDA build of torch that the driver can run (nvidia-smi names its CUDA version)"
        return [Finding("accelerator", "failed", f"{found}; {devices} GPUs here, torch {torch.__version__} can't", fix)]
    if case.local_world * case.threads > cores:
        found += f"; {case.local_world} ranks × {case.threads} threads are more than the cores"
        return [Finding("accelerator", "warning", found, "fewer --threads or --nproc")]
    return [Finding("accelerator", "ok", found)]


def _gpus(case: Case) -> Finding:
    import torch

    count = torch.cuda.device_count()
    lines = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(f"{torch.cuda.get_device_name(index)}, {shown_size(free)} of {shown_size(total)} free")
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    found = f"{'; '.join(lines)}; {bf16}; CUDA {torch.version.cuda}"
    if case.local_world > count:
        found = f"{case.local_world} ranks for {count} GPUs: {found}"
        return Finding("accelerator", "failed", found, f"--nproc {count}: NCCL wants a GPU for every rank")
    return Finding("accelerator", "ok", found)


def ds_config(case: Case) -> list[Finding]:
    """What `--ds-config` means here, and whether it goes with the recipe."""
    from vlscale.engine import build
    from vlscale.engine.schedule import batch_plan

    choice = build.choose(case.ds_config)
    if case.recipe is not None:
        build.complete(choice, batch_plan(case.recipe.train, case.world), case.recipe.train)
    return [Finding("--ds-config", "ok", f"{choice.reason.removeprefix('DeepSpeed config ')} ({choice.precision})")]


def backend() -> list[Finding]:
    """Whether torch has the collectives that this machine needs."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        if dist.is_available() and dist.is_gloo_available():
            return [Finding("backend", "ok", "gloo")]
        return [Finding("backend", "failed", "this torch has no gloo", "install a build of torch with it")]
    if dist.is_available() and dist.is_nccl_available():
        return [Finding("backend", "ok", f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")]
    return [Finding("backend", "failed", "this torch has no NCCL", "install the CUDA build of torch for Linux")]


def meeting_point(case: Case) -> list[Finding]:
    """Where ranks on several machines meet: the address, and the interface they talk over."""
    name, environment = "meeting point", os.environ
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = environment.get(variable, "").lstrip("^=").split(",")[0]
        there = [interface for _, interface in socket.if_nameindex()]
        if given and not any(interface.startswith(given) for interface in there):
            found = f"{variable}={environment[variable]}: no such interface on {socket.gethostname()}"
            return [Finding(name, "failed", found, f"one of {', '.join(there)}, or unset it")]
    address = environment.get("MASTER_ADDR")
    if address is not None:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            found = f"MASTER_ADDR={address} does not resolve ({error.strerror})"
            return [Finding(name, "failed", found, "export MASTER_ADDR as an IP address of the first node")]
    if case.nodes == 1:
        return [Finding(name, "ok", f"{address or '127.0.0.1'}, one machine")]
    return [_own_address(name, address)]


def _own_address(name: str, address: str | None) -> Finding:
    """gloo listens where the machine's own name points to; on Debian that is often 127.0.1.1, which no other node
    reaches."""
    host = socket.gethostname()
    try:
        own = socket.gethostbyname(host)
    except OSError:
        own = "nowhere"
    found = f"{address or 'the first node of the job'}; {host} resolves to {own}"
    if (own.startswith("127.") or own == "nowhere") and "GLOO_SOCKET_IFNAME" not in os.environ:
        return Finding(name, "warning", found, "export GLOO_SOCKET_IFNAME as the interface that the nodes share")
    return Finding(name, "ok", found)


def open_files() -> list[Finding]:
    """The limit that loader processes run into: tensors between processes are files."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files >= _ENOUGH_FILES:
        shown = "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}"
        return [Finding("open files", "ok", f"{shown} (ulimit -n)")]
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    return [Finding("open files", "warning", f"{files:,} (ulimit -n): few for loader processes", f"ulimit -n {most}")]


def shared_memory(case: Case) -> list[Finding]:
    """Space in /dev/shm for the batches that loader processes hand over."""
    name, fix = "/dev/shm", "a larger one (docker run --shm-size 8g, or --ipc host), or fewer data.workers"
    if not Path("/dev/shm").is_dir():
        return [Finding(name, "unknown", "there is none here")]
    free = shutil.disk_usage("/dev/shm").free
    found = f"{shown_size(free)} free"
    need = _loader_bytes(case)
    if need is None:
        enough = free >= _ENOUGH_SHARED
        return [Finding(name, "ok", found) if enough else Finding(name, "warning", found, fix)]
    found += f", the loaders of {case.local_world} ranks hold up to {shown_size(need)}"
    return [Finding(name, "ok", found) if need <= free else Finding(name, "failed", found, fix)]


def _loader_bytes(case: Case) -> int | None:
    """What batches between workers and ranks take on this machine; texts are not counted. None without a recipe."""
    if case.recipe is None:
        return None
    data, train = case.recipe.data, case.recipe.train
    images = train.micro_batch or train.global_batch // case.world
    if data.concepts is not None:
        each = 4 * data.concepts.max_regions * (data.concepts.region_width + 6)
    elif data.aspect is not None:
        each = 3 * data.aspect.short * data.aspect.long
    else:
        each = 3 * data.image_size**2
    return case.local_world * data.workers * _PREFETCHED * images * each * (2 if data.second_view else 1)
