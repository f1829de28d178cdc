"""Boxes over pictures, which captions a page of grounding shows, and images that are gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tasks.grounding_data import make_run, write_data
from vlscale.data.sample import Sample
from vlscale.inspect.boxes import COLOURS, Mark, with_boxes
from vlscale.inspect.grounding import _captions, _chosen, draw_grounding
from vlscale.inspect.pictures import PAPER
from vlscale.tasks.grounding import run_grounding

BOX = (0.25, 0.25, 0.75, 0.75)
GREY = Image.new("RGB", (80, 60), (128, 128, 128))


def shares(picture: np.ndarray) -> list[float]:
    """How many of a row's pixels have each of the first two colours, and paper."""
    return [float((picture == colour).all(-1).mean()) for colour in (*COLOURS[:2], PAPER)]


def test_solid_and_dashed_lines_lie_at_the_border_of_their_box() -> None:
    solid = np.asarray(with_boxes(GREY, [Mark(BOX, COLOURS[0])], 160))
    assert solid.shape == (120, 160, 3)
    assert shares(solid[30, 40:120]) == [1, 0, 0]
    assert shares(solid[89, 40:120]) == [1, 0, 0]
    assert shares(solid[:, :40]) == shares(solid[:30]) == [0, 0, 0]
    dashed = np.asarray(with_boxes(GREY, [Mark(BOX, COLOURS[0], dashed=True)], 160))
    on, _, paper = shares(dashed[30, 40:120])
    assert 0.5 < on < 0.8
    assert on + paper == 1


def test_a_box_that_comes_again_hides_none() -> None:
    marks = [Mark(BOX, COLOURS[0], dashed=True), Mark(BOX, COLOURS[1]), Mark(BOX, COLOURS[0])]
    seen = np.asarray(with_boxes(GREY, marks, 160))
    assert shares(seen[31, 45:115])[0] > 0.5
    assert shares(seen[34, 45:115]) == [0, 1, 0]
    assert shares(seen[37, 50:110]) == [1, 0, 0]


def test_boxes_without_room_or_beyond_the_image_stay_inside_it() -> None:
    marks = [Mark(box, COLOURS[0]) for box in ((0.5, 0.5, 0.5, 0.5), (-1.0, -1.0, 2.0, 2.0), (1.0, 1.0, 1.0, 1.0))]
    seen = np.asarray(with_boxes(GREY, [*marks, *marks], 80))
    assert shares(seen[0]) == [1, 0, 0]


def predictions(folder: Path, hits: list[list[bool]]) -> Path:
    path = folder / "predictions.jsonl"
    rows: list[dict[str, Any]] = [
        {"image": number // 2, "caption_number": number % 2, "caption": str(number), "hit": {"any": hit}}
        for number, own in enumerate(hits)
        for hit in own
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_best_and_worst_are_of_different_images_and_none_comes_twice(tmp_path: Path) -> None:
    hits = [[True] * 3, [True] * 2, [True], [False], [False] * 2, [True, False], [False] * 4, [False] * 3]
    chosen = _chosen(_captions(predictions(tmp_path, hits)), 7)
    assert [one.text for one in chosen["best"]] == ["0", "2"]
    assert [one.text for one in chosen["worst"]] == ["6", "4"]
    drawn = {one.text for one in chosen["drawn"]}
    assert len(drawn) == 3
    assert drawn <= {"1", "3", "5", "7"}
    assert list(_chosen(_captions(predictions(tmp_path, [[True]])), 2)) == ["drawn"]
    everything = _chosen(_captions(predictions(tmp_path, hits)), 100)
    assert sum(map(len, everything.values())) == 8


def test_an_image_that_is_gone_is_named_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", write_data(tmp_path / "data"))
    found = run_grounding(str(run), zero_shot=True)
    gone = Sample("gone", tmp_path / "<gone>.png")
    page = draw_grounding(found.path, found.predictions, [*found.samples[:1], gone, *found.samples[2:]], 5)
    html = page.read_text()
    assert "&lt;gone&gt;.png" in html
    assert html.count("<img") == sum(entry.suffix == ".png" for entry in page.parent.iterdir())
