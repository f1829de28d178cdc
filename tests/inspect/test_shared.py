"""The page of a codebook that images and texts share, against slow re-computations and planted codes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from tests.inspect.test_pages import check_page
from tests.small_run import make_run
from vlscale.cli.main import main
from vlscale.codebooks.quantizer import Quantizer
from vlscale.config import load_recipe, write_recipe
from vlscale.config.systems import CodebookOptions
from vlscale.data.sample import Batch
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import clean_caption
from vlscale.errors import UserError
from vlscale.inspect import charts, heatmaps, report, shared
from vlscale.inspect.codebook import _without_folders, inspect_codebook, usage_table
from vlscale.inspect.shared import Choices, WordTable, agreement_of, encode_pairs, shared_codebooks
from vlscale.inspect.usage import normalized_batches
from vlscale.interop import layout
from vlscale.interop.export import read_tensors, write_tensors
from vlscale.interop.run import load_run, run_samples
from vlscale.systems.codis import Codis

SIZE = 24
PLANTED_IMAGES = [3, 3, 7, 11, 0]
PLANTED_TEXTS = [3, 3, 7, 7, 7, 0, 11, 0, 0]
"""Codes of five images and of their 1, 2, 3, 1 and 2 captions: 7 of 9 pairs agree."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "codis")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose images and captions choose the `PLANTED` codes."""
    run = make_run(tmp_path_factory.mktemp("planted"), "codis", 5)
    images, texts, _ = slow_features(run)
    features = torch.cat([images, texts]).double()  # [14, 16]
    wanted = torch.full((len(features), SIZE), -1.0, dtype=torch.float64)
    wanted[torch.arange(len(features)), torch.tensor(PLANTED_IMAGES + PLANTED_TEXTS)] = 1
    replace_codes(run, (torch.linalg.pinv(features) @ wanted).T.float())  # one positive cosine for each
    return run


def replace_codes(run: Path, codes: Tensor) -> None:
    path = layout.complete_checkpoints(run)[-1] / layout.MODEL
    tensors = read_tensors(path)
    assert tensors["codebook.codes"].shape == codes.shape
    write_tensors(path, tensors | {"codebook.codes": codes})


@torch.inference_mode()
def slow_features(run: Path) -> tuple[Tensor, Tensor, list[int]]:
    """Features of images and of captions, each encoded alone, and the image of every caption."""
    loaded = load_run(run)
    samples = run_samples(loaded, None, None)[1]
    images, texts, image_of = [], [], []
    for index, sample in enumerate(samples):
        ((_, batch),) = normalized_batches([sample], loaded.recipe.data, 1, torch.device("cpu"))
        images.append(loaded.system.encode_image(batch).pooled)
        for caption in sample.captions:
            batch.input_ids, batch.attention_mask = loaded.tokenizer.encode([caption])
            texts.append(loaded.system.encode_text(batch).pooled)
            image_of.append(index)
    return torch.cat(images), torch.cat(texts), image_of


def content_of(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / report.CODEBOOK).read_text())


def section_of(page: Path) -> dict[str, Any]:
    return content_of(page)["codebooks"]["shared"]


@torch.inference_mode()
def test_features_are_those_of_codebook_pairs(run: Path) -> None:
    """Each image and caption is encoded once; the system's own pairs give the same."""
    loaded = load_run(run)
    samples = run_samples(loaded, None, None)[1]
    encoded = encode_pairs(loaded, loaded.system, samples)
    assert encoded.captions == [caption for sample in samples for caption in sample.captions]
    (whole,) = evaluation_batches(samples, loaded.recipe.data, len(samples))
    assert (encoded.pixels == whole.images.permute(0, 2, 3, 1).numpy()).all()
    ((_, batch),) = normalized_batches(samples, loaded.recipe.data, len(samples), torch.device("cpu"))
    pairs = Batch(batch.images[encoded.image_of], *loaded.tokenizer.encode(encoded.captions), torch.arange(19))
    images, texts = loaded.system.codebook_pairs(pairs)["shared"]
    torch.testing.assert_close(encoded.images[encoded.image_of], images, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoded.texts, texts, atol=1e-6, rtol=0)


