"""The page of a codebook over the cells of padded images of many shapes, against slow re-computations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.inspect.aspect_run import SHAPES, STRIDE, make_aspect_run
from tests.inspect.test_pages import check_page
from tests.small_run import make_run
from vlscale.data.images import eval_transform, load_image
from vlscale.data.sample import Sample
from vlscale.inspect import codebook, report
from vlscale.inspect.codebook import inspect_codebook, usage_table
from vlscale.inspect.index_maps import LEGEND, STRENGTH, _title
from vlscale.inspect.palette import distinct_colours
from vlscale.inspect.usage import PADDING, assign_codes
from vlscale.interop.run import Run, run_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_aspect_run(tmp_path_factory.mktemp("aspect"))


def inspected(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The page and its section of the dictionary."""
    monkeypatch.setattr(codebook, "load_run", lambda source: run)
    page = inspect_codebook("aspect", out=folder, **options)
    return page, content_of(page)["codebooks"]["dictionary"]


def content_of(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / report.CODEBOOK).read_text())


def slow_codes(run: Run) -> list[np.ndarray]:
    """Per image the code of every cell that shows some of it, [rows, columns], each computed alone.

    What is beside the image in its cells is the mean colour, as padding is.
    """
    data = run.recipe.data
    codes = run.system.codebooks()["dictionary"].codes.double().numpy()
    found = []
    for sample in run_samples(run, None, None)[1]:
        pixels = eval_transform(data)(load_image(sample.image)).permute(1, 2, 0).numpy()
        plain = (pixels / 255 - np.array(data.mean)) / np.array(data.std)
        rows, columns = (-(-side // STRIDE) for side in plain.shape[:2])
        canvas = np.zeros((rows * STRIDE, columns * STRIDE, 3))
        canvas[: plain.shape[0], : plain.shape[1]] = plain
        means = canvas.reshape(rows, STRIDE, columns, STRIDE, 3).mean(axis=(1, 3))
        found.append(np.linalg.norm(means[:, :, None] - codes, axis=-1).argmin(axis=-1))
    return found


def test_padding_counts_nowhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, section = inspected(run, tmp_path / "page", monkeypatch, codes=4)
    codes = slow_codes(run)
    assert len({shown.shape for shown in codes}) > 3, "images of different shapes"
    counts = Counter(code for shown in codes for code in shown.flatten().tolist())
    total = sum(counts.values())
    assert section["patches"] == total
    assert section["images"] == len(codes)
    assert section["dead"] == [code for code in range(13) if code not in counts]
    shares = np.array(list(counts.values())) / total
    assert section["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert section["codes_per_image"] == pytest.approx(np.mean([len(np.unique(shown)) for shown in codes]))
    for entry in section["codes"]:
        assert entry["count"] == counts[entry["code"]]
        assert entry["images"] == sum((shown == entry["code"]).any() for shown in codes)
        assert entry["share"] == pytest.approx(counts[entry["code"]] / total)
    sizes = [shown.size for shown in codes]
    facts = content_of(page)["facts"]
    expected = f"{min(sizes)} to {max(sizes)}, {np.mean(sizes):.0f} on average"
    assert facts["patches per image"] == expected
    assert facts["resolution"] == "shorter side 56, longer side at most 120"


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_codes_do_not_depend_on_the_batches(run: Run, batch_size: int) -> None:
    """A batch's canvas is that of its largest images: more padding, other grid, same cells."""
    samples = run_samples(run, None, None)[1]
    assigned = assign_codes(run.system, samples, run.recipe.data, batch_size, torch.device("cpu"), "run")
    expected = slow_codes(run)
    assert len(assigned.images) == len(expected)
    for index, (image, shown) in enumerate(zip(assigned.images, expected, strict=True)):
        cells = assigned.of("dictionary", index).reshape(image.rows, image.columns)
        rows, columns = shown.shape
        assert image.shown() == shown.shape
        assert (cells[:rows, :columns] == shown).all()
        assert (cells[rows:] == PADDING).all()
        assert (cells[:, columns:] == PADDING).all()
    assert (assigned.codes["dictionary"] != PADDING).sum() == sum(shown.size for shown in expected)


def test_cells_that_hold_nothing_of_the_image_count_nowhere(run: Run, tmp_path: Path) -> None:
    """Whatever a system says of them: there is nothing to show."""
    generous = make_aspect_run(tmp_path, generous=True)
    samples = run_samples(generous, None, None)[1]
    found, expected = (
        assign_codes(r.system, samples, r.recipe.data, 4, torch.device("cpu"), "run").codes["dictionary"]
        for r in (generous, run)
    )
    assert (found == expected).all()


def test_index_maps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, section = inspected(run, tmp_path / "page", monkeypatch, codes=4)
    links = check_page(page)
    found = section["index_maps"]
    codes = slow_codes(run)  # eight images: all are drawn
    counts = Counter(code for shown in codes for code in shown.flatten().tolist())
    ranked = sorted(counts, key=lambda code: (-counts[code], code))
    assert [entry["code"] for entry in found["legend"]] == ranked[:LEGEND]
    assert found["different"] == len(counts)
    colours = dict(zip(ranked, distinct_colours(len(ranked)).tolist(), strict=True))
    for entry in found["legend"]:
        assert entry["share"] == entry["everywhere"] == pytest.approx(counts[entry["code"]] / counts.total())
        assert entry["colour"] == "#{:02x}{:02x}{:02x}".format(*colours[entry["code"]])
        assert f"background: {entry['colour']}" in links.text
    samples = run_samples(run, None, None)[1]
    shown_of = {sample.captions[0]: shown for sample, shown in zip(samples, codes, strict=True)}
    resize = eval_transform(run.recipe.data)
    sizes = {sample.captions[0]: resize(load_image(sample.image)).shape[1:] for sample in samples}  # height, width
    assert len(found["maps"]) == len(samples) == len(SHAPES) - 1
    for entry in found["maps"]:
        shown = shown_of[entry["caption"]]
        assert (entry["cells"], entry["different"]) == (shown.size, len(np.unique(shown)))
        assert entry["picture"] in links.targets
        picture = np.asarray(Image.open(page.parent / entry["picture"]).convert("RGB")).astype(float)
        width = (picture.shape[1] - 3) // 2
        height, _ = sizes[entry["caption"]]
        assert picture.shape[0] / width == pytest.approx(np.divide(*sizes[entry["caption"]]), rel=0.01)
        pixels_per_cell = STRIDE * picture.shape[0] / height
        for (row, column), code in np.ndenumerate(shown):
            # The middle of a cell, or near the image's border.
            y = min(int((row + 0.5) * pixels_per_cell), picture.shape[0] - 1)
            x = min(int((column + 0.5) * pixels_per_cell), width - 1)
            light = (picture[y, width + 3 + x] - STRENGTH * np.array(colours[int(code)])) / (1 - STRENGTH)
            assert light.max() - light.min() < 8, "the colour of the index and a grey"


def test_captions_are_escaped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = inspected(run, tmp_path / "page", monkeypatch, codes=2)
    text = check_page(page).text
    assert "<i>house" not in text
    assert "&lt;i&gt;house&lt;/i&gt; &amp; &quot;garden&quot; 3 (" in text


def test_images_without_caption_go_by_their_name() -> None:
    assert _title(Sample("/home/a/b.png", Path("/home/a/b.png"))) == "b.png"


def test_all_pictures_are_drawn_and_the_same_every_time(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        inspected(run, tmp_path / name, monkeypatch, codes=3)
    first = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    names = {path.name for path in first}
    assert {"map-legend.png", "map-00.png", "map-07.png", "overview.png", "examples.png", "usage.png"} <= names
    for path in first:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_maps_go_with_the_other_pictures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, section = inspected(run, tmp_path / "a", monkeypatch, show_patches=False)
    assert [path.name for path in page.parent.rglob("*.png")] == ["usage.png"]
    assert "index_maps" not in section
    page, _ = inspected(run, tmp_path / "b", monkeypatch, code=3)
    assert sorted(path.name for path in page.parent.rglob("*.png")) == ["code-0003.png", "examples.png", "usage.png"]


def test_codes_of_zero_norm_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    codes[[4, 9]] = torch.tensor([[0.0, 0, 0], [1e-6, 0, 0]])
    page, section = inspected(make_aspect_run(tmp_path / "run", codes=codes), tmp_path / "page", monkeypatch, codes=2)
    assert section["zero_norm"] == [4, 9]
    assert section["zero_norm_share"] == pytest.approx(0.1)
    text = check_page(page).text
    assert "<b>10.0 %</b><span>of zero norm</span>" in text
    assert "2 codes of (almost) zero norm</summary><code>4, 9</code>" in text
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(usage_table(page))
    assert "2 of zero norm" in " ".join(console.export_text().split())


def test_nothing_is_said_where_no_code_is_zero(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, section = inspected(run, tmp_path / "page", monkeypatch, codes=2)
    assert not {"zero_norm", "zero_norm_share"} & set(section)
    assert "zero norm" not in check_page(page).text


def test_square_images_have_maps_too(tmp_path: Path) -> None:
    page = inspect_codebook(str(make_run(tmp_path)), codes=4, out=tmp_path / "page")
    content = content_of(page)
    found = content["codebooks"]["visual"]["index_maps"]
    assert content["facts"]["patches per image"] == "4 × 4"
    assert [entry["cells"] for entry in found["maps"]] == [16] * 8
    assert {entry["picture"] for entry in found["maps"]} <= set(check_page(page).targets)
