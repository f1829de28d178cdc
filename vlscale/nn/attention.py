"""Multi-head attention over given heads: the fastest form for the device, and a way to look at its probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_Keep = Callable[[Tensor], None]

_keep: _Keep | None = None
"""Takes the probabilities of the module that computes just now, inside `recorded_attention`."""
_recording = False


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[B, L, D] → [B, heads, L, D / heads]."""
    batch, length, width = states.shape
    return states.view(batch, length, heads, width // heads).transpose(1, 2)


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, M] with 1 = attend → [B, 1, 1, M], 0 where attended and the dtype's minimum elsewhere."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None, :]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d + bias) v.

    Args:
        query: [B, h, L, d]; key, value: [B, h, M, d], or [1, h, M, d] shared by all queries.
        bias: additive, broadcast to [B, h, L, M], or None.
        dropout: of the attention probabilities; 0 outside training.

    Returns:
        [B, L, h·d].
    """
    if query.is_cuda and _keep is None:
        bias = None if bias is None else bias.to(query.dtype)
        key, value = key.expand(len(query), -1, -1, -1), value.expand(len(query), -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    else:
        # The fused CPU kernel is three times slower in bf16 at the short lengths of texts and tiny images.
        scores = query @ (key * (1 / math.sqrt(key.shape[-1]))).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        weights = scores.softmax(-1)
        if _keep is not None:
            _keep(weights)
        if dropout:
            weights = F.dropout(weights, dropout)
        out = weights.to(value.dtype) @ value
    return out.transpose(1, 2).flatten(2)


@contextmanager
def recorded_attention(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep the attention probabilities of some modules, by the names given here, as they are computed in the block.

    What the modules return does not change on a CPU; on a GPU they take the explicit softmax in place of the fused
    kernel, which rounds differently. Outside the block nothing is added to the normal path.

    The probabilities [B, heads, L, M], before dropout, are the ones that the output was computed from, so that
    `torch.autograd.grad(score, probabilities)` gives their gradient; take it inside the block, since activations that
    are checkpointed are computed again then. For the same reason a module's first call counts, and no later one.

    Args:
        modules: those that call `attend` once in their forward, such as `BertLayer.attention.self`, and the attention
            of timm's vision transformers.

    Raises:
        RuntimeError: a block inside a block, or a module that ran without computing such attention.
    """
    global _recording
    if _recording:
        raise RuntimeError("recorded_attention: a block inside a block; name all modules in one")
    found: dict[str, Tensor] = {}
    with ExitStack() as cleanup:
        _recording = True
        cleanup.callback(_stop)
        for name, module in modules.items():
            watch = _watch_timm if hasattr(module, "fused_attn") else _watch
            for handle in watch(module, partial(_keep_first, found, name)):
                cleanup.callback(handle.remove)
            cleanup.callback(module.register_forward_hook(partial(_require, name, found)).remove)
        yield found


def _stop() -> None:
    global _recording
    _recording = False


def _keep_first(found: dict[str, Tensor], name: str, probabilities: Tensor) -> None:
    found.setdefault(name, probabilities)


def _require(name: str, found: dict[str, Tensor], module: nn.Module, *_: Any) -> None:
    if name not in found:
        raise RuntimeError(f"recorded_attention: {name}: {type(module).__name__} computed no attention of its own")


def _watch(module: nn.Module, keep: _Keep) -> list[RemovableHandle]:
    """Let `attend` hand over its probabilities while `module` runs."""

    def begin(*_: Any) -> None:
        global _keep
        _keep = keep

    def end(*_: Any) -> None:
        global _keep
        _keep = None

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]


def _watch_timm(module: Any, keep: _Keep) -> list[RemovableHandle]:
    """Switch timm's fused attention off while `module` runs; the probabilities are what its dropout gets."""
    fused: list[bool] = []

    def begin(*_: Any) -> None:
        fused.append(module.fused_attn)  # the encoder's forward sets it, so it is known only now
        module.fused_attn = False

    def end(*_: Any) -> None:
        module.fused_attn = fused.pop()

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0])

    return [
        module.register_forward_pre_hook(begin),
        module.attn_drop.register_forward_pre_hook(look),
        module.register_forward_hook(end, always_call=True),
    ]