def test_planted_codes(planted: Path, tmp_path: Path) -> None:
    page = inspect_codebook(str(planted), codes=4, out=tmp_path / "page")
    check_page(page)
    section = section_of(page)
    found = section["agreement"]
    assert found["pairs"] == section["texts"] == 9
    assert found["share"] == pytest.approx(7 / 9)
    # By pairs, images choose 0, 3, 7 and 11 2, 3, 3 and 1 times, and texts 3, 2, 3 and 1 times.
    assert found["chance"] == pytest.approx((2 * 3 + 3 * 2 + 3 * 3 + 1 * 1) / 81)
    by_image, by_text = Counter(PLANTED_IMAGES), Counter(PLANTED_TEXTS)
    for kind, counts in (("images", by_image), ("texts", by_text)):
        shares = [counts[code] / counts.total() for code in range(SIZE)]
        usage = section["usage"][kind]
        assert usage["shares"] == pytest.approx(shares)
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert usage["entropy"] == pytest.approx(entropy)
        assert usage["perplexity"] == pytest.approx(math.exp(entropy))
        assert usage["dead"] == [code for code in range(SIZE) if code not in counts]
    both = [(by_image[code] / 5 + by_text[code] / 9) / 2 for code in range(SIZE)]
    assert section["usage"]["both"]["shares"] == pytest.approx(both)
    assert section["dead"] == [code for code in range(SIZE) if code not in by_image | by_text]
    entries = {entry["code"]: entry for entry in section["codes"]}
    assert list(entries) == sorted(entries, key=lambda code: -both[code])
    assert set(entries) == {0, 3, 7, 11}
    assert {code: entry["agreed"] for code, entry in entries.items()} == {0: 2, 3: 2, 7: 2, 11: 1}
    assert entries[7]["image_agreement"] == pytest.approx(2 / 3)
    assert entries[3]["text_agreement"] == 1.0
    assert entries[7]["image_pairs"] == 3
    for entry in entries.values():
        chosen = {near["index"] for near in entry["nearest_images"] if near["chooses"]}
        assert chosen == {index for index, code in enumerate(PLANTED_IMAGES) if code == entry["code"]}
    codes, matrix = section["matrix"]["codes"], np.array(section["matrix"]["counts"])
    assert matrix.sum() == 9
    assert matrix[codes.index(7), codes.index(0)] == 1


def test_page_against_slow_computation(run: Path, tmp_path: Path) -> None:
    page = inspect_codebook(str(run), codes=4, out=tmp_path / "page")
    links = check_page(page)
    section = section_of(page)
    images, texts, image_of = slow_features(run)
    codes = torch.nn.functional.normalize(load_run(run).system.codebook.codes.detach(), dim=1)
    image_cosines, text_cosines = (images @ codes.T).numpy(), (texts @ codes.T).numpy()
    by_image, by_text = image_cosines.argmax(1)[image_of], text_cosines.argmax(1)
    found = section["agreement"]
    assert found["share"] == pytest.approx((by_image == by_text).mean())
    near = [np.argsort(-image_cosines[image])[:5] for image in image_of]
    assert found["near"] == pytest.approx(np.mean([code in five for code, five in zip(by_text, near, strict=True)]))
    assert found["chance"] == pytest.approx(np.mean([[i == t for t in by_text] for i in by_image]))
    assert found["near_chance"] == pytest.approx(np.mean([[t in five for t in by_text] for five in near]))
    captions = [caption for sample in run_samples(load_run(run), None, None)[1] for caption in sample.captions]
    for entry in section["codes"]:
        code = entry["code"]
        assert [near["index"] for near in entry["nearest_images"]] == np.argsort(-image_cosines[:, code]).tolist()
        nearest = np.argsort(-text_cosines[:, code])[:8]
        assert [near["text"] for near in entry["nearest_texts"]] == [captions[index] for index in nearest]
        cosines = [near["cosine"] for near in entry["nearest_texts"]]
        assert cosines == pytest.approx(text_cosines[nearest, code].tolist(), abs=1e-6)
        assert f"code-{code}" in links.anchors
        assert entry["picture"] in links.targets
    for picture in ("usage", "plan", "agreement"):
        assert f"shared/{picture}.png" in links.targets
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(usage_table(page))
    assert f"agree in {100 * found['share']:.1f} %" in console.export_text()


