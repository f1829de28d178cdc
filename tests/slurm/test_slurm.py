"""`sbatch slurm/pretrain.sh` on a cluster of two emulated nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.small import SMALL, render_small, settings
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
REASON = missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        # The scripts take vlscale from PATH.
        running.environment["PATH"] = f"{Path(sys.executable).parent}:{running.environment['PATH']}"
        yield running


def submit(cluster: Cluster, log: Path, *arguments: str) -> int:
    """Submit two ranks on two nodes and wait; the job's exit code."""
    request = ["--wait", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}", "--time=10"]
    # The emulated nodes' names don't resolve.
    request.append("--export=ALL,MASTER_ADDR=127.0.0.1")
    return cluster.run("sbatch", *request, "slurm/pretrain.sh", *arguments, check=False, cwd=ROOT).returncode


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_job_runs_one_rank_per_task_and_the_next_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    data, run, log = render_small(tmp_path / "scenes"), tmp_path / "run", tmp_path / "job.log"
    arguments = ["cb_vila_tiny", "--data", str(data), "--out", str(run), *settings(SMALL["cb_vila_tiny"])]

    assert submit(cluster, log, *arguments, "--set", "train.max_steps=3") == 0, log.read_text()
    assert "2 ranks on node[1-2]" in log.read_text()
    steps = steps_logged(run)
    assert len(steps) == 3

    assert submit(cluster, log, *arguments, "--set", "train.max_steps=5") == 0, log.read_text()
    again = steps_logged(run)
    assert again[:3] == steps
    assert len(again) == 5


def test_a_mistake_is_told_once_and_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert submit(cluster, log, "no_such_recipe", "--out", str(tmp_path / "run")) != 0
    assert log.read_text().count("no recipe 'no_such_recipe'") == 1
    assert "Traceback" not in log.read_text()
