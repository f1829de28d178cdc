"""Recordings of the public implementations, and the bound that every comparison with them keeps."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(os.environ.get("VLSCALE_REFERENCE") or ROOT.parent / "shared" / "reference")

LARGEST: dict[str, tuple[float, str]] = {}
"""Per recording folder the largest difference as a share of its bound, and where; printed after the tests."""


def cases(folder: str, pattern: str) -> list[Any]:
    """Parameters for pytest: the case files of a recording that match, or one that skips with the reason."""
    found = sorted((REFERENCE / folder).glob(pattern))
    if not found:
        reason = f"no {pattern} in {REFERENCE / folder}; set VLSCALE_REFERENCE"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(path, id=path.stem) for path in found]


def config_of(folder: Path) -> dict[str, Any]:
    """Every size of a recording."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@dataclass
class Case:
    """One recorded call."""

    path: Path
    ratios: dict[str, float] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        tensors = load_file(self.path)
        if "inputs_file" in self.metadata:
            shared = load_file(self.path.parent / self.metadata["inputs_file"])
            tensors |= {f"in.{name}": value for name, value in shared.items()}
        return tensors

    @cached_property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.path, "pt") as file:
            return file.metadata() or {}

    @cached_property
    def noise(self) -> dict[str, float]:
        everything = json.loads((self.path.parent / "fp32_noise.json").read_text(encoding="utf-8"))
        return everything.get(self.path.stem.removeprefix("case_"), {})

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path.parent / f"weights_{self.metadata['kind']}.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def names(self, prefix: str) -> list[str]:
        """Recorded results whose name starts so, without `out.`."""
        return [name.removeprefix("out.") for name in self.tensors if name.startswith(f"out.{prefix}")]

    def check(self, name: str, ours: Tensor, transform: Any = None) -> None:
        """|ours − recorded| ≤ 1e-5 + 10 · noise + 1e-4 · |recorded|; integers must be equal.

        `transform` is applied to both sides first.
        """
        recorded = self.tensors[f"out.{name}"]
        ours = ours.detach()
        assert ours.shape == recorded.shape, name
        if not recorded.is_floating_point():
            assert torch.equal(ours.to(recorded.dtype), recorded), name
            return
        if transform is not None:
            ours, recorded = transform(ours), transform(recorded)
        recorded = recorded.double()
        bound = 1e-5 + 10 * self.noise.get(name, 0.0) + 1e-4 * recorded.abs()
        difference = (ours.double() - recorded).abs()
        ratio = float((difference / bound).max())
        self.ratios[name] = ratio
        recording = self.path.parent.name
        LARGEST[recording] = max(LARGEST.get(recording, (0.0, "")), (ratio, f"{self.path.stem}: {name}"))
        assert ratio <= 1, f"{name}: {ratio:.2f} of the bound, largest difference {float(difference.max()):.2e}"