def test_plans(planted: Path, tmp_path: Path) -> None:
    """Those that the run's codebook gives for the pairs, one per image, in the order of the codes."""
    page = inspect_codebook(str(planted), out=tmp_path / "page")
    plan = section_of(page)["plan"]
    images, texts, image_of = slow_features(planted)
    rows = [image_of[pair] for pair in plan["pairs"]]
    assert sorted(rows) == list(range(5)), "each of another image"
    places = [plan["codes"].index(PLANTED_IMAGES[row]) for row in rows]
    assert places == sorted(places)
    assert set(plan["codes"]) == {PLANTED_IMAGES[row] for row in rows} | {PLANTED_TEXTS[p] for p in plan["pairs"]}
    book = load_run(planted).system.codebook
    for found, features, mass in (("images", images[rows], "image_mass"), ("texts", texts[plan["pairs"]], "text_mass")):
        expected = book.transported(features)[:, plan["codes"]]
        assert np.array(plan[found]) == pytest.approx(expected.numpy(), abs=1e-4)
        assert plan[mass] == pytest.approx(expected.sum(1).mean().item(), abs=1e-4)
    assert 0 <= plan["overlap_chance"] <= 1
    with Image.open(page.parent / plan["picture"]) as picture:
        assert picture.size == tuple(round(side * charts.DPI) for side in heatmaps.PLAN_SIZE)
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 50, "not blank"


def test_top_agreement_counts_near_codes() -> None:
    cosines = np.linspace(1, 0, 8, dtype=np.float32)[None].repeat(2, 0)  # code k is the k-th nearest of both images
    texts = np.array([0, 4, 5])
    image_of = np.array([0, 0, 1])
    choices = Choices(cosines, np.zeros((3, 8), np.float32), np.array([0, 0]), texts, np.stack([texts * 0, texts], 1))
    found = agreement_of(choices, image_of)
    assert (found.share, found.near) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (found.chance, found.near_chance) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_words() -> None:
    """In three captions at least, half as often again as everywhere, by log-odds with a half added."""
    captions = ["A red Box.", "red box", "red ball", "the red dog", "a ball", "a dog", "the dog", "a cat", "a red cat"]
    table = WordTable(captions, 30)
    members = np.array([0, 1, 2, 3])
    (red,) = table.of(members)
    assert (red.tag, red.share, red.everywhere) == ("red", 1.0, pytest.approx(5 / 9))
    assert table.of(np.array([], dtype=np.int64)) == []
    rng = np.random.default_rng(0)
    many = [" ".join(rng.choice(list("abcdefgh"), 3)) for _ in range(200)]
    own = [set(clean_caption(text, 30).split()) for text in many[:20]]
    everywhere = [set(text.split()) for text in many]

    def count(word: str, sets: list[set[str]]) -> int:
        return sum(word in words for words in sets)

    def score(word: str) -> float:
        inside, outside = count(word, own), count(word, everywhere)
        return math.log((inside + 0.5) / (20.5 - inside)) - math.log((outside + 0.5) / (200.5 - outside))

    wanted = [w for w in "abcdefgh" if count(w, own) >= 3 and count(w, own) / 20 >= 1.5 * count(w, everywhere) / 200]
    assert [share.tag for share in WordTable(many, 30).of(np.arange(20))] == sorted(wanted, key=lambda w: -score(w))


def test_statistics_only(run: Path, tmp_path: Path) -> None:
    page = inspect_codebook(str(run), show_patches=False, out=tmp_path / "page")
    check_page(page)
    assert [path.name for path in page.parent.rglob("*.png")] == ["usage.png"]
    assert section_of(page)["agreement"]["pairs"] == 19


