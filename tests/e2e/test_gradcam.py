"""`vlscale inspect gradcam` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Here
from tests.e2e.small import assert_one_line
from tests.small_run import make_run


def test_maps_of_a_file_and_of_the_data(here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "codis")
    assert here("inspect", "gradcam", run, "--count", "2", "--token", "one") == 0
    picture = run / "gradcam.png"
    assert capfd.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    image, out = tmp_path / "data" / "0.png", tmp_path / "maps" / "one.png"
    assert (
        here("inspect", "gradcam", run, "--image", image, "--text", "one", "--itc", "--layer", "0", "--out", out) == 0
    )
    assert out.is_file()
    assert here("inspect", "gradcam", run, "--token", "7", "--text", "one") == 2
    assert_one_line(capfd.readouterr().err, "--token 7: not among the words of 'one'")
