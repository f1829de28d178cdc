"""Resume on another number of ranks: ZeRO's optimizer state, cut anew.

DeepSpeed refuses the shards of another number of ranks, and its converter fails on parameters without dimensions and
drops buffers. But every shard says where the values of each parameter lie in it, and the new engine where they belong:
order, padding and alignment are read there, never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.errors import UserError

Shard = dict[str, Any]
"""`state_dict()` of one rank's ZeRO-1/2 optimizer."""


def load_optimizer(zero: Any, checkpoint: Path, saved_by: int) -> None:
    """Give a ZeRO-1/2 optimizer this rank's part of what `saved_by` ranks saved: fp32 weights, moments, loss scaler.

    The module's weights and the engine's counters are loaded before, by DeepSpeed.

    Raises:
        UserError: the shard of a rank is missing.
    """
    own = _cut_anew([_read_shard(checkpoint, rank) for rank in range(saved_by)], zero)
    # DeepSpeed takes a list over ranks and reads its own rank's entry.
    zero.load_state_dict([own] * distributed.world_size(), load_optimizer_states=True, load_from_fp32_weights=True)


@torch.no_grad()
def _cut_anew(shards: Sequence[Shard], zero: Any) -> Shard:
    """The shard that this rank would have saved; what is no tensor over parameters is the same in all of them."""
    optimizer = shards[0]["base_optimizer_state"]
    state = {}
    for group, saved in enumerate(optimizer["param_groups"]):
        (key,) = saved["params"]  # ZeRO makes one flat parameter of each group
        states = [shard["base_optimizer_state"]["state"].get(key, {}) for shard in shards]  # none before a first step
        state[key] = {
            name: _own_part(zero, group, shards, [one[name] for one in states]) if value.dim() else value.clone()
            for name, value in states[0].items()
        }
    flats = [[shard["single_partition_of_fp32_groups"][group] for shard in shards] for group in range(len(state))]
    return {
        **shards[0],
        "base_optimizer_state": {**optimizer, "state": {key: values for key, values in state.items() if values}},
        "single_partition_of_fp32_groups": [_own_part(zero, group, shards, flat) for group, flat in enumerate(flats)],
        "param_alignment_paddings": zero.round_robin_bit16_padding,
    }


def _own_part(zero: Any, group: int, shards: Sequence[Shard], flats: Sequence[Tensor]) -> Tensor:
    """This rank's flat part of a group, padded with zeros as ZeRO does, from the saving ranks' flat parts."""
    own = flats[0].new_zeros(zero.single_partition_of_fp32_groups[group].shape)
    for parameter in zero.bit16_groups[group]:
        if parameter._hp_mapping is not None:  # some of it belongs to this rank
            whole = _whole(zero.param_names[parameter], group, shards, flats)
            source, target = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            own.narrow(0, target.start, target.numel).copy_(whole.narrow(0, source.start, source.numel))
    return own


def _whole(name: str, group: int, shards: Sequence[Shard], flats: Sequence[Tensor]) -> Tensor:
    """A parameter's values, [numel]: its pieces lie in the order of the ranks."""
    places = [shard["param_slice_mappings"][group].get(name) for shard in shards]
    pieces = zip(flats, places, strict=True)
    return torch.cat([flat.narrow(0, place.start, place.numel) for flat, place in pieces if place is not None])


def _read_shard(checkpoint: Path, rank: int) -> Shard:
    """What a rank saved, mapped: only what is copied out of it is read from the disk."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Native bf16 puts a word before the name.
    path = next(checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"), None)
    if path is None:
        raise UserError(f"{checkpoint}: the optimizer state of rank {rank} is missing; take another checkpoint")
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        shard: Shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]
    return shard
