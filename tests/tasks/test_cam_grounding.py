"""Grounding by Grad-CAM: what a box scores, which boxes there are, and a system of cells from file to file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.data.concept_data import stored
from tests.small_run import make_parts, make_run
from tests.systems import test_soho
from tests.tasks.grounding_data import CORNER, LEFT, RIGHT, WHOLE, write_data
from vlscale.cli.main import main
from vlscale.data.open import read_data
from vlscale.data.regions import Regions, pack
from vlscale.data.sample import Batch, Sample
from vlscale.errors import UserError
from vlscale.systems.gradcam import gradcam
from vlscale.tasks import cam_scores, features
from vlscale.tasks.cam_scores import CamScores, box_grid, box_scores, candidates, with_candidates
from vlscale.tasks.grounding import evaluate_grounding


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic on every machine."""
    monkeypatch.setattr(features.Precision, "of", lambda device, _system: features.Precision(device, torch.float32))


def test_scores_are_those_of_the_release_on_whole_pixels() -> None:
    """The release makes the map as large as the image, adds up the pixels in a box and divides by √area."""
    generator = torch.Generator().manual_seed(0)
    maps, side = torch.rand(2, 3, 4, 4, generator=generator), 4 * cam_scores.FINER
    pixels = [(0, 0, 16, 32), (8, 4, 12, 30), (5, 7, 6, 8), (0, 0, 32, 32)]
    boxes = (torch.tensor(pixels).float() / side).expand(2, -1, -1)
    found = box_scores(maps, boxes, boxes)
    large = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    for place, (x1, y1, x2, y2) in enumerate(pixels):
        release = large[:, :, y1:y2, x1:x2].sum((2, 3)) / ((x2 - x1) * (y2 - y1)) ** 0.5
        torch.testing.assert_close(found[..., place], release * side / cam_scores.FINER**2, rtol=1e-4, atol=1e-4)


def test_boxes_between_places_are_cut_through_them() -> None:
    maps = torch.ones(1, 1, 2, 2)
    boxes = torch.tensor([[[0.1, 0.2, 0.43, 0.77], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.9]]])
    areas = torch.tensor([0.33 * 0.57, 1.0])
    scores = box_scores(maps, boxes, boxes)[0, 0]
    torch.testing.assert_close(scores[:2], 4 * areas.sqrt(), rtol=1e-4, atol=1e-4)
    assert abs(float(scores[2])) < 1e-3, "no area"


def test_a_box_around_the_evidence_is_ahead_of_smaller_and_larger_ones() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 2:4, 4:6] = 1.0
    boxes = torch.tensor([[[0.5, 0.25, 0.75, 0.5], [0.55, 0.3, 0.65, 0.4], [0.3, 0.0, 1.0, 0.8], list(LEFT)]])
    assert box_scores(maps, boxes, boxes)[0, 0].argmax() == 0


def test_the_grid_covers_an_image() -> None:
    boxes = torch.tensor(box_grid())
    assert boxes[0].tolist() == list(WHOLE)
    assert len({tuple(box) for box in boxes.tolist()}) == len(boxes) < 400
    assert bool(((boxes >= 0) & (boxes <= 1 + 1e-6)).all())
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    for side in (0.25, 0.4, 0.8):  # every place is in a box of each size
        own = boxes[((boxes[:, 2:] - boxes[:, :2]) - side).abs().amax(1) < 1e-6]
        for x, y in torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).tolist():
            assert bool(((own[:, 0] <= x) & (x <= own[:, 2]) & (own[:, 1] <= y) & (y <= own[:, 3])).any())


def test_candidates_are_stored_regions_else_boxes_else_a_grid(tmp_path: Path) -> None:
    regions = Regions(torch.zeros(1, 4).half(), torch.tensor([CORNER]), torch.ones(1), ("",))
    lies = stored(tmp_path / "a.safetensors", pack(regions))
    assert candidates(Sample("a", tmp_path, boxes=(LEFT,), regions=lies)) == [CORNER]
    assert candidates(Sample("a", tmp_path, boxes=(LEFT, RIGHT))) == (LEFT, RIGHT)
    assert candidates(Sample("a", tmp_path)) == box_grid()
    (tmp_path / "a.safetensors").write_bytes(b"no regions" * 99)
    with pytest.raises(UserError, match="sample a: its regions can't be read"):
        candidates(Sample("a", tmp_path, regions=lies))


