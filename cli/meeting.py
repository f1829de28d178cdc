"""Where the launchers of several machines meet before any starts its ranks, and hear of one another until the end.

Node 0 listens at HOST:PORT, the others connect and say who they are. The connections stay open for the whole run: each
launcher says over them how it ended, and whoever hears of a failure, or nothing any more, ends its own ranks.
"""

from __future__ import annotations

import json
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

from vlscale import __version__
from vlscale.errors import UserError

HELLO_SECONDS = 5.0
"""How long someone who connected may take to say what only a launcher says."""
RETRY_SECONDS = 0.5
LONGEST = 4096
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 8}
"""A machine without power is noticed after three minutes."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of a run, as seen from one of them."""

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    seconds: float = 300.0


ONE = Nodes()


def nodes(count: int | None, rank: int | None, rdzv: str | None, seconds: float) -> Nodes:
    """Check `--nnodes`, `--node-rank`, `--rdzv` and `--rdzv-timeout`.

    Raises:
        UserError: one is missing, out of range or not HOST:PORT.
    """
    if count is not None and count < 1:
        raise UserError(f"--nnodes {count}: expected at least one machine")
    if count is None or count == 1:
        for name, value in (("--rdzv", rdzv), ("--node-rank", rank or None)):
            if value is not None:
                raise UserError(f"{name} {value}: only for several machines; add --nnodes, how many there are")
        return ONE
    if rdzv is None:
        raise UserError(f"--nnodes {count}: say where they meet with --rdzv HOST:PORT, node 0 and a free port of it")
    if rank is None or not 0 <= rank < count:
        given = "missing" if rank is None else f"is {rank}"
        raise UserError(f"--node-rank {given}: expected 0 to {count - 1}, another on each of the {count} machines")
    if seconds <= 0:
        raise UserError(f"--rdzv-timeout {seconds:g}: expected more than 0 seconds")
    host, _, port = rdzv.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv {rdzv}: expected HOST:PORT with a port from 1 to 65535, such as node0.cluster:29500")
    return Nodes(count, rank, host.strip("[]"), int(port), seconds)


class Meeting:
    """Connections to the other launchers: node 0 has all, the others the one to node 0."""

    def __init__(self, nodes: Nodes, nproc: int) -> None:
        """Wait until every machine is there.

        Args:
            nproc: ranks on this machine; the same on all.

        Raises:
            UserError: a machine did not come in time, or they contradict each other.
        """
        self._peers: dict[int, socket.socket] = {}
        if nodes.count == 1:
            return
        hello = {"vlscale": __version__, "nnodes": nodes.count, "nproc": nproc, "node": nodes.rank}
        try:
            if nodes.rank == 0:
                self._await_all(nodes, hello)
            else:
                self._peers[0] = _join(nodes, hello)
        except BaseException:
            self._hang_up()
            raise
        for peer in self._peers.values():
            _keep_alive(peer)

    def failure(self) -> tuple[str, int] | None:
        """What happened to another machine since the last call and an exit code for it, or None; does not wait."""
        if not self._peers:
            return None
        for ready in select.select(list(self._peers.values()), [], [], 0)[0]:
            node = next(node for node, peer in self._peers.items() if peer is ready)
            self._peers.pop(node)
            text = _read_line(ready)
            ready.close()
            if text is None:
                return f"node {node} is gone", 1
            code, good = json.loads(text)
            if not good:
                return f"node {node} failed with exit code {code}, see its output", code
        return None

    def leave(self, code: int, good: bool) -> None:
        """Tell the others how this machine ended, and whether that is no reason to end theirs."""
        for peer in self._peers.values():
            _send(peer, [code, good])
        self._hang_up()

    def _hang_up(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _await_all(self, nodes: Nodes, hello: dict[str, Any]) -> None:
        deadline = time.monotonic() + nodes.seconds
        with _listen(nodes) as listener:
            while len(self._peers) < nodes.count - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    raise UserError(self._refuse(_late(nodes, set(self._peers)))) from None
                peer.settimeout(HELLO_SECONDS)
                said = _read_line(peer)
                known = None if said is None else _as_hello(said)
                if known is None:
                    peer.close()  # whoever that was, no launcher
                    continue
                node: int = known["node"]
                if node in self._peers and _hung_up(self._peers[node]):
                    self._peers.pop(node).close()  # started once more while we waited
                problem = _contradiction(hello, known, set(self._peers))
                if problem:
                    _send(peer, problem)
                    peer.close()
                    raise UserError(self._refuse(problem))
                self._peers[node] = peer
        # The listener is closed before anyone hears of it: rank 0 takes the port over.
        for peer in self._peers.values():
            _send(peer, "")

    def _refuse(self, problem: str) -> str:
        for peer in self._peers.values():
            _send(peer, problem)
        return problem


def _listen(nodes: Nodes) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", nodes.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", nodes.port))
    except OSError as error:
        raise UserError(f"--rdzv: cannot listen on port {nodes.port} of this machine: {error.strerror}") from None


