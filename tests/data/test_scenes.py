"""The embedded data set: files, determinism, cache, and what the pictures show."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlscale import config
from vlscale.data import scenes
from vlscale.data.scene_render import SIDE, render
from vlscale.data.scene_world import COLOURS, Scene
from vlscale.data.sources.jsonl import read_jsonl
from vlscale.errors import UserError

_RECORDS = "06f753ef4f701cb216cf207bce5c3ceba529bca2051ff3a1ac5cfebac6fedc7c"
_MEANS, _DEVIATION = (136.924, 128.663, 124.211), 70.037
"""Of version 5's 60 + 20 scenes of seed 0: sha256 of the records, mean of each channel, deviation of the pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    return scenes.render_scenes(out, train=60, test=20, seed=0, workers=1, val=10)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_do_not_depend_on_the_workers(folder: Path, tmp_path: Path) -> None:
    again = scenes.render_scenes(tmp_path / "again", train=60, test=20, seed=0, workers=2, val=10)
    assert _contents(again) == _contents(folder)
    assert len(_contents(folder)) == 93  # pictures, captions.jsonl, pairs.jsonl, manifest.json


def test_pictures_and_captions_of_before_there_were_tasks_are_unchanged(folder: Path, records: list[dict]) -> None:
    """Results that were published on train and test stay comparable: whatever is added, these must not change."""
    old = ("image", "id", "split", "captions", "boxes", "tags", "tuples", "scene")
    kept = [{key: record[key] for key in old} for record in records if record["split"] != "val"]
    assert hashlib.sha256(json.dumps(kept).encode()).hexdigest() == _RECORDS
    pixels = np.stack([np.asarray(Image.open(folder / record["image"]), float) for record in kept])
    assert pixels.mean(axis=(0, 1, 2)) == pytest.approx(_MEANS, abs=0.01)
    assert pixels.std() == pytest.approx(_DEVIATION, abs=0.01)


def test_validation_scenes_are_scenes_of_their_own(records: list[dict]) -> None:
    seen = [(r["split"], r["scene"]["background"], sorted(r["tags"]), r["captions"]) for r in records]
    assert [split for split, *_ in seen].count("val") == 10
    captions = [caption for *_, texts in seen for caption in texts]
    assert len(set(captions)) == len(captions)
    without = scenes.plan_scenes({"train": 30, "test": 10}, seed=4)
    assert scenes.plan_scenes({"train": 30, "test": 10, "val": 5}, seed=4)[:40] == without


def test_another_seed_is_another_set(folder: Path, tmp_path: Path) -> None:
    other = scenes.render_scenes(tmp_path / "other", train=2, test=2, seed=1, workers=1)
    same = {name for name, data in _contents(other).items() if data == _contents(folder).get(name)}
    assert not same


def test_held_out_scenes_do_not_depend_on_the_training_set() -> None:
    alone = scenes.plan_scenes({"train": 0, "test": 20}, seed=3)
    beside = scenes.plan_scenes({"train": 20, "test": 20}, seed=3)
    assert beside[:20] == alone


def test_records_read_as_samples(folder: Path) -> None:
    samples = read_jsonl(folder / "captions.jsonl")
    assert [s.split for s in samples].count("train") == 60
    assert len({s.id for s in samples}) == len(samples) == 90
    for sample in samples:
        assert sample.image.is_file()
        assert len(sample.captions) == 5
        assert len(sample.boxes) == len(sample.tags) == len(sample.extra["scene"]["things"])
        assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in sample.boxes)


def test_things_fill_the_picture_and_are_seen(records: list[dict]) -> None:
    things = [thing for record in records for thing in record["scene"]["things"]]
    assert min(thing["visible"] for thing in things) > 0.55
    boxes = [box for record in records for box in record["boxes"]]
    sides = [64 * max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]
    assert np.mean([20 <= side <= 44 for side in sides]) > 0.8
    cover = [sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in record["boxes"]) for record in records]
    assert np.mean(cover) > 0.5
    large = [t["extent"] for t in things if t["size"] == "large"]
    assert min(large) > 1.2 * max(t["extent"] for t in things if t["size"] == "small")


