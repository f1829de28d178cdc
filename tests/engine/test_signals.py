"""SIGUSR1 and SIGTERM: all ranks save after the same step and end with the code that says why."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import test_stages
from tests.engine.conftest import rows
from tests.engine.ranks import run_ranks
from tests.engine.toy import toy_recipe, write_data
from vlscale.engine import loop, signals
from vlscale.interop import layout

PROGRAM = """
import ctypes, os, sys, time
from vlscale.engine import signals

def stuck():
    "In C for good, as a rank at a barrier: no handler of Python's runs any more."
    print("ready", flush=True)
    mutex = (ctypes.c_byte * 64)()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def fail():
    "As when the signal ended another process of the same job."
    print("ready", flush=True)
    while not signals._received:
        time.sleep(0.01)
    raise RuntimeError("a process of the pool is gone")

def fork():
    "A child's signals are not ours."
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(1)
    os.kill(child, 15)
    _, status = os.waitpid(child, 0)
    time.sleep(signals.GRACE_SECONDS + 1)
    print("the child ended by", os.WTERMSIG(status), "we have", signals.received(), flush=True)

def train():
    with signals.training():
        stuck()

with signals.heeded():
    globals()[sys.argv[1]]()
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, what]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("what", ["stuck", "fail"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143)])
def test_before_training_there_is_nothing_to_save(
    start: Callable[[str], subprocess.Popen[str]], what: str, number: signal.Signals, code: int
) -> None:
    process = ready(start(what))
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code
    assert error == f"vlscale: ended by {number.name} with nothing to save: go on with --resume auto\n"


def test_a_second_sigterm_ends_at_once_but_an_echo_of_the_first_does_not(
    start: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = ready(start("train"))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    time.sleep(signals.GRACE_SECONDS + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_signals_of_a_forked_child_are_its_own(start: Callable[[str], subprocess.Popen[str]]) -> None:
    output, error = start("fork").communicate(timeout=30)
    assert output == "the child ended by 15 we have [False, False]\n", error


def test_no_time_beats_a_new_start() -> None:
    assert signals.chosen([False, False]) is None
    assert signals.chosen([True, False]) == signal.SIGUSR1
    assert signals.chosen([True, True]) == signals.chosen([False, True]) == signal.SIGTERM


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of two ranks that nobody signals."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run_ranks("tests.engine.signals_main", {"data": str(data), "out": str(out)}, 2)
    assert [code for code, _ in ended] == [0, 0], ended
    return rows(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "during", "workers"),
    [("SIGUSR1", 85, "step", 2), ("SIGTERM", 143, "step", 2), ("SIGUSR1", 85, "save", 0)],
)
def test_one_rank_s_signal_ends_all_after_a_checkpoint(
    data: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], name: str, code: int, during: str, workers: int
) -> None:
    out = tmp_path / "run"
    request = {"data": str(data), "out": str(out), "signal": name, "rank": 1, "during": during, "step": 5}
    ended = run_ranks("tests.engine.signals_main", {**request, "workers": workers}, 2)
    assert [found for found, _ in ended] == [code, code], ended
    assert not any("Traceback" in output for _, output in ended), ended
    step = rows(out)[-1]["step"]
    assert 5 <= step <= 7
    assert all(f"at step {step}, finished: False" in output for _, output in ended)
    assert layout.complete_checkpoints(out)[-1].name == layout.checkpoint_name(step)
    assert rows(out) == undisturbed[:step]

    ended = run_ranks("tests.engine.signals_main", {"data": str(data), "out": str(out), "resume": "auto"}, 2)
    assert [found for found, _ in ended] == [0, 0], ended
    assert rows(out) == undisturbed


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """As if SIGUSR1 came in the step of this number."""
    due: list[int | None] = [None]
    train = loop.train_step

    def step(run: loop.Run, batches: Any) -> Any:
        monkeypatch.setattr(signals, "received", lambda: [run.state.step + 1 == due[0], False])
        return train(run, batches)

    monkeypatch.setattr(loop, "train_step", step)
    return lambda number: due.__setitem__(0, number)


def test_a_signal_in_stage_1_starts_no_stage_2(
    group: None, tmp_path: Path, signal_at: Callable[[int | None], None]
) -> None:
    recipe, out = test_stages.recipe_of(tmp_path), tmp_path / "run"
    for step in (2, 6):  # in its middle, and in the last of its six steps
        signal_at(step)
        result = test_stages.run(recipe, out, resume="auto")
        assert (result.stopped, result.finished, result.out) == (signal.SIGUSR1, False, out / "stage-1")
        assert not layout.holds_run(out)
    signal_at(None)
    result = test_stages.run(recipe, out, resume="auto")
    assert (result.stopped, result.finished, result.out, result.step) == (None, True, out, 6)


def test_an_epoch_that_a_signal_cut_off_is_judged_when_the_run_goes_on(
    pretrain: Callable[..., loop.RunResult], data: Path, tmp_path: Path, signal_at: Callable[[int | None], None]
) -> None:
    recipe = toy_recipe(data, train__max_steps=9, task={"name": "retrieval"})  # 3 steps an epoch
    judged: list[int] = []

    def judge(run: loop.Run) -> dict[str, float]:
        judged.append(run.state.step)
        return {"rsum": 1.0}

    signal_at(6)
    assert pretrain(recipe, tmp_path / "run", on_epoch=judge).step == 6
    assert judged == [3]
    signal_at(None)
    assert pretrain(recipe, tmp_path / "run", resume="auto", on_epoch=judge).finished
    assert judged == [3, 6, 9]
