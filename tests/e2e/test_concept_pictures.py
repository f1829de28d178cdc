"""`vlscale inspect attention` and `vlscale inspect concepts` as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Here
from tests.e2e.small import assert_one_line
from tests.inspect.concept_run import make_run


def test_pages_of_a_run(here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert here("inspect", "attention", run, "--sample", "id-1", "--layer", "0", "--head", "1") == 0
    assert capfd.readouterr().out.strip() == str(run / "attention" / "index.html")
    assert here("inspect", "concepts", run, "--count", "5", "--out", tmp_path / "page") == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    assert here("inspect", "attention", run, "--layer", "7") == 2
    assert_one_line(capfd.readouterr().err, "layer 7: there are 2 of them")


@pytest.mark.parametrize("command", ["attention", "concepts"])
def test_a_missing_run_is_one_line(here: Here, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("inspect", command, "no_such_run") == 2
    assert_one_line(capfd.readouterr().err, "no_such_run")