def test_soho_s_padding_is_no_part_of_an_image() -> None:
    """Boxes are shares of the image; maps cover the canvas."""
    system, batch = test_soho.soho().eval(), test_soho.batch_of(2, height=64, width=96)
    ids, mask = batch.input_ids[:2], batch.attention_mask[:2]
    batch = Batch(batch.images, ids, mask, torch.arange(2), image_sizes=torch.tensor([[64, 96], [32, 48]]))
    samples = [Sample(str(number), Path("x"), boxes=(LEFT, WHOLE)) for number in range(2)]
    batch = with_candidates(batch, samples, grid=False)
    spans = torch.zeros(2, 1, ids.shape[1], dtype=torch.bool)
    spans[:, 0, 1:3] = True
    scores = CamScores(system).phrase_region_scores(batch, spans, 0)  # type: ignore[arg-type]
    assert scores.shape == (2, 1, 2)
    maps = gradcam(system, batch, 0).maps[:, 1:3].sum(1)  # type: ignore[arg-type]
    on_canvas = torch.tensor([[list(LEFT), list(WHOLE)], [[0.0, 0.0, 0.25, 0.5], [0.0, 0.0, 0.5, 0.5]]])
    image = torch.tensor([[list(LEFT), list(WHOLE)]]).expand(2, -1, -1)
    torch.testing.assert_close(scores, box_scores(maps[:, None], on_canvas, image))


@pytest.mark.parametrize("name", ["albef", "cb_vila"])
def test_phrases_of_a_system_of_cells(name: str, tmp_path: Path) -> None:
    """Phrase by phrase, image by image: the sum of its tokens' maps, read in its caption."""
    system, _, recipe, tokenizer = make_parts(tmp_path / "own", name)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": str(write_data(tmp_path / "d"))})}
    )
    samples = list(read_data(recipe.data))
    options: dict[str, Any] = {"batch_size": 3, "device": "cpu"}
    result = evaluate_grounding(system, samples, recipe, tokenizer, layer=0, **options)
    rows = result.judgement.predictions
    assert len(rows) == 2 * len(samples)
    assert result.protocol["regions"] == "the image's annotated boxes"
    assert "square root" in result.protocol["score"]
    assert result.judgement.baselines["upper bound"]["any_r1"] == 100
    tokens = [tokenizer.tokens(row) for row in tokenizer.encode([sample.captions[0] for sample in samples])[0].tolist()]
    for number, sample in enumerate(samples):
        ids, mask = tokenizer.encode([sample.captions[0]])
        [loaded] = features.evaluation_batches([sample], recipe.data, 1, tokenizer)
        batch = features.normalize_batch(loaded, recipe.data)
        batch.input_ids, batch.attention_mask = ids, mask
        maps = gradcam(system, batch, 0).maps[0]  # type: ignore[arg-type]
        wanted = [place for place, token in enumerate(tokens[number]) if token in ("a", "black", "dog")][:3]
        assert wanted
        boxes = torch.tensor([[list(LEFT), list(RIGHT)]])
        scores = box_scores(maps[1:4].sum(0)[None, None], boxes, boxes)[0, 0]
        assert rows[2 * number]["score"] == pytest.approx(float(scores.max()), rel=1e-3, abs=1e-5)
    grid = evaluate_grounding(system, samples, recipe, tokenizer, grid=True, **options)
    assert grid.protocol["regions"] == f"a grid of {len(box_grid())} boxes"
    assert grid.protocol["layer"] == 0, "of two layers the first"
    assert grid.judgement.baselines["random region"]["any_r1"] < 50


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run, data = make_run(tmp_path / "run", "albef"), str(write_data(tmp_path / "data"))
    command = ["vlscale", "eval", "grounding", "--from", str(run), "--zero-shot", "--data", data, "--count", "3"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    card = json.loads((run / "eval" / "grounding.json").read_text())["protocol"]
    assert card["score"] == cam_scores.SCORE
    assert (run / "eval" / "grounding" / "index.html").is_file()
    assert "Phrase grounding, zero-shot" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--layer", "7"])
    assert main() == 2
    assert "layer 7: there are 2 of them" in capsys.readouterr().err
