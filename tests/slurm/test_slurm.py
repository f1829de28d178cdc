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


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_job_runs_one_rank_per_task_and_goes_on_when_requeued(cluster: Cluster, tmp_path: Path) -> None:
    data, run, log = render_small(tmp_path / "scenes"), tmp_path / "run", tmp_path / "job.log"
    arguments = ["cb_vila_tiny", "--data", str(data), "--out", str(run), *settings(SMALL["cb_vila_tiny"])]
    arguments += ["--set", "train.max_steps=3"]

    assert submit(cluster, log, *arguments) == 0, log.read_text()
    assert "2 ranks on node[1-2]" in log.read_text()
    losses = losses_of(run)
    assert len(losses) == 3

    # As if the job had died in its last save: the marker is written last.
    (run / "checkpoints" / "step-00000003" / "COMPLETE").unlink()
    assert submit(cluster, log, *arguments) == 0, log.read_text()
    assert "after step 2" in log.read_text()
    assert losses_of(run) == losses


def test_a_mistake_is_told_once_and_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert submit(cluster, log, "no_such_recipe", "--out", str(tmp_path / "run")) != 0
    assert log.read_text().count("no recipe 'no_such_recipe'") == 1
    assert "Traceback" not in log.read_text()
