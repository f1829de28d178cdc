import pytest
import torch

from tests.engine.ranks import run_ranks
from vlscale import distributed
from vlscale.errors import UserError


def test_two_ranks_get_the_gradient_of_the_whole_batch() -> None:
    results = run_ranks("tests.engine.gather_main", {}, 2)
    assert [code for code, _ in results] == [0, 0], results


def test_alone_the_collectives_change_nothing() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert distributed.gather_with_grad(tensor) is tensor
    assert not distributed.gather(tensor).requires_grad
    assert torch.equal(distributed.all_reduce_sum(tensor), torch.ones(2))


def test_a_process_alone_is_rank_0_of_1() -> None:
    environment: dict[str, str] = {}
    distributed.complete_environment(environment)
    assert {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    assert int(environment["MASTER_PORT"]) > 0


def test_a_slurm_task_is_mapped_and_its_address_may_be_given() -> None:
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "MASTER_ADDR": "10.0.0.1",
    }
    distributed.complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "20007")


def test_a_batch_script_is_no_task() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    distributed.complete_environment(environment)
    assert environment["WORLD_SIZE"] == "1"


def test_a_launcher_that_forgets_something_is_told() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT not set"):
        distributed.complete_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_the_launchers_variables_stay() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    before = dict(environment)
    distributed.complete_environment(environment)
    assert environment == before


@pytest.mark.parametrize("counts", [[[2], [0]], [[3, 1], [0, 2], [0, 0]], [[1, 0, 4], [0, 0, 1], [2, 2, 2]]])
def test_ranks_may_gather_different_numbers_of_rows(counts: list[list[int]]) -> None:
    results = run_ranks("tests.engine.uneven_main", counts, len(counts[0]))  # type: ignore[arg-type]
    assert [code for code, _ in results] == [0] * len(counts[0]), results
