"""The input path is faster than ALBEF's, and `vlscale bench data` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.corpus import make_samples, picture, write_jsonl
from vlscale.config import Augmentation, Data
from vlscale.data import bench
from vlscale.data.bench import RANDAUGMENT, albef_transform, bench_data, photographs
from vlscale.errors import UserError


@pytest.mark.parametrize("randaugment", [None, RANDAUGMENT])
def test_an_image_costs_less_than_by_albefs_pipeline(tmp_path: Path, randaugment: tuple[int, int] | None) -> None:
    """Far below what it is (two to two and a half times), for the machine that runs this may be busy."""
    data = Data(augment=Augmentation(randaugment=randaugment))
    files = photographs(tmp_path, 24, 224, 224)
    theirs, ours = albef_transform(data), bench._Ours(data)
    with bench._one_thread():
        result = bench._compare("224 × 224", "", theirs, ours, files, rounds=5)
    assert result.ratio.median > 1.2, result
    assert result.ratio.lowest <= result.ratio.median <= result.ratio.highest


def test_albefs_pipeline_is_what_it_says(tmp_path: Path) -> None:
    """Whole crop, no flip, no RandAugment: resized and normalised."""
    picture(0, 64, 64).save(tmp_path / "a.png")
    augment = Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), randaugment=None)
    data = Data(image_size=64, augment=augment, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    expected = torch.tensor(list(picture(0, 64, 64).tobytes())).view(64, 64, 3).permute(2, 0, 1) / 127.5 - 1
    result = albef_transform(data)(tmp_path / "a.png")
    assert min((result - expected).abs().max(), (result.flip(-1) - expected).abs().max()) < 1e-5


def test_report_of_pictures_made_here(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    seen: list[tuple[str, int, int]] = []
    report = bench_data(size=64, images=3, rounds=2, on_progress=lambda *state: seen.append(state))
    assert torch.get_num_threads() == threads
    assert [row.how for row in report.pictures] == ["crop, flip", "crop, flip, RandAugment(2, 7)"] * 2
    assert all(row.theirs.median > 0 < row.ours.median for row in (*report.pictures, report.captions))
    assert report.captions.ratio.median > 1
    assert max(report.largest_difference.values()) <= 4
    assert (report.images, report.normalize_device) == (3, "cuda" if torch.cuda.is_available() else "cpu")
    assert seen[-1] == (f"{report.pictures[-1].what}, {report.pictures[-1].how}", 2, 2)
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["pictures"][0]["ratio"]["median"] == report.pictures[0].ratio.median
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_data_is_a_folder_of_images_or_what_data_takes(tmp_path: Path) -> None:
    samples = make_samples(tmp_path / "images", 5)
    (tmp_path / "images" / "broken.png").write_text("no image")
    records = [{"image": Path(str(s.image)).name, "captions": list(s.captions)} for s in samples]
    jsonl = write_jsonl(tmp_path / "captions.jsonl", records)
    for data in (tmp_path / "images", jsonl, tmp_path):
        report = bench_data(str(data), size=32, images=50, rounds=1)
        assert report.images == 5
        assert [row.what for row in report.pictures[::2]] == ["as they are, 30 × 40", "enlarged, 480 × 640"]
    assert bench_data(str(jsonl), size=32, images=2, rounds=1).images == 2


def test_what_can_not_be_measured_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of its images can be read"):
        bench_data(str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        bench_data(str(tmp_path / "missing"))
    report = bench_data(size=32, images=1, rounds=1)
    with pytest.raises(UserError, match="can't be written"):
        report.write(tmp_path / "missing" / "report.json")


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "vlscale"), "bench", "data"]
    few = ["--images", "2", "--rounds", "1", "--size", "32"]
    result = subprocess.run(
        [*command, *few, "--out", str(tmp_path / "a.json")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for words in ("ALBEF's way", "images/s", "captions/s", "RandAugment(2, 7)", "normalise", "grey levels at most"):
        assert words in result.stdout
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["images"] == 2
    for wrong in (["--data", str(tmp_path / "missing")], ["--out", str(tmp_path / "missing" / "a.json")]):
        result = subprocess.run([*command, *few, *wrong], capture_output=True, text=True, check=False)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
