"""`vlscale data regions` from the command line: a network's grid and boxes on scenes, and what users get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Here
from tests.e2e.small import assert_one_line
from vlscale.data.regions import read_regions
from vlscale.data.shards import open_shards

NETWORK = "tf_efficientnet_lite0"


def test_boxes_and_a_grid_on_scenes(
    scenes: Path, tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extractor = f"boxes+grid:{NETWORK}@2x3,size=64"
    assert here("data", "regions", scenes, "--out", out, "--extractor", extractor, "--weights", "random") == 0
    printed = capsys.readouterr().out
    assert f"boxes+grid:{NETWORK}@2x3" in printed
    assert str(out / "regions.jpg") in printed
    samples = list(open_shards(out))
    assert len(samples) == 32
    for sample in samples:
        regions = read_regions(sample)
        assert regions is not None
        assert regions.tags == (*sample.tags, *[""] * 6)
        assert regions.boxes[: len(sample.boxes)].tolist() == [pytest.approx(box) for box in sample.boxes]
        assert regions.features.abs().sum(dim=1).min() > 0
        assert sample.captions
    assert here("data", "validate", out) == 0
    assert here("data", "show", out, "--regions", "--out", tmp_path / "sheet.png") == 0
    other = ["--extractor", f"grid:{NETWORK}@2x3,size=64", "--weights", "random"]
    capsys.readouterr()
    assert here("data", "regions", scenes, "--out", out, *other) == 2
    assert f"options.regions.extractor: {extractor} there" in capsys.readouterr().err


MISTAKES = {
    "nothing that finds them": ([], "either --extractor KIND:MODEL, or --from-source"),
    "two that find them": (["--extractor", f"grid:{NETWORK}", "--from-source"], "either --extractor"),
    "unknown extractor": (["--extractor", "magic:x"], "magic"),
    "no weights": (["--extractor", f"grid:{NETWORK}"], "--weights"),
    "missing weights": (["--extractor", f"grid:{NETWORK}", "--weights", "no_such.pt"], "no_such.pt"),
    "no features in the data": (["--from-source"], "has no region features of its own"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, scenes: Path, tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    options, hint = MISTAKES[mistake]
    assert here("data", "regions", scenes, "--out", tmp_path / "out", *options) == 2
    assert_one_line(capsys.readouterr().err, hint)
    assert not (tmp_path / "out").exists()
