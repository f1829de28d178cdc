"""The embedded data set: rendered scenes and what every task wants to know of them, all from a seed.

What is in the pictures is decided first, in one process, so that no two scenes share a description and no caption is
written twice; only then are the pictures painted, in parallel. The files are the same for any number of workers.
`captions.jsonl` has a record per picture: captions with their phrases, boxes, tags, tuples, questions, and hypotheses
as statements. `pairs.jsonl` has a record per pair of pictures with a statement about both, as NLVR2's are read.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlscale import config as recipe
from vlscale.data import scene_captions
from vlscale.data.scene_captions import Mention
from vlscale.data.scene_hypotheses import hypotheses
from vlscale.data.scene_pairs import pair_sets
from vlscale.data.scene_questions import questions
from vlscale.data.scene_render import Rendered, render
from vlscale.data.scene_world import Scene, sample_scene
from vlscale.errors import UserError

__all__ = ["VERSION", "embedded_scenes", "render_scenes"]

VERSION = 6
"""Of the generator: raise it with every change of what it draws or says, and cached data sets are rendered anew."""

SPLITS = ("test", "train", "val")
"""In this order: the held-out scenes do not depend on how many scenes there are to train on, and neither of the two
changes with the validation scenes, which came later."""

_CAPTIONS, _PAIRS = "captions.jsonl", "pairs.jsonl"
"""As `vlscale.data.open` looks for them; importing its names would load torch into every process that paints."""
_CHUNK = 50

Progress = Callable[[int, int], None]


class _Plan(NamedTuple):
    """A scene before it is painted."""

    split: str
    number: int
    scene: Scene
    captions: list[str]
    mentions: list[tuple[Mention, ...]]
    """Of each caption."""

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    @property
    def image(self) -> str:
        """Path of the picture in the folder."""
        return f"images/{self.name}.jpg"


def embedded_scenes(config: recipe.Scenes, on_progress: Progress | None = None) -> Path:
    """The rendered folder in the user's cache; rendered by whoever comes first while others wait for the lock."""
    cache = recipe.cache_dir()
    val = config.test if config.val is None else config.val
    out = cache / f"scenes-v{VERSION}-{config.train}-{val}-{config.test}-seed{config.seed}"
    if (out / _CAPTIONS).is_file():
        return out
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{out.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{cache}: cannot write the embedded scenes ({error.strerror}); set VLSCALE_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / _CAPTIONS).is_file():
            for left_over in cache.glob(f".{out.name}.*"):  # of a rendering that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            render_scenes(out, config.train, config.test, config.seed, on_progress=on_progress, val=val)
    return out


def render_scenes(
    out: Path,
    train: int,
    test: int,
    seed: int,
    workers: int | None = None,
    on_progress: Progress | None = None,
    val: int = 0,
) -> Path:
    """Write `captions.jsonl`, `pairs.jsonl`, `images/` and `manifest.json` into the new folder `out`, or nothing.

    `workers` defaults to the number of cores this process may use; `on_progress(done, total)` is called as scenes are
    painted.

    Raises:
        UserError: `out` holds something already, or the numbers make no sense.
    """
    counts = {"train": train, "val": val, "test": test}
    for name, number, least in (*((*item, 0) for item in counts.items()), ("seed", seed, 0)):
        if number < least:
            raise UserError(f"scenes: {name} is {number}, expected at least {least}")
    if not any(counts.values()):
        raise UserError("scenes: 0 in all, expected at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (work / "images").mkdir()
        plans = plan_scenes(counts, seed)
        jobs = [(work, seed, plans[start : start + _CHUNK]) for start in range(0, len(plans), _CHUNK)]
        lines: list[str] = []
        for part in _mapped(jobs, workers or len(os.sched_getaffinity(0))):
            lines += part
            if on_progress is not None:
                on_progress(len(lines), len(plans))
        (work / _CAPTIONS).write_text("".join(lines), encoding="utf-8")
        (work / _PAIRS).write_text("".join(_pair_lines(plans, seed)), encoding="utf-8")
        manifest = {"generator": VERSION, "seed": seed, **counts}
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
        for index in range(counts.get(split, 0)):
            attempt = 0
            while True:
                rng = random.Random(f"{seed}/{split}/{index}/{attempt}")  # seeded by SHA-512: the same everywhere
                scene = sample_scene(rng)
                if scene.description() not in described:
                    break
                attempt += 1
            described.add(scene.description())
            captions = scene_captions.write(scene, rng, written)
            texts, mentions = [caption.text for caption in captions], [caption.mentions for caption in captions]
            plans.append(_Plan(split, index, scene, texts, mentions))
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
        (folder / plan.image).write_bytes(buffer.getvalue())
        lines.append(json.dumps(_record(plan, rendered, seed)) + "\n")
    return lines


def _record(plan: _Plan, rendered: Rendered, seed: int) -> dict[str, Any]:
    """A line of captions.jsonl; `scene` keeps what the generator knows, for tasks that are made from it."""
    scene, rng = plan.scene, random.Random(f"{seed}/{plan.split}/{plan.number}/tasks")
    things = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(thing).items()}
        | {"visible": round(share, 3)}
        for thing, share in zip(scene.things, rendered.visible, strict=True)
    ]
    boxes = [tuple(round(value, 4) for value in box) for box in rendered.boxes]
    asked = [{"text": q.text, "answers": [q.answer], "kind": q.kind} for q in questions(scene, rng)]
    stated = [hypothesis._asdict() for hypothesis in hypotheses(scene, rng)]
    return {
        "image": plan.image,
        "id": plan.name,
        "split": plan.split,
        "captions": plan.captions,
        "boxes": boxes,
        "tags": [scene_captions.tag(thing) for thing in scene.things],
        "tuples": scene_captions.tuples(scene),
        "phrases": [
            _phrase(scene, boxes, number, mention)
            for number, mentions in enumerate(plan.mentions)
            for mention in mentions
        ],
        "questions": [{"id": f"{plan.name}-q{number}"} | item for number, item in enumerate(asked)],
        "statements": [{"id": f"{plan.name}-h{number}"} | item for number, item in enumerate(stated)],
        "scene": {"background": scene.background, "things": things, "relations": scene.relations},
    }


def _phrase(scene: Scene, boxes: Sequence[tuple[float, ...]], caption: int, mention: Mention) -> dict[str, Any]:
    """A phrase as Flickr30k Entities has it: the entity is a thing's number, the kind its shape."""
    return {
        "text": mention.text,
        "boxes": [boxes[index] for index in mention.things],
        "caption": caption,
        "first_word": mention.first_word,
        "entity": "+".join(map(str, mention.things)),
        "kinds": [scene.things[mention.things[0]].shape if len(mention.things) == 1 else "several"],
    }


def _pair_lines(plans: Sequence[_Plan], seed: int) -> Iterator[str]:
    """Lines of pairs.jsonl: as many sets of pairs as there are scenes, with NLVR2's ids: split-set-pair-sentence."""
    for split in SPLITS:
        own = [plan for plan in plans if plan.split == split]
        for number, found in enumerate(pair_sets([plan.scene for plan in own], len(own), f"{seed}/{split}/pairs")):
            for place, pair in enumerate(found.pairs):
                identity = f"{split}-{number}-{place}"
                label = "true" if pair.true else "false"
                record = {
                    "image": own[pair.left].image,
                    "second": own[pair.right].image,
                    "id": identity,
                    "split": split,
                    "statements": [{"id": f"{identity}-0", "text": found.text, "label": label}],
                }
                yield json.dumps(record) + "\n"
