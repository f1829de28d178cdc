"""Hungarian matching of many small problems on the host, for one copy from the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LARGEST = 1e30
"""Stands for an infinite cost, which scipy may call infeasible."""


@torch.no_grad()
def assign(cost: Tensor, problems: Tensor) -> Tensor:
    """Assignment of least total cost within each problem, by `scipy.optimize.linear_sum_assignment`.

    Costs and problem numbers reach the host in one copy, the only one, whatever the number of problems. NaN counts as
    0, so that a step that overflowed is left to the finite check.

    Args:
        cost: [C, K] of any float type; a problem with n rows uses their first n columns.
        problems: [C] int64 below 2²⁴, which problem a row belongs to; its rows follow one another. −1: none.

    Returns:
        [C] int64 on the costs' device: the column of every row, 0 where it belongs to no problem.

    Raises:
        ValueError: a problem has more rows than there are columns, or its rows are scattered.
    """
    from scipy.optimize import linear_sum_assignment

    host = torch.cat([problems[:, None].float(), cost.float()], dim=1).cpu().numpy()
    numbers, costs = host[:, 0], np.nan_to_num(host[:, 1:], nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    columns = np.zeros(len(host), dtype=np.int64)
    starts = np.flatnonzero(np.diff(numbers, prepend=np.nan) != 0)  # [problems]
    named = numbers[starts][numbers[starts] >= 0]
    if len(np.unique(named)) < len(named):
        raise ValueError("the rows of a problem must follow one another")
    ends = [*starts[1:], len(host)][: len(starts)]
    for start, end in zip(starts, ends, strict=True):
        if numbers[start] < 0 or end - start == 1:
            continue
        if end - start > costs.shape[1]:
            raise ValueError(f"a problem has {end - start} rows, but costs have {costs.shape[1]} columns")
        columns[start:end] = linear_sum_assignment(costs[start:end, : end - start])[1]
    return torch.from_numpy(columns).to(cost.device, non_blocking=True)
