"""Weights as safetensors: one file, fp32, under the system's own names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlscale.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write beside and rename into place; tensors are copied to the CPU, contiguous, never sharing storage."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    Raises:
        UserError: the file is missing or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a checkpoint folder of a run?") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); take another checkpoint") from None


def load_weights(system: nn.Module, path: Path) -> None:
    """Load `model.safetensors` into the system, strictly both ways.

    Raises:
        UserError: names or shapes differ from the system's.
    """
    tensors = read_tensors(path)
    try:
        system.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: does not fit the recipe's system: {' '.join(lines[1:3])[:300]}") from None


def module_tensors(system: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, floating point ones in fp32."""
    return {
        name: tensor.float() if torch.is_floating_point(tensor) else tensor
        for name, tensor in system.state_dict().items()
    }
