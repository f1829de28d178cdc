"""SOHO's two optimizers against four recorded steps of the public release.

SGD is the same. The release's AdamW is a variant of the paper it cites (Loshchilov and Hutter), which ours
follows as torch does: it adds eps to √v before the bias correction, so that eps counts 1 / √(1 − β₂ᵗ) times, and
decays after the update instead of before. On the recording both make a difference below float32's resolution of the
weights; `test_the_variant_…` measures it in float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.parity.recordings import Case, cases
from vlscale.engine.mixed import MixedOptimizer

RECORDED = cases("soho", "extra_adamwsgd.safetensors")


def group_of(case: Case, kind: str, parameter: nn.Parameter) -> dict[str, object]:
    settings = case.metadata
    beta1, beta2 = map(float, settings["betas"].split(","))
    group = {"name": kind, "kind": kind, "params": [parameter], "lr": float(settings["lr"])}
    group["weight_decay"] = float(settings[f"{kind}_weight_decay"])
    if kind == "adamw":
        return {**group, "betas": (beta1, beta2), "eps": float(settings["eps"])}
    group["lr"] = float(settings["lr"]) * float(settings["backbone_lr_mult"])
    return {**group, "momentum": float(settings["momentum"])}


def run(case: Case, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The parameter of either kind after each recorded gradient."""
    parameters = {kind: nn.Parameter(case["x0"].to(dtype, copy=True)) for kind in ("sgd", "adamw")}
    optimizer = MixedOptimizer([group_of(case, kind, parameter) for kind, parameter in parameters.items()])
    after: dict[str, list[Tensor]] = {kind: [] for kind in parameters}
    for gradient in case["grads"].to(dtype):
        for parameter in parameters.values():
            parameter.grad = gradient.clone()
        optimizer.step()
        for kind, parameter in parameters.items():
            after[kind].append(parameter.detach().clone())
    return after


def release_adamw(case: Case) -> list[Tensor]:
    """The release's variant, written out in float64."""
    group = group_of(case, "adamw", nn.Parameter(case["x0"]))
    (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
    x, after = case["x0"].double(), []
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, gradient in enumerate(case["grads"].double(), 1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        x = x - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * m / (v.sqrt() + eps)
        x = x - lr * decay * x
        after.append(x)
    return after


@pytest.mark.parametrize("path", RECORDED)
def test_sgd_is_the_release_s(path: Path) -> None:
    """Within float32's last bits, for CPUs that multiply and add in one operation."""
    case = Case(path)
    for step, ours in enumerate(run(case, torch.float32)["sgd"], 1):
        torch.testing.assert_close(ours, case[f"sgd_x{step}"], rtol=2.5e-7, atol=1e-8)


@pytest.mark.parametrize("path", RECORDED)
def test_adamw_is_the_release_s_within_float32(path: Path) -> None:
    """1e-6: steps are 1e-4 long, and leaving out the decay would cost lr · wd · |x|, over 2e-6 a step."""
    case = Case(path)
    for step, ours in enumerate(run(case, torch.float32)["adamw"], 1):
        assert (ours - case[f"adamw_x{step}"]).abs().max() < 1e-6, step


@pytest.mark.parametrize("path", RECORDED)
def test_the_variant_is_what_sets_the_release_apart(path: Path) -> None:
    """In float64: the recording is the variant (to float32's rounding), and the variant differs from ours by eps."""
    case = Case(path)
    settings = group_of(case, "adamw", nn.Parameter(case["x0"]))
    ours, release = run(case, torch.float64)["adamw"], release_adamw(case)
    for step, (a, b) in enumerate(zip(ours, release, strict=True), 1):
        assert (b - case[f"adamw_x{step}"]).abs().max() < 1e-6
        # Each step differs by lr · eps (1 / √(1 − β₂ᵗ) − 1) / |g| at most; the decay's order by lr² · wd only.
        smallest = case["grads"].abs().min()
        bound = step * settings["lr"] * settings["eps"] / (1 - settings["betas"][1]) ** 0.5 / smallest
        assert 0 < (a - b).abs().max() < bound
