"""The pages of an untrained run: complete, self-contained, replaced as a whole."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.small_run import make_run
from vlscale.cli.main import main
from vlscale.errors import UserError
from vlscale.inspect import patch_page, report
from vlscale.inspect.codebook import inspect_codebook, usage_table
from vlscale.inspect.reconstructions import inspect_reconstructions, unexplained_variance
from vlscale.interop.run import load_run, run_samples
from vlscale.objectives.patches import patchify
from vlscale.systems.protocol import Reconstruction


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


class Links(HTMLParser):
    """Everything that a page refers to, and the tags it holds."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.tags: list[str] = []
        self.text = page.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.targets += [value for name in ("src", "href") if (value := values.get(name))]
        if identity := values.get("id"):
            self.anchors.add(identity)


def check_page(page: Path) -> Links:
    """Every picture is there, every link leads somewhere, nothing comes from elsewhere."""
    links = Links(page)
    for target in links.targets:
        if target.startswith("#"):
            assert target[1:] in links.anchors
        else:
            assert not re.match(r"[a-z]+:|/", target)
            with Image.open(page.parent / target) as image:
                image.verify()
    assert "script" not in links.tags
    assert "http" not in links.text
    assert "url(" not in links.text
    return links


def test_page(run: Path, tmp_path: Path) -> None:
    page = inspect_codebook(str(run), codes=4, out=tmp_path / "page")
    links = check_page(page)
    content = json.loads((page.parent / report.CODEBOOK).read_text())
    section = content["codebooks"]["visual"]
    codes = expected_codes(run)
    counts = np.bincount(codes.flatten(), minlength=24)
    assert section["patches"] == codes.size == 160
    assert section["dead"] == np.flatnonzero(counts == 0).tolist()
    shares = counts[counts > 0] / codes.size
    assert section["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert section["codes_per_image"] == pytest.approx(sum(len(set(row)) for row in codes.tolist()) / 10)
    listed = [entry["code"] for entry in section["codes"]]
    assert [counts[code] for code in listed[:4]] == sorted(counts, reverse=True)[:4]
    for entry in section["codes"]:
        assert entry["count"] == counts[entry["code"]]
        assert f"code-{entry['code']}" in links.anchors
    for picture in ("usage", "overview", "examples"):
        assert f"visual/{picture}.png" in links.targets
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(usage_table(page))
    assert f"{section['perplexity']:.1f}" in console.export_text()


def expected_codes(run: Path) -> np.ndarray:
    """Codes of every cell, image by image."""
    from vlscale.data.images import eval_transform, load_image, normalize

    loaded = load_run(run)
    data = loaded.recipe.data
    with torch.inference_mode():
        rows = []
        for sample in run_samples(loaded, None, None)[1]:
            pixels = normalize(eval_transform(data)(load_image(sample.image))[None], data.mean, data.std)
            features = loaded.system.vision(pixels)[0, 1:]
            rows.append(torch.cdist(features[None], loaded.system.codebook.codes[None])[0].argmin(1).numpy())
    return np.stack(rows)


def test_statistics_only(run: Path, tmp_path: Path) -> None:
    page = inspect_codebook(str(run), show_patches=False, out=tmp_path / "page")
    check_page(page)
    assert [path.name for path in page.parent.rglob("*.png")] == ["usage.png"]


def test_one_code(run: Path, tmp_path: Path) -> None:
    counts = np.bincount(expected_codes(run).flatten(), minlength=24)
    alive, dead = int(counts.argmax()), int(counts.argmin())
    assert counts[dead] == 0
    page = inspect_codebook(str(run), code=alive, out=tmp_path / "page")
    check_page(page)
    names = sorted(path.name for path in page.parent.rglob("*.png"))
    assert names == [f"code-{alive:04d}.png", "examples.png", "usage.png"]
    page = inspect_codebook(str(run), code=dead, out=tmp_path / "page")
    check_page(page)
    assert sorted(path.name for path in page.parent.rglob("*.png")) == ["examples.png", "usage.png"]
    with pytest.raises(UserError, match="codes 0 to 23"):
        inspect_codebook(str(run), code=24, out=tmp_path / "page")
    assert page.is_file(), "the page before is still there"
    assert [path.name for path in tmp_path.iterdir()] == ["page"], "and nothing half-made"


def test_reconstructions_are_on_the_same_page_whichever_comes_first(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    picture = inspect_reconstructions(str(run), count=3, out=folder)
    assert picture == folder / "reconstructions.png"
    assert "reconstructions.png" in check_page(folder / "index.html").targets
    (folder / "notes.txt").write_text("mine")
    before = picture.read_bytes()
    inspect_codebook(str(run), codes=2, out=folder)
    links = check_page(folder / "index.html")
    assert {"reconstructions.png", "visual/usage.png"} <= set(links.targets)
    assert picture.read_bytes() == before
    assert (folder / "notes.txt").read_text() == "mine"
    inspect_reconstructions(str(run), count=5, out=folder)
    assert {"reconstructions.png", "visual/usage.png"} <= set(check_page(folder / "index.html").targets)
    assert picture.read_bytes() != before


def test_pictures_are_the_same_every_time(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        inspect_codebook(str(run), codes=3, out=tmp_path / name)
        inspect_reconstructions(str(run), count=2, out=tmp_path / name)
    first = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(first) > 6
    for path in first:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_a_folder_of_something_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        inspect_codebook(str(run), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failure_leaves_the_old_page(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    with report.replaced_folder(folder) as new:
        (new / report.CODEBOOK).write_text('{"codebooks": {}, "files": ["old.png"]}')
        (new / "old.png").touch()
    with pytest.raises(FileNotFoundError), report.replaced_folder(folder) as new:
        (new / "no such folder" / "half.png").touch()
    assert sorted(path.name for path in folder.iterdir()) == ["codebook.json", "index.html", "old.png"]
    with report.replaced_folder(folder) as new:
        (new / report.CODEBOOK).write_text('{"codebooks": {}, "files": []}')
    assert sorted(path.name for path in folder.iterdir()) == ["codebook.json", "index.html"], "old pictures go"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_text_is_escaped() -> None:
    evil = '<img src="x">&'
    escaped = "&lt;img src=&quot;x&quot;&gt;&amp;"
    for html in (report.figure(evil, evil, evil), report.document(evil, [])):
        assert evil not in html
        assert escaped in html
    shares = [{"tag": evil, "share": 1.0, "everywhere": 0.5}]
    entry = {"code": 3, "count": 1, "share": 1.0, "images": 1, "picture": "p.png", "tags": shares, "words": []}
    assert evil not in patch_page._one_code(entry)
    assert escaped in patch_page._one_code(entry)


def test_systems_without_codebook_or_pixels_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "albef")
    with pytest.raises(UserError, match="no codebook"):
        inspect_codebook(str(run))
    with pytest.raises(UserError, match="predicts no pixels"):
        inspect_reconstructions(str(run))
    assert not (run / "codebook").exists()


def test_unexplained_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(2, 3, 16, 24, generator=generator)
    mask = torch.rand(2, 6, generator=generator) < 0.5
    assert unexplained_variance(Reconstruction(original, original, original), mask, (2, 3)) == 0
    cells = patchify(original, 8)
    flat = cells.mean(2, keepdim=True).expand_as(cells)
    means = flat.reshape(2, 2, 3, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 24)
    found = unexplained_variance(Reconstruction(original, original, means), mask, (2, 3))
    assert found == pytest.approx(1, abs=1e-5)
    elsewhere = original + 100 * ~mask.view(2, 2, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    assert unexplained_variance(Reconstruction(original, original, elsewhere), mask, (2, 3)) == 0


def test_from_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vlscale", "codebook-inspect", str(run), "--show-patches", "--codes", "2"])
    assert main() == 0
    check_page(run / "codebook" / "index.html")
    monkeypatch.setattr("sys.argv", ["vlscale", "inspect", "reconstructions", str(run), "--count", "2"])
    assert main() == 0
    assert "reconstructions.png" in check_page(run / "codebook" / "index.html").targets
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["vlscale", "codebook-inspect", str(run), "--code", "999"])
    assert main() == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
