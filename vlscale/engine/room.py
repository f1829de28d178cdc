"""Bytes that a training takes in memory and on the disk, whatever its batch; and how they are told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn


def memory_parts(system: nn.Module, width: int, shared: int) -> dict[str, float]:
    """Bytes of one rank by part; the system may be on the meta device.

    Args:
        width: bytes of a parameter's value.
        shared: ranks that ZeRO shares masters and moments among.
    """
    trained = _count(p for p in system.parameters() if p.requires_grad)
    return {
        f"parameters ({8 * width} bit)": width * _count(system.parameters()),
        f"gradients ({8 * width} bit)": width * trained,
        f"fp32 masters, 1/{shared}": 4 * trained / shared,
        f"Adam's two moments, 1/{shared}": 8 * trained / shared,
        "teacher, queues, statistics": _bytes(system.carried_state().values()),  # type: ignore[operator]
    }


def checkpoint_bytes(system: nn.Module, width: int, masters: int) -> int:
    """DeepSpeed's shards of all ranks and the safetensors beside them; the system may be on the meta device.

    Args:
        width: bytes of a parameter's value as DeepSpeed writes it; ours are fp32.
        masters: trained values of all ranks, each with two moments.
    """
    twice = 2 * _bytes(system.buffers())
    carried = _bytes(system.carried_state().values())  # type: ignore[operator]
    return (width + 4) * _count(system.parameters()) + twice + 12 * masters + carried


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def shown_size(count: float) -> str:
    """Bytes for people."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
