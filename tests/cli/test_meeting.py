"""Several machines, each with a launcher of its own, played by processes of this one; and how ranks end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_launch import eventually
from tests.e2e.small import SMALL, render_small, settings
from vlscale import __version__
from vlscale.cli import launch, meeting
from vlscale.cli.meeting import Nodes
from vlscale.errors import UserError

ROOT = Path(__file__).parents[2]
RANK_PROGRAM = """
import os, signal, socket, sys, time
what, notes = sys.argv[1:]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
rank, local, *rest = (os.environ[name] for name in names)
if rank == "0":  # the launchers have left the port
    server = socket.create_server(("", int(rest[-1])))
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(int(rank) * 0.5), os._exit(85)))
open(f"{notes}/{rank}", "w").write(" ".join([local, *rest]))
if what == "fail" and rank == "3":
    time.sleep(1)
    sys.exit(7)
if what != "fine":
    time.sleep(60)
"""
LAUNCHER = """
import sys
from vlscale.cli import launch
from vlscale.cli.meeting import Nodes
port, node, nproc, program, *arguments = sys.argv[1:]
sys.executable = program
sys.exit(launch.start_ranks(arguments, 2 * int(nproc), Nodes(2, int(node), "127.0.0.1", int(port), 20)))
"""
Machine = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def machine(tmp_path: Path, notes: Path) -> Iterator[Machine]:
    """Start the launcher of a machine, whose ranks run RANK_PROGRAM."""
    program, port = tmp_path / "python", launch.free_port()
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    program.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{tmp_path}/program.py" "$@"\n')
    program.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(node: int, what: str, nproc: int = 2) -> subprocess.Popen[str]:
        numbers = map(str, (port, node, nproc))
        command = [sys.executable, "-c", LAUNCHER, *numbers, str(program), what, str(notes)]
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ended(*machines: subprocess.Popen[str]) -> list[tuple[int, str]]:
    return [(process.wait(30), process.stderr.read() if process.stderr else "") for process in machines]


def all_there(notes: Path, ranks: int = 4) -> bool:
    return len([note for note in notes.iterdir() if note.stat().st_size]) == ranks


def test_each_machine_starts_its_ranks_and_all_meet_at_node_0(machine: Machine, notes: Path) -> None:
    second = machine(1, "fine")
    time.sleep(1)  # node 0 may come last
    assert ended(machine(0, "fine"), second) == [(0, ""), (0, "")]
    found = {path.name: path.read_text().split() for path in notes.iterdir()}
    assert {rank: note[0] for rank, note in found.items()} == {"0": "0", "1": "1", "2": "0", "3": "1"}
    assert len({tuple(note[1:]) for note in found.values()}) == 1
    assert found["0"][1:4] == ["4", "2", "127.0.0.1"]


def test_a_failure_on_one_machine_ends_the_other(machine: Machine) -> None:
    first, second = ended(machine(0, "fail"), machine(1, "fail"))
    assert second == (7, "vlscale: rank 1 of 2 failed with exit code 7; ending the others\n")
    told = "vlscale: node 1 failed with exit code 7, see its output; ending the ranks of this machine\n"
    assert first == (7, told)


def test_a_machine_that_vanishes_ends_the_other(machine: Machine, notes: Path) -> None:
    first, second = machine(0, "wait"), machine(1, "wait")
    assert eventually(lambda: all_there(notes))
    first.send_signal(signal.SIGKILL)
    assert ended(second) == [(1, "vlscale: node 0 is gone; ending the ranks of this machine\n")]


def test_ranks_that_saved_and_ended_are_no_failure(machine: Machine, notes: Path) -> None:
    machines = machine(0, "wait"), machine(1, "wait")
    assert eventually(lambda: all_there(notes))
    for launcher in machines:
        launcher.send_signal(signal.SIGUSR1)
    assert ended(*machines) == [(85, ""), (85, "")]


def test_machines_must_be_started_alike(machine: Machine) -> None:
    first, second = ended(machine(0, "fine", 2), machine(1, "fine", 3))
    for code, error in (first, second):
        assert code == 1
        assert "node 1 has ranks per machine: 3, node 0 has 2: start all machines alike" in error


def test_two_machines_of_one_rank_are_told(machine: Machine) -> None:
    machines = machine(0, "fine"), machine(0, "fine")
    assert eventually(lambda: any(launcher.poll() is not None for launcher in machines))
    (late,) = (launcher for launcher in machines if launcher.poll() is not None)
    assert "cannot listen on port" in ended(late)[0][1]


def test_strangers_are_ignored_and_a_machine_may_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(3, 0, "127.0.0.1", launch.free_port(), 20)
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 2.0)  # a launcher on a busy machine says hello in time
    host = threading.Thread(target=lambda: meeting.Meeting(nodes, 1).leave(0, good=True))
    host.start()

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", nodes.port), 5)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", nodes.port)) == 0

    assert eventually(answers)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n", b""):
        with connect() as stranger, suppress(ConnectionResetError):
            stranger.sendall(said)
            assert stranger.recv(10) == b""
    gone = connect()
    gone.sendall(json.dumps({"node": 1, "nnodes": 3, "nproc": 1, "vlscale": __version__}).encode() + b"\n")
    gone.close()
    guests: list[meeting.Meeting] = []
    for rank in (1, 2):
        guest = replace(nodes, rank=rank)
        threading.Thread(target=lambda guest=guest: guests.append(meeting.Meeting(guest, 1))).start()
    assert eventually(lambda: len(guests) == 2 and not host.is_alive())
    assert [guest.failure() for guest in guests] == [None, None]


@pytest.mark.parametrize(("rank", "told"), [(0, "node 1 did not come to 127.0.0.1:"), (1, "node 0 did not answer")])
def test_a_machine_that_never_comes_is_waited_for_so_long(rank: int, told: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=told) as caught:
        meeting.Meeting(Nodes(2, rank, "127.0.0.1", launch.free_port(), 1), 1)
    assert "within 1 s" in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((0, None, None, 300), "--nnodes 0: expected at least one machine"),
        ((None, None, "a:1", 300), "--rdzv a:1: only for several machines; add --nnodes"),
        ((None, 1, None, 300), "--node-rank 1: only for several machines; add --nnodes"),
        ((2, 0, None, 300), "--nnodes 2: say where they meet with --rdzv HOST:PORT"),
        ((2, None, "a:1", 300), "--node-rank missing: expected 0 to 1"),
        ((2, 2, "a:1", 300), "--node-rank is 2: expected 0 to 1"),
        ((2, -1, "a:1", 300), "--node-rank is -1: expected 0 to 1"),
        ((2, 0, "a", 300), "--rdzv a: expected HOST:PORT"),
        ((2, 0, "a:b", 300), "--rdzv a:b: expected HOST:PORT"),
        ((2, 0, "a:70000", 300), "--rdzv a:70000: expected HOST:PORT"),
        ((2, 0, "a:1", 0), "--rdzv-timeout 0: expected more than 0 seconds"),
    ],
)
def test_mistakes(given: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UserError) as caught:
        meeting.nodes(*given)
    assert told in str(caught.value)


def test_one_machine_needs_no_meeting() -> None:
    assert meeting.nodes(None, None, None, 300) == meeting.nodes(1, 0, None, 300) == meeting.ONE
    assert meeting.nodes(2, 1, "[::1]:29500", 60) == Nodes(2, 1, "::1", 29500, 60)


@pytest.mark.slow
def test_two_machines_train_as_two_ranks_of_one_do(tmp_path: Path) -> None:
    data, port = render_small(tmp_path / "scenes"), launch.free_port()
    words = ["albef_tiny", "--data", str(data), "--threads", "1", *settings(SMALL["albef_tiny"])]
    words += ["--set", "train.max_steps=3", "--ds-config", "zero2_cpu"]

    def start(out: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vlscale.cli", "pretrain", *words, "--out", str(tmp_path / out), *more]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def losses(out: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    together = ["--nproc", "1", "--nnodes", "2", "--rdzv", f"127.0.0.1:{port}"]
    machines = [start("two", *together, "--node-rank", str(node)) for node in (0, 1)]
    assert [process.wait(240) for process in machines] == [0, 0], [process.communicate() for process in machines]
    assert start("one", "--nproc", "2").wait(240) == 0
    assert losses("two") == losses("one")
