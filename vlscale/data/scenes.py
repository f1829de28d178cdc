"""The embedded data set: rendered scenes with captions, boxes, tags and scene-graph tuples, all from a seed.

What is in the pictures is decided first, in one process, so that no two scenes share a description and no caption is
written twice; only then are the pictures painted, in parallel. The files are the same for any number of workers.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlscale import config as recipe
from vlscale.data import scene_captions
from vlscale.data.scene_render import Rendered, render
from vlscale.data.scene_world import Scene, sample_scene
from vlscale.errors import UserError

__all__ = ["VERSION", "embedded_scenes", "render_scenes"]

VERSION = 5
"""Of the generator: raise it with every change of what it draws or says, and cached data sets are rendered anew."""

SPLITS = ("test", "train")
"""In this order: the held-out scenes do not depend on how many scenes there are to train on."""

_CHUNK = 50

Progress = Callable[[int, int], None]


class _Plan(NamedTuple):
    """A scene before it is painted."""

    split: str
    number: int
    scene: Scene
    captions: list[str]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


def embedded_scenes(config: recipe.Scenes, on_progress: Progress | None = None) -> Path:
    """The rendered folder in the user's cache; rendered by whoever comes first while others wait for the lock."""
    cache = recipe.cache_dir()
    out = cache / f"scenes-v{VERSION}-{config.train}-{config.test}-seed{config.seed}"
    if (out / "captions.jsonl").is_file():
        return out
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{out.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{cache}: cannot write the embedded scenes ({error.strerror}); set VLSCALE_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "captions.jsonl").is_file():
            for left_over in cache.glob(f".{out.name}.*"):  # of a rendering that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            render_scenes(out, config.train, config.test, config.seed, on_progress=on_progress)
    return out


def render_scenes(
    out: Path, train: int, test: int, seed: int, workers: int | None = None, on_progress: Progress | None = None
) -> Path:
    """Write `captions.jsonl`, `images/` and `manifest.json` into a new folder `out`, whole or not at all.

    `workers` defaults to the number of cores this process may use; `on_progress(done, total)` is called as scenes are
    painted.

    Raises:
        UserError: `out` holds something already, or the numbers make no sense.
    """
    for name, number, least in (("train", train, 0), ("test", test, 0), ("seed", seed, 0), ("scenes", train + test, 1)):
        if number < least:
            raise UserError(f"scenes: {name} is {number}, expected at least {least}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (work / "images").mkdir()
        plans = plan_scenes({"train": train, "test": test}, seed)
        jobs = [(work, seed, plans[start : start + _CHUNK]) for start in range(0, len(plans), _CHUNK)]
        lines: list[str] = []
        for part in _mapped(jobs, workers or len(os.sched_getaffinity(0))):
            lines += part
            if on_progress is not None:
                on_progress(len(lines), len(plans))
        (work / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
        manifest = {"generator": VERSION, "seed": seed, "train": train, "test": test}
        (work / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        work.chmod(0o755)  # mkdtemp keeps others out
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def plan_scenes(counts: dict[str, int], seed: int) -> list[_Plan]:
    """Scenes and captions of every split; a scene whose description exists already is drawn again."""
    plans: list[_Plan] = []
    described: set[tuple[Any, ...]] = set()
    written: set[str] = set()
    for split in SPLITS:
        for index in range(counts[split]):
            attempt = 0
            while True:
                rng = random.Random(f"{seed}/{split}/{index}/{attempt}")  # seeded by SHA-512: the same everywhere
                scene = sample_scene(rng)
                if scene.description() not in described:
                    break
                attempt += 1
            described.add(scene.description())
            plans.append(_Plan(split, index, scene, scene_captions.captions(scene, rng, written)))
    return plans


def _mapped(jobs: list[tuple[Path, int, list[_Plan]]], workers: int) -> Iterator[list[str]]:
    """Results of the jobs in order. Workers are spawned, not forked: the caller may hold threads of torch."""
    if workers <= 1 or len(jobs) == 1:
        yield from map(_paint, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_paint, jobs)


def _paint(job: tuple[Path, int, list[_Plan]]) -> list[str]:
    """Paint and store the pictures of some plans; their lines of captions.jsonl."""
    folder, seed, plans = job
    lines = []
    for plan in plans:
        rng = np.random.default_rng([seed, SPLITS.index(plan.split), plan.number])
        rendered = render(plan.scene, rng)
        buffer = io.BytesIO()
        rendered.image.save(buffer, format="JPEG", quality=95, subsampling=0)
        (folder / "images" / f"{plan.name}.jpg").write_bytes(buffer.getvalue())
        lines.append(json.dumps(_record(plan, rendered)) + "\n")
    return lines


def _record(plan: _Plan, rendered: Rendered) -> dict[str, Any]:
    """A line of captions.jsonl; `scene` keeps what the generator knows, for tasks that are made from it."""
    scene = plan.scene
    things = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(thing).items()}
        | {"visible": round(share, 3)}
        for thing, share in zip(scene.things, rendered.visible, strict=True)
    ]
    return {
        "image": f"images/{plan.name}.jpg",
        "id": plan.name,
        "split": plan.split,
        "captions": plan.captions,
        "boxes": [[round(value, 4) for value in box] for box in rendered.boxes],
        "tags": [scene_captions.tag(thing) for thing in scene.things],
        "tuples": scene_captions.tuples(scene),
        "scene": {"background": scene.background, "things": things, "relations": scene.relations},
    }