def test_boxes_frame_what_is_in_sight() -> None:
    """Recolouring one thing changes the picture inside its box, up to its edges, and nowhere else."""
    for plan in scenes.plan_scenes({"train": 0, "test": 12}, seed=5):
        scene = plan.scene
        before = render(scene, np.random.default_rng(1))
        for k, thing in enumerate(scene.things):
            colour = "green" if thing.colour in ("red", "pink", "purple", "blue", "black") else "purple"
            things = (*scene.things[:k], replace(thing, colour=colour, texture="plain"), *scene.things[k + 1 :])
            plain = (*scene.things[:k], replace(thing, texture="plain"), *scene.things[k + 1 :])
            one, two = (_pixels(replace(scene, things=t)) for t in (things, plain))
            rows, columns = np.nonzero(np.abs(one - two).max(axis=-1) > 40)
            seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / SIDE
            assert np.abs(seen - before.boxes[k]).max() <= 3.5 / SIDE


def _pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene, np.random.default_rng(1)).image, dtype=int)


def test_colours_are_what_they_are_called(folder: Path, records: list[dict]) -> None:
    """At 64 pixels, the middle of a plain, unhidden, solid thing is nearest to the colour it is named after."""
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    right = []
    for record in records:
        pixels = np.asarray(Image.open(folder / record["image"]).resize((64, 64), Image.Resampling.BILINEAR), float)
        for thing in record["scene"]["things"]:
            if thing["texture"] == "plain" and thing["visible"] > 0.98 and thing["shape"] in ("ball", "heart", "cross"):
                x, y = int(64 * thing["x"]), int(64 * thing["y"])
                middle = np.median(pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3), axis=0)
                right.append(names[np.linalg.norm(palette - middle, axis=1).argmin()] == thing["colour"])
    assert len(right) > 12
    assert np.mean(right) > 0.9


def test_embedded_scenes_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    calls, original = [], scenes.render_scenes

    def counted(*args: object, **kwargs: object) -> Path:
        calls.append(args)
        return original(*args, workers=1, **kwargs)

    monkeypatch.setattr(scenes, "render_scenes", counted)
    options = config.Scenes(train=4, test=2, seed=7)
    killed = tmp_path / "cache" / f".scenes-v{scenes.VERSION}-4-2-2-seed7.abc"
    killed.mkdir(parents=True)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(scenes.embedded_scenes(options))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == len(calls) == 1
    assert found[0].parent == tmp_path / "cache"
    assert not killed.exists()
    assert f"v{scenes.VERSION}" in found[0].name
    without = scenes.embedded_scenes(config.Scenes(train=4, test=2, seed=7, val=0))
    assert without != found[0]
    assert [len(read_jsonl(place / "captions.jsonl")) for place in (found[0], without)] == [8, 6]
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert scenes.embedded_scenes(options) != found[0]
    assert len(calls) == 3


def test_an_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="VLSCALE_CACHE"):
        scenes.embedded_scenes(config.Scenes(train=1, test=1))


def test_a_broken_off_rendering_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.render_scenes(tmp_path / "out", train=3, test=0, seed=0, workers=1, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        scenes.render_scenes(folder, train=1, test=1, seed=0)
    with pytest.raises(UserError, match="train is -1"):
        scenes.render_scenes(tmp_path / "a", train=-1, test=1, seed=0)
    with pytest.raises(UserError, match="val is -1"):
        scenes.render_scenes(tmp_path / "a", train=1, test=1, seed=0, val=-1)
    with pytest.raises(UserError, match="seed is -1"):
        scenes.render_scenes(tmp_path / "a", train=1, test=1, seed=-1)
    with pytest.raises(UserError, match="expected at least 1"):
        scenes.render_scenes(tmp_path / "a", train=0, test=0, seed=0)
    assert not (tmp_path / "a").exists()