def _join(nodes: Nodes, hello: dict[str, Any]) -> socket.socket:
    """Connect to node 0 and wait for its word that all are there."""
    deadline = time.monotonic() + nodes.seconds
    where = f"{nodes.host}:{nodes.port}"
    while True:
        try:
            peer = socket.create_connection((nodes.host, nodes.port), timeout=HELLO_SECONDS)
            break
        except socket.gaierror as error:
            raise UserError(f"--rdzv {where}: {nodes.host} is not known here: {error.strerror}") from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--rdzv {where}: node 0 did not answer within {nodes.seconds:g} s ({error.strerror or error}); "
                    "is it started there, and the port open between the machines?"
                ) from None
            time.sleep(RETRY_SECONDS)
    _send(peer, hello)
    peer.settimeout(nodes.seconds + HELLO_SECONDS)
    answer = _read_line(peer)
    if answer is None:
        peer.close()
        raise UserError(f"--rdzv {where}: node 0 left before all {nodes.count} machines were there")
    problem = json.loads(answer)
    if problem:
        peer.close()
        raise UserError(f"--rdzv {where}: {problem}")
    return peer


def _late(nodes: Nodes, came: set[int]) -> str:
    missing = sorted(set(range(1, nodes.count)) - came)
    names = ", ".join(map(str, missing))
    return (
        f"--nnodes {nodes.count}: node {names} did not come to {nodes.host}:{nodes.port} within {nodes.seconds:g} s; "
        "start it with the same command and its own --node-rank, and see that the port is open between the machines"
    )


def _contradiction(ours: dict[str, Any], theirs: dict[str, Any], taken: set[int]) -> str:
    for key, name in (("nnodes", "--nnodes "), ("nproc", "ranks per machine: "), ("vlscale", "vlscale ")):
        if ours[key] != theirs.get(key):
            node = theirs.get("node")
            return f"node {node} has {name}{theirs.get(key)}, node 0 has {ours[key]}: start all machines alike"
    if theirs["node"] in taken or theirs["node"] == 0:
        return f"two machines have --node-rank {theirs['node']}: give each its own"
    return ""


def _as_hello(text: str) -> dict[str, Any] | None:
    try:
        hello = json.loads(text)
    except ValueError:
        return None
    return hello if isinstance(hello, dict) and isinstance(hello.get("node"), int) else None


def _send(peer: socket.socket, message: Any) -> None:
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        peer.close()  # gone: the next look at it says so


def _read_line(peer: socket.socket) -> str | None:
    """A line of at most LONGEST bytes; None when the other side hung up or took too long."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            byte = peer.recv(1)  # no more than the line: what follows is the next one
            if not byte or len(data) == LONGEST:
                return None
            data += byte
    except OSError:
        return None
    return data.decode(errors="replace")


def _hung_up(peer: socket.socket) -> bool:
    return bool(select.select([peer], [], [], 0)[0])  # it has nothing to say before we have


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