def test_one_code(planted: Path, tmp_path: Path) -> None:
    for code in (7, 20):  # one in use and one that nothing chooses
        page = inspect_codebook(str(planted), code=code, out=tmp_path / "page")
        check_page(page)
        names = sorted(path.name for path in page.parent.rglob("*.png"))
        assert names == ["agreement.png", f"code-{code:04d}.png", "plan.png", "usage.png"]
        assert [entry["code"] for entry in section_of(page)["codes"]] == [code]
    assert section_of(page)["codes"][0]["image_agreement"] is None
    with pytest.raises(UserError, match="codes 0 to 23"):
        inspect_codebook(str(planted), code=24, out=tmp_path / "page")
    assert [path.name for path in tmp_path.iterdir()] == ["page"], "nothing half-made"


def test_captions_are_escaped_and_no_path_is_told(run: Path, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> &c'
    folder = tmp_path / "data of mine"
    folder.mkdir()
    lines = [{"image": f"{index}.png", "split": "test", "captions": [f"{evil} {index}"]} for index in range(6)]
    for index in range(5):
        Image.new("RGB", (32, 32), (40 * index, 90, 200)).save(folder / f"{index}.png")
    (folder / "5.png").write_bytes(b"no picture")
    (folder / "evil.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = inspect_codebook(str(run), data=str(folder / "evil.jsonl"), out=tmp_path / "page")
    text = check_page(page).text
    assert "<script" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp;c 0" in text
    facts = content_of(page)["facts"]
    assert facts["data"] == "evil.jsonl"
    assert facts["images"] == "5 of 6"
    assert facts["captions"] == "5 of 5"
    assert "5.png" in facts["unreadable images"]
    for home in (tmp_path, run):
        assert str(home) not in text
        assert str(home.parent) not in text


def test_paths_lose_their_folders() -> None:
    assert _without_folders("/home/a b/x.jsonl") == "x.jsonl"
    assert _without_folders("data/coco/x.jsonl") == "data/coco/x.jsonl"
    text = "/a/b/1.png: no such file: '/a/b/1.png'; /a/t.tar:2.png: 1/2 of it"
    assert _without_folders(text) == "1.png: no such file: '1.png'; t.tar:2.png: 1/2 of it"


def test_captions_are_limited(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MAX_TEXTS", 7)
    page = inspect_codebook(str(run), out=tmp_path / "page")
    assert content_of(page)["facts"]["captions"] == "7 of 19"
    assert section_of(page)["agreement"]["pairs"] == 7


def test_pictures_are_the_same_every_time(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        inspect_codebook(str(run), codes=3, out=tmp_path / name)
    first = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(first) > 6
    for path in first:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_runs_without_the_codebook_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "codis")
    recipe = load_recipe(str(run / layout.RECIPE))
    write_recipe(recipe.model_copy(update={"weights": recipe.weights | {"code": 0.0}}), run / layout.RECIPE)
    assert load_run(run).system.codebooks() == {}
    assert shared_codebooks(load_run(run).system) == {}
    with pytest.raises(UserError, match="no codebook"):
        inspect_codebook(str(run))
    assert not (run / "codebook").exists()


def test_data_without_captions_say_so(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "bare.jsonl").write_text('{"image": "0.png", "split": "test"}\n')
    with pytest.raises(UserError, match="caption"):
        inspect_codebook(str(run), data=str(tmp_path / "bare.jsonl"))


def test_both_kinds_of_codebooks_on_one_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with codes of patches and codes of pairs gets both kinds of sections."""

    def features(self: Codis, batch: Batch) -> dict[str, Tensor]:
        return {"visual": self.encode_image(batch).tokens[:, 1:]}

    patches = Quantizer(CodebookOptions(size=9), 32)
    monkeypatch.setattr(Codis, "codebooks", lambda self: {"visual": patches, "shared": self.codebook})
    monkeypatch.setattr(Codis, "codebook_features", features)
    page = inspect_codebook(str(run), codes=3, out=tmp_path / "page")
    targets = check_page(page).targets
    assert {"visual/usage.png", "shared/usage.png", "shared/plan.png"} <= set(targets)
    assert content_of(page)["codebooks"]["visual"]["patches"] == 160


def test_from_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vlscale", "codebook-inspect", str(run), "--show-patches", "--codes", "2"])
    assert main() == 0
    check_page(run / "codebook" / "index.html")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["vlscale", "codebook-inspect", str(run), "--code", "999"])
    assert main() == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
