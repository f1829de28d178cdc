"""The job scripts on a cluster of two emulated nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.small import SMALL, render_small, settings
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
REASON = missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
STEPS = 200
"""Long enough to be disturbed."""


class Clone:
    """A folder with the scripts, from which jobs are submitted as a user does."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.out"))
        self.logs = folder / "slurm" / "logs"

    def submit(self, script: str, *arguments: str, flags: tuple[str, ...] = ()) -> int:
        """Two ranks on two nodes; the job's number."""
        request = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10", *flags]
        return int(self._run("sbatch", *request, f"slurm/{script}", *arguments))

    def call(self, script: str, *arguments: str, **environment: str) -> int:
        """`bash slurm/SCRIPT`, outside a job; the number of what it submitted."""
        said = self._run("env", *(f"{k}={v}" for k, v in environment.items()), "bash", f"slurm/{script}", *arguments)
        return int(said.split()[-1])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        fields = self.cluster.run("scontrol", "show", "job", "--oneliner", str(number)).stdout.split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def until(self, number: int, condition: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.job(number), self.log(number))
            time.sleep(0.1)

    def ended(self, number: int) -> str:
        """Wait until the job is over; its exit code, as CODE:SIGNAL."""
        self.until(number, lambda: self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.job(number)["ExitCode"]

    def requeued(self, number: int) -> None:
        """Wait until the job waits for its next life, and let it start now: Slurm holds it for two minutes."""
        self.until(number, lambda: self.job(number)["JobState"] == "PENDING" and self.job(number)["Restarts"] != "0")
        time.sleep(2)  # a credential of the second in which the first life's was revoked is refused
        self.cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def log(self, number: int) -> str:
        """All that a job wrote, where the scripts say that it writes."""
        return "\n".join(path.read_text() for path in [*self.logs.glob(f"*-{number}/*"), self.job_log(number)])

    def job_log(self, number: int) -> Path:
        return next(iter(self.logs.glob(f"vlscale-*-{number}.out")), Path(os.devnull))

    def _run(self, *command: str) -> str:
        done = self.cluster.run(*command, check=False, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        # The scripts take vlscale from PATH, and the emulated nodes' names don't resolve.
        running.environment |= {"PATH": f"{Path(sys.executable).parent}:{running.environment['PATH']}"}
        running.environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        yield running


@pytest.fixture(scope="module")
def clone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(cluster, tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that is small and long."""
    data = render_small(tmp_path_factory.mktemp("data") / "scenes")
    small = {**SMALL["albef_tiny"], "checkpoint.every": "1000", "train.max_steps": str(STEPS)}
    return ["albef_tiny", "--data", str(data), "--ds-config", "zero2_cpu", *settings(small)]


@pytest.fixture(scope="module")
def undisturbed(clone: Clone, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its start to its end in one life, as `sbatch slurm/pretrain.sh`."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    number = clone.submit("pretrain.sh", *words, "--out", str(run))
    assert clone.ended(number) == "0:0", clone.log(number)
    log = clone.job_log(number).read_text()
    assert f"job {number}: 2 ranks on node[1-2], meeting at 127.0.0.1:{12000 + number}\n" in log
    assert re.search(r"^versions: Python 3\.\d+\.\d+, vlscale [\d.]+, torch \S+, deepspeed \S+", log, re.MULTILINE)
    assert f"command: vlscale pretrain --resume auto albef_tiny --data {words[2]}" in log
    assert f"{run}: {STEPS} steps done" in log
    ranks = sorted(path.name for path in (clone.logs / f"vlscale-pretrain-{number}").iterdir())
    host = socket.gethostname().split(".")[0]
    assert ranks == [f"{host}-rank0.out", f"{host}-rank1.out"]
    return run


def losses_of(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}")]


def test_a_warned_job_saves_is_requeued_and_ends_as_if_undisturbed(
    clone: Clone, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = clone.submit("pretrain.sh", *words, "--out", str(run))
    clone.until(number, lambda: len(losses_of(run)) > 3)
    clone.cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    clone.requeued(number)
    step = len(losses_of(run))
    assert step < STEPS
    assert f"ended by SIGUSR1, saved at step {step}; go on with --resume auto" in clone.log(number)

    assert clone.ended(number) == "0:0", clone.log(number)
    assert clone.job(number)["Restarts"] == "1"
    assert f"job {number}, requeued 1 times: 2 ranks" in clone.log(number)
    assert f"after step {step}" in clone.log(number)
    assert "Traceback" not in clone.log(number)
    assert losses_of(run) == losses_of(undisturbed)


def test_slurm_warns_before_the_time_is_up(clone: Clone, words: list[str], tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "run"), "--set", "train.max_steps=1000000"]
    number = clone.submit("pretrain.sh", *words, *more, flags=("--time=1", "--signal=B:USR1@20"))
    clone.requeued(number)
    clone.cluster.run("scancel", str(number))
    assert "ended by SIGUSR1" in clone.log(number)  # Slurm may warn a minute early: then there was nothing to save
    assert "Traceback" not in clone.log(number)


def test_a_preempted_job_saves_in_its_grace(clone: Clone, words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = clone.submit("pretrain.sh", *words, "--out", str(run))
    clone.until(number, lambda: len(losses_of(run)) > 3)
    clone.cluster.run("scontrol", "requeue", str(number))
    clone.requeued(number)
    step = len(losses_of(run))
    assert f"ended by SIGTERM, saved at step {step}" in clone.log(number)

    clone.until(number, lambda: len(losses_of(run)) > step + 3)
    clone.cluster.run("scancel", "--signal=TERM", str(number))
    assert clone.ended(number) == "143:0", clone.log(number)
    assert clone.job(number)["JobState"] == "FAILED"  # nobody asked for another life
    assert len(losses_of(run)) < STEPS

    number = clone.submit("pretrain.sh", *words, "--out", str(run))
    assert clone.ended(number) == "0:0", clone.log(number)
    assert losses_of(run) == losses_of(undisturbed)


def test_a_mistake_is_told_once_and_fails_the_job(clone: Clone, tmp_path: Path) -> None:
    number = clone.submit("pretrain.sh", "no_such_recipe", "--out", str(tmp_path / "run"))
    assert clone.ended(number) != "0:0"
    assert clone.job(number)["Restarts"] == "0"
    assert clone.job_log(number).read_text().count("no recipe 'no_such_recipe'") == 1
    assert "Traceback" not in clone.log(number)


def test_two_jobs_on_the_same_nodes_do_not_meet(clone: Clone, words: list[str], tmp_path: Path) -> None:
    short = [*words, "--set", "train.max_steps=5"]
    # The port that the first one would take is taken.
    first = clone.submit("pretrain.sh", *short, "--out", str(tmp_path / "0"), flags=("--hold",))
    second = clone.submit("pretrain.sh", *short, "--out", str(tmp_path / "1"))
    with socket.create_server(("127.0.0.1", 12000 + first)):
        clone.cluster.run("scontrol", "release", str(first))
        assert [clone.ended(number) for number in (first, second)] == ["0:0", "0:0"], clone.log(first)
    ports = [re.search(r"meeting at 127\.0\.0\.1:(\d+)", clone.log(number)) for number in (first, second)]
    assert len({found[1] for found in ports if found}) == 2
    assert str(12000 + first) not in {found[1] for found in ports if found}
    assert [len(losses_of(tmp_path / name)) for name in "01"] == [5, 5]


def test_a_port_that_was_asked_for_and_is_taken_is_told(clone: Clone, words: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        number = clone.submit("pretrain.sh", *words, flags=(f"--export=ALL,MASTER_PORT={port}",))
        assert clone.ended(number) == "2:0"
    assert f"MASTER_PORT={port}: somebody listens there" in clone.log(number)


def test_fine_tuning_and_evaluation(clone: Clone, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    more = ["--set", "train.max_steps=4", "--ds-config", "zero2_cpu"]
    number = clone.submit("finetune.sh", "retrieval", "--from", str(undisturbed), "--out", str(run), *more)
    assert clone.ended(number) == "0:0", clone.log(number)
    assert f"{run}: 4 steps done" in clone.job_log(number).read_text()

    number = clone.submit("eval.sh", "retrieval", "--from", str(run))
    assert clone.ended(number) == "0:0", clone.log(number)
    assert "2 ranks on node[1-2]" in clone.job_log(number).read_text()
    assert "t2i_r1" in json.loads((run / "eval" / "retrieval.json").read_text())["metrics"]


def test_an_ablation_as_an_array_ends_with_one_table(clone: Clone, words: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text("rows: [{name: as it is}, {name: no MLM, set: [weights.mlm=0]}]")
    more = ["--rows", str(rows), "--seeds", "1", "--out", str(tmp_path / "all"), "--set", "train.max_steps=4"]
    number = clone.call("ablate.sh", *words, *more, VLSCALE_CPUS_PER_RANK="1", VLSCALE_TIME="10")

    def codes() -> list[str]:
        said = clone.cluster.run("scontrol", "show", "job", "--oneliner", str(number)).stdout
        return re.findall(r"JobState=(\w+)", said)

    clone.until(number, lambda: not set(codes()) & {"PENDING", "RUNNING", "COMPLETING"})
    logs = {path.name: path.read_text() for path in clone.logs.glob(f"vlscale-ablate-{number}_*.out")}
    assert codes() == ["COMPLETED"] * 2, logs
    assert sorted(logs) == [f"vlscale-ablate-{number}_{task}.out" for task in (1, 2)]
    table = json.loads((tmp_path / "all" / "ablation.json").read_text())
    assert [(row["name"], row["n"]) for row in table["rows"]] == [("as it is", 1), ("no MLM", 1)]
