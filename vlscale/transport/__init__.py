"""Optimal transport between G rows and K columns: Sinkhorn, IPOT, and the regularised cost as a loss.

Everything runs in fp32 on the cost's device, under autocast too, over any leading dimensions, and without a host sync
unless a `tolerance` asks for one. Marginals are uniform by default; given ones must be positive and sum to 1, which is
not looked at: only their shapes are. Plans carry no gradient; `sinkhorn_loss` does.
Hungarian matching, `assign`, solves many small problems exactly, on the host and for one copy.
"""

from vlscale.transport.assignment import assign
from vlscale.transport.entropic import sinkhorn, sinkhorn_loss
from vlscale.transport.problem import Transport
from vlscale.transport.proximal import ipot
from vlscale.transport.solvers import SOLVERS, solve

__all__ = ["SOLVERS", "Transport", "assign", "ipot", "sinkhorn", "sinkhorn_loss", "solve"]
