"""`extract_regions`: what lands in the shards, whose tags, exact resume, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.corpus import picture, write_jsonl
from tests.data.sources.layouts import detected, encoded, write_lines
from tests.data.sources.layouts import regions as vinvl_rows
from vlscale.data.regions import SOURCE_TAGS, Regions, read_regions
from vlscale.data.sample import Sample
from vlscale.data.shards import Manifest, open_shards, read_manifest
from vlscale.data.sources.vinvl import REGION_FEATURES
from vlscale.errors import UserError
from vlscale.tasks.regions import SHEET, Request, StoredRegions, extract_regions

COUNT = 23
WIDTH = 64
SIZE = 1 << 16
NAMES = ("dog", "cat", "dog", "", "faint", "sheep")
SURE = (0.5, 0.9, 0.6, 0.95, 0.1, 0.2)


class Fake:
    """Six regions of known names; features tell the image's mean and which images it came with."""

    width = WIDTH
    weights_hash = "0" * 64

    def __init__(self, name: str = "fake:one") -> None:
        self.name = name
        self.batches: list[list[str]] = []

    def extract(self, images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        self.batches.append([sample.id for sample in samples])
        assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in images)
        company = sum(float(image.float().mean()) for image in images)
        return [self._of(image, company) for image in images]

    def _of(self, image: Tensor, company: float) -> Regions:
        features = torch.full((len(NAMES), WIDTH), float(image.float().mean()))
        features[:, 1], features[:, 2], features[:, 3] = company, image.shape[1], torch.arange(len(NAMES))
        steps = torch.arange(len(NAMES)) / 10
        boxes = torch.stack([steps, steps, steps + 0.25, steps + 0.5], dim=1)
        return Regions(features, boxes, torch.tensor(SURE), NAMES)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The extractor that every specification makes."""
    made = Fake()
    module = ModuleType("vlscale.nn.detectors")
    module.make_extractor = lambda spec, weights, device: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlscale.nn.detectors", module)
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noisy pictures of different heights; every third with boxes of its own, number 5 broken."""
    rng, records = np.random.default_rng(0), []
    (tmp_path / "data").mkdir()
    for number in range(COUNT):
        noise = rng.integers(0, 256, (60 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "data" / f"{number}.png")
        own = {"boxes": [[0, 0, 0.5, 1], [0, 0, 1, 1]], "tags": ["horse", "horse"]} if number % 3 == 0 else {}
        split = "val" if number % 10 == 0 else "train"
        records.append({"image": f"{number}.png", "id": f"s{number}", "captions": ["x"], "split": split, **own})
    (tmp_path / "data" / "5.png").write_bytes(b"broken")
    return write_jsonl(tmp_path / "data" / "captions.jsonl", records)


def extract(source: Path | str, out: Path, request: Request | None = None, **options: Any) -> Manifest:
    return extract_regions([str(source)], out, request or Request("fake:one"), SIZE, **{"workers": 2, **options})


def by_id(folder: Path) -> dict[str, Sample]:
    return {sample.id: sample for sample in open_shards(folder)}


def regions_of(sample: Sample) -> Regions:
    found = read_regions(sample)
    assert found is not None
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_regions_and_tags_of_a_detector(fake: Fake, data: Path, tmp_path: Path) -> None:
    manifest = extract(data, tmp_path / "out", Request("fake:one", max_regions=4), batch=4)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.options["regions"] == {
        "extractor": "fake:one",
        "weights": "0" * 64,
        "width": WIDTH,
        "max_regions": 4,
        "max_tags": 20,
        "min_confidence": 0.2,
        "tags": "detector",
    }
    samples = by_id(tmp_path / "out")
    assert samples.keys() == {f"s{number}" for number in range(COUNT)} - {"s5"}
    assert manifest.left_out == {"missing": 0, "unreadable": 1}
    for number in (1, 3, 7):
        sample, regions = samples[f"s{number}"], regions_of(samples[f"s{number}"])
        order = [3, 1, 2, 0]
        assert regions.features[:, 3].tolist() == order
        assert regions.features[0, 2] == 60 + number, "height of its own image"
        assert regions.tags == ("", "cat", "dog", "dog")
        assert regions.confidences.tolist() == pytest.approx([SURE[row] for row in order])
        # "dog" twice: its tag's box is that of the more confident one; what is named below 0.2 is no tag.
        assert sample.tags == ("cat", "dog")
        assert sample.confidences == pytest.approx((0.9, 0.6))
        assert np.array(sample.boxes) == pytest.approx(np.array([[0.1, 0.1, 0.35, 0.6], [0.2, 0.2, 0.45, 0.7]]))
        assert sample.captions == ("x",)
    kept = samples["s3"].extra[SOURCE_TAGS]
    assert kept == {"boxes": [[0, 0, 0.5, 1], [0, 0, 1, 1]], "tags": ["horse", "horse"]}
    assert samples["s1"].extra == {}
    with Image.open(tmp_path / "out" / SHEET) as sheet:
        assert sheet.format == "JPEG"
        assert sheet.width > 1000


def test_all_regions_and_a_lower_threshold(fake: Fake, data: Path, tmp_path: Path) -> None:
    extract(data, tmp_path / "out", Request("fake:one", min_confidence=0.05))
    sample = by_id(tmp_path / "out")["s1"]
    assert len(regions_of(sample)) == 6
    assert sample.tags == ("cat", "dog", "sheep", "faint")


def test_tags_of_the_data(fake: Fake, data: Path, tmp_path: Path) -> None:
    manifest = extract(data, tmp_path / "out", Request("fake:one", ground_truth_tags=True))
    samples = by_id(tmp_path / "out")
    assert samples["s3"].tags == ("horse", "horse")
    assert samples["s3"].boxes == ((0, 0, 0.5, 1), (0, 0, 1, 1))
    assert samples["s1"].tags == ("cat", "dog", "sheep")
    regions: Any = manifest.options["regions"]
    assert regions["tags"] == "data, else detector"
    with pytest.raises(UserError, match="its tags are a detector's already"):
        extract(tmp_path / "out", tmp_path / "again", Request("fake:one", ground_truth_tags=True))


def test_grids_and_given_boxes_leave_the_tags(fake: Fake, data: Path, tmp_path: Path) -> None:
    fake.name = "boxes+grid:one@3x3"
    extract(data, tmp_path / "out", Request(fake.name))
    assert by_id(tmp_path / "out")["s3"].tags == ("horse", "horse")
    assert by_id(tmp_path / "out")["s1"].tags == ()


def test_another_extractor_on_the_shards_of_the_first(fake: Fake, data: Path, tmp_path: Path) -> None:
    extract(data, tmp_path / "one")
    fake.name = "fake:two"
    manifest = extract(tmp_path / "one", tmp_path / "two", Request("fake:two", max_regions=2))
    source: Any = manifest.sources[0]
    assert source["regions"]["extractor"] == "fake:one"
    sample = by_id(tmp_path / "two")["s3"]
    assert len(regions_of(sample)) == 2
    assert sample.extra[SOURCE_TAGS]["tags"] == ["horse", "horse"], "the data's own, not the first detector's"


@pytest.mark.parametrize("stop", [2, 9, 16, 21])
def test_an_interrupted_extraction_goes_on_to_the_same_bytes(fake: Fake, data: Path, tmp_path: Path, stop: int) -> None:
    extract(data, tmp_path / "whole", batch=4)
    assert len(list((tmp_path / "whole").glob("*.tar"))) > 4
    done = []

    def interrupt(stage: str, count: int, total: int) -> None:
        done.append(stage)
        if len(done) > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(data, tmp_path / "out", batch=4, report=interrupt)
    finished = {path.name for path in (tmp_path / "out").glob("*.tar")}
    fake.batches.clear()
    extract(data, tmp_path / "out", batch=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if len(finished) > 2:
        assert sum(map(len, fake.batches)) < COUNT - 4, "what is finished isn't done again"
    fake.batches.clear()
    (tmp_path / "out" / SHEET).unlink()
    extract(data, tmp_path / "out", batch=4)
    assert fake.batches == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_detectors_do_not_go_on(fake: Fake, data: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, count: int, total: int) -> None:
        if count > 8:
            raise KeyboardInterrupt

    extract(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        extract(data, tmp_path / "out", report=interrupt)
    fake.weights_hash = "1" * 64
    hint = r"options\.regions\.weights: 0{64} there, 1{64} now"
    with pytest.raises(UserError, match=rf"unfinished shards of other sources or options.*{hint}"):
        extract(data, tmp_path / "out")
    with pytest.raises(UserError, match=rf"of something else \({hint}\); choose another --out"):
        extract(data, tmp_path / "whole")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        extract(data, tmp_path / "full")


def test_boxes_that_the_data_has_not(fake: Fake, data: Path, tmp_path: Path) -> None:
    bare = write_jsonl(data.parent / "bare.jsonl", [{"image": "0.png", "captions": ["x"]}])
    for spec in ("boxes:any", "boxes+grid:any"):
        with pytest.raises(UserError, match=rf"{spec.replace('+', '.')}: no sample of .*bare\.jsonl has a box"):
            extract(bare, tmp_path / "out", Request(spec))
    assert not (tmp_path / "out").exists()


def test_features_that_are_no_numbers_are_left_out(
    fake: Fake, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fake._of

    def overflowing(image: Tensor, company: float) -> Regions:
        found = plain(image, company)
        return Regions(found.features * (1e6 if image.shape[1] == 62 else 1), found.boxes, found.confidences, NAMES)

    monkeypatch.setattr(fake, "_of", overflowing)
    manifest = extract(data, tmp_path / "out")
    assert manifest.left_out["unreadable"] == 2
    assert "2.png: regions: features that are not finite" in (tmp_path / "out" / "left_out.txt").read_text()


def test_memory_that_is_too_small(fake: Fake, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fake, "extract", full)
    with pytest.raises(UserError, match=r"out of memory with 3 images at once.*smaller --batch goes on"):
        extract(data, tmp_path / "out", batch=3)


def test_pairs_have_regions_of_the_first(
    fake: Fake, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = {"image": "1.png", "second": "2.png", "statements": [{"id": "a", "text": "two"}]}
    source = write_jsonl(data.parent / "pairs.jsonl", [pair, pair | {"id": "b"}])
    with caplog.at_level(logging.WARNING):
        extract(source, tmp_path / "out", batch=1)
    (first, _) = open_shards(tmp_path / "out")
    assert first.second is not None
    assert regions_of(first).features[0, 2] == 61
    assert caplog.text.count("the first alone gets regions") == 1


LABELS = {"9": ["dog", "grass", "dog"], "25": ["cat"], "30": []}
ROWS = {key: vinvl_rows(int(key), len(names)) for key, names in LABELS.items()}


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    """VinVL's features.tsv with labels.tsv and images beside them."""
    folder = tmp_path / "vinvl"
    folder.mkdir()
    for number, key in enumerate(ROWS):
        picture(number).save(folder / f"{key}.jpg")
    write_lines(folder / "labels.tsv", *[f"{k}\t{json.dumps(detected(ROWS[k], LABELS[k], 100, 80))}" for k in ROWS])
    return write_lines(folder / "features.tsv", *[f"{k}\t{len(rows)}\t{encoded(rows)}" for k, rows in ROWS.items()])


def test_features_of_the_source(tsv: Path, tmp_path: Path) -> None:
    spec = f"vinvl:{tsv},labels={tsv.with_name('labels.tsv')},images={tsv.parent}"
    manifest = extract(spec, tmp_path / "out", Request(None, min_confidence=0.5))
    options: Any = manifest.options["regions"]
    assert (options["extractor"], options["weights"], options["width"]) == ("vinvl: features of the source", None, 2048)
    samples = by_id(tmp_path / "out")
    for key, rows in ROWS.items():
        regions, order = regions_of(samples[key]), np.arange(len(rows))[::-1]  # confidences grow with the row
        assert np.array_equal(regions.features.numpy(), rows[order, :2048].astype(np.float16))
        assert np.array_equal(regions.boxes.numpy(), rows[order, 2048:2052])
        assert regions.tags == tuple(LABELS[key][row] for row in order)
        assert REGION_FEATURES not in samples[key].extra
    assert samples["9"].confidences == (0.75, 0.5)
    assert samples["9"].tags == ("dog", "grass")
    assert samples["25"].tags == (), "its confidence is 0.25"
    assert (tmp_path / "out" / SHEET).is_file()


def test_features_without_labels(tsv: Path, tmp_path: Path) -> None:
    extract(f"vinvl:{tsv}", tmp_path / "out", Request(None, max_regions=2), image_root=str(tsv.parent))
    regions = regions_of(by_id(tmp_path / "out")["9"])
    assert regions.tags == ("", "")
    assert regions.confidences.tolist() == [0, 0]
    assert np.array_equal(regions.features.numpy(), ROWS["9"][:2, :2048].astype(np.float16))


def test_what_from_source_needs(tsv: Path, data: Path, tmp_path: Path) -> None:
    for spec, request, hint in (
        (f"vinvl:{tsv}", Request(None), "no image folder, .*add images=FOLDER"),
        (str(data), Request(None), "has no region features of its own; --from-source reads vinvl: sources"),
        (f"vinvl:{tsv}", Request(None, weights="x"), "--weights belongs to an extractor"),
        (f"vinvl:{tsv}", Request(None, ground_truth_tags=True), "--ground-truth-tags belongs to an extractor"),
    ):
        with pytest.raises(UserError, match=hint):
            extract(spec, tmp_path / "out", request)


def test_pointers_of_strangers_are_not_followed(
    fake: Fake, tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may say what it likes: only files that the user named are opened for features."""
    monkeypatch.setattr("vlscale.data.sources.vinvl.read_features", lambda pointer: pytest.fail("followed"))
    line = tsv.read_bytes().splitlines()[0]
    offset = line.rindex(b"\t") + 1
    pointer = {"file": str(tsv), "offset": offset, "length": len(line) - offset, "boxes": 3, "width": 2054}
    record = {"image": "9.jpg", "captions": ["x"], REGION_FEATURES: pointer}
    source = write_jsonl(tsv.parent / "evil.jsonl", [record])
    extract(source, tmp_path / "shards")
    assert by_id(tmp_path / "shards")["9.jpg"].extra[REGION_FEATURES] == pointer
    for spec in (source, tmp_path / "shards", f"tars:{tmp_path / 'shards'}"):
        with pytest.raises(UserError, match="has no region features of its own"):
            extract(spec, tmp_path / "out", Request(None))
    # Nor would a record get through among those of a TSV.
    stranger = Sample("a", tsv.parent / "9.jpg", extra={REGION_FEATURES: pointer | {"file": "/etc/passwd"}})
    (outcome,) = StoredRegions([str(tsv)], Request(None)).annotate([stranger], [picture(0)])
    assert "none of the sources'" in str(outcome)
