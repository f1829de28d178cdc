"""The job scripts where there is no Slurm: what they would submit, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").glob("*.sh"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with an sbatch that prints what it is called with."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch $*\n")
    (tmp_path / "sbatch").chmod(0o755)
    names = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "VLSCALE"))}
    return {**names, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def bash(script: str, *words: str, environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "slurm" / script), *words]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_plain_call_submits_with_flags_of_the_environment(environment: dict[str, str]) -> None:
    given = {"NODES": "2", "GPUS_PER_NODE": "h100:4", "TIME": "08:00:00", "PARTITION": "gpu", "CPUS_PER_RANK": "12"}
    environment |= {f"VLSCALE_{name}": value for name, value in given.items()}
    done = bash("pretrain.sh", "cb_vila_base", "--set", "train.lr=1e-4", environment=environment)
    assert done.stdout == (
        "sbatch --ntasks-per-node 4 --nodes=2 --gpus-per-node=h100:4 --cpus-per-task=12 --time=08:00:00 "
        "--partition=gpu slurm/pretrain.sh cb_vila_base --set train.lr=1e-4\n"
    ), done.stderr


def test_without_any_one_rank_on_one_node(environment: dict[str, str]) -> None:
    done = bash("finetune.sh", "vqa", "--from", "runs/x", environment=environment)
    assert done.stdout == "sbatch --ntasks-per-node 1 slurm/finetune.sh vqa --from runs/x\n", done.stderr


def test_evaluations_of_one_rank_ask_for_one(environment: dict[str, str]) -> None:
    environment |= {"VLSCALE_GPUS_PER_NODE": "2"}
    ranks = {
        task: bash("eval.sh", task, environment=environment).stdout.split()[2] for task in ("retrieval", "grounding")
    }
    assert ranks == {"retrieval": "2", "grounding": "1"}


def test_an_ablation_is_an_array_of_its_rows_and_seeds(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["albef_tiny", "--rows", str(tmp_path / "rows.yaml"), "--seeds", "2"]
    (tmp_path / "rows.yaml").write_text("rows: [{name: a}, {name: b}, {name: c, set: [weights.itm=0]}]")
    done = bash("ablate.sh", *words, environment=environment)
    assert "--array=1-6 slurm/ablate.sh albef_tiny" in done.stdout, done.stderr
    done = bash("ablate.sh", "no_recipe", *words[1:], environment=environment)
    assert done.returncode == 2
    assert "sbatch" not in done.stdout


def test_scripts_are_called_from_the_root_of_the_clone(environment: dict[str, str], tmp_path: Path) -> None:
    done = bash("pretrain.sh", environment=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path} has no slurm/common.sh: call this from the root of the clone\n"


def test_the_folder_of_the_logs_comes_with_the_clone() -> None:
    tracked = subprocess.run(
        ["git", "check-ignore", "slurm/logs/.gitignore"], cwd=ROOT, capture_output=True, check=False
    )
    assert (ROOT / "slurm/logs/.gitignore").is_file()
    assert tracked.returncode != 0  # 128 where this is no clone


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
