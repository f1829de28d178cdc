"""How long one pass of a system takes, stage by stage (SOHO, section 4.5): vision, text, fusion.

Written against `System` alone. What is timed is the computation on the device: images are decoded, normalised and on
the device before. Weights need not be trained: time does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.config import Aspect, Concepts, Recipe, load_recipe, recipe_names
from vlscale.data.bench import Spread
from vlscale.data.sample import Batch, Vocabulary
from vlscale.errors import UserError
from vlscale.interop.layout import write_json
from vlscale.interop.run import load_run, without_downloads
from vlscale.systems.protocol import System
from vlscale.systems.registry import build_system
from vlscale.tasks.features import OnProgress, Precision

WARM_UP = 3
"""Passes before those that count."""
RANDOM_WEIGHTS = "random: the time does not depend on them"
_SPECIAL_TOKENS = 4

Stage = tuple[str, Callable[[], object]]
"""A stage's name and its computation on inputs that are ready."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A system to time and what it needs as input."""

    system: System
    """In evaluation mode, on `device`."""
    recipe: Recipe
    vocabulary: Vocabulary
    weights: str
    """Where they come from."""
    device: torch.device


@dataclass(frozen=True, slots=True)
class StageTime:
    """Milliseconds of a stage over the repeats."""

    name: str
    ms: Spread
    share: float
    """Of the sum of all stages' medians."""


@dataclass(frozen=True, slots=True)
class InferenceReport:
    """What `run_inference` measured, and of what."""

    recipe: str
    weights: str
    device: str
    threads: int
    """CPU threads of torch."""
    precision: str
    batch: int
    """Pairs in a pass."""
    asked_size: tuple[int, int]
    """Height and width in pixels, as asked for."""
    seen_size: tuple[int, int]
    """Height and width in pixels of the images that the system got, padding included."""
    visual_tokens: int
    """Of an image, CLS and padding included."""
    text_tokens: int
    repeats: int
    stages: list[StageTime]
    total: Spread
    """Milliseconds of all stages one after the other."""
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """As JSON.

        Raises:
            UserError: it can't be written there.
        """
        try:
            write_json(path, {"task": "inference", **asdict(self)})
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror}); choose another --out") from None


def run_inference(
    source: str,
    *,
    height: int = 600,
    width: int = 1000,
    tokens: int = 16,
    batch: int = 1,
    repeats: int = 20,
    on_progress: OnProgress | None = None,
) -> InferenceReport:
    """Time the stages of a run, a checkpoint or a recipe with random weights.

    Args:
        source: run folder, checkpoint folder, recipe name or recipe file.
        height: of the images in pixels; systems that take squares only get their own.
        width: likewise.
        tokens: of each text, all of them read.
        batch: pairs in a pass.
        repeats: passes that count, after `WARM_UP` others.

    Raises:
        UserError: nothing by that name, a number below 1, or more tokens than the system has positions for.
    """
    for name, value in (
        ("height", height), ("width", width), ("tokens", tokens), ("batch", batch), ("repeats", repeats)
    ):  # fmt: skip
        if value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    subject = find_subject(source)
    inputs = make_inputs(subject, height, width, tokens, batch)
    precision = Precision.of(subject.device)
    report = on_progress or (lambda stage, done, total: None)
    with torch.inference_mode():
        stages, visual_tokens = system_stages(subject.system, inputs, precision)
        passes = time_stages(stages, subject.device, repeats, report)
    return InferenceReport(
        recipe=subject.recipe.name,
        weights=subject.weights,
        device=_name(subject.device),
        threads=torch.get_num_threads(),
        precision=str(precision),
        batch=batch,
        asked_size=(height, width),
        seen_size=(inputs.images.shape[2], inputs.images.shape[3]),
        visual_tokens=visual_tokens,
        text_tokens=tokens,
        repeats=repeats,
        stages=summary([name for name, _ in stages], passes),
        total=Spread.of([sum(one) for one in passes]),
        versions={"torch": version("torch")},
    )


def find_subject(source: str) -> Subject:
    """The system that a run folder, a checkpoint or a recipe means, in evaluation mode.

    Raises:
        UserError: nothing by that name, or a run that can't be loaded.
    """
    path = Path(source)
    if path.is_dir():
        run = load_run(source)
        return Subject(cast(System, run.system), run.recipe, run.tokenizer.vocabulary, str(run.checkpoint), run.device)
    if path.suffix not in {".yaml", ".yml"} and source not in recipe_names():
        raise UserError(
            f"{source}: no such run folder or checkpoint, and no recipe of that name; recipes are "
            f"{', '.join(recipe_names())}, or a path ending in .yaml"
        )
    recipe = without_downloads(load_recipe(source))
    device = distributed.device()
    # A vocabulary still to be trained counts with its upper limit.
    vocabulary = Vocabulary(recipe.data.tokenizer.vocab_size, *range(_SPECIAL_TOKENS))
    system = build_system(recipe, vocabulary).to(device).eval()
    system.place(device)  # type: ignore[operator]
    return Subject(cast(System, system), recipe, vocabulary, RANDOM_WEIGHTS, device)


def make_inputs(subject: Subject, height: int, width: int, tokens: int, batch: int) -> Batch:
    """Noise of the size that the system takes: images [B, 3, H, W] float32, texts [B, tokens] without padding.

    Where the system takes padded inputs, H and W are the asked size rounded up to `data.aspect.multiple`; else its own
    square.

    Raises:
        UserError: more tokens than the system has positions for.
    """
    recipe, device = subject.recipe, subject.device
    positions = recipe.system.text.max_positions
    if tokens > positions:
        raise UserError(f"--tokens {tokens}: {recipe.name} has positions for {positions} at most")
    sizes = None
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(subject.vocabulary.size, (batch, tokens), generator=generator)
    if recipe.data.concepts is not None:
        return _concepts(recipe.data.concepts, words, subject.vocabulary, generator).to(device)
    if recipe.system.padded_inputs:
        multiple = (recipe.data.aspect or Aspect()).multiple
        shape = [-(-side // multiple) * multiple for side in (height, width)]
        sizes = torch.tensor([[height, width]]).expand(batch, 2)
    else:
        shape = [recipe.data.image_size] * 2
    images = torch.randn(batch, 3, *shape, generator=generator)
    return Batch(images, words, torch.ones_like(words), torch.arange(batch), image_sizes=sizes).to(device)


def _concepts(concepts: Concepts, words: Tensor, vocabulary: Vocabulary, generator: torch.Generator) -> Batch:
    """Words, and as many tags and regions as there may be; no image is read."""
    size = len(words)
    tags = torch.randint(vocabulary.size, (size, concepts.max_tags), generator=generator)
    regions = torch.randn(size, concepts.max_regions, concepts.region_width + 6, generator=generator)
    return Batch(
        torch.empty(size, 3, 0, 0),
        words,
        torch.ones_like(words),
        torch.arange(size),
        tag_ids=tags,
        tag_mask=torch.ones_like(tags),
        regions=regions,
        region_mask=torch.ones(regions.shape[:2], dtype=torch.int64),
    )


def system_stages(system: System, batch: Batch, precision: Precision) -> tuple[list[Stage], int]:
    """The stages of every system on this batch, and the visual tokens of an image; in inference mode.

    A stage reads what the stages before it gave once, so that each can be timed alone.
    """

    def vision() -> object:
        with precision.autocast():
            return system.encode_image(batch)

    def text() -> object:
        with precision.autocast():
            return system.encode_text(batch)

    with precision.autocast():
        image_states, text_states = system.encode_image(batch), system.encode_text(batch)

    def fusion() -> object:
        with precision.autocast():
            states = system.fuse(text_states, image_states)
        return system.match_logits(states.float())

    return [("vision", vision), ("text", text), ("fusion", fusion)], image_states.tokens.shape[1]


def time_stages(stages: list[Stage], device: torch.device, repeats: int, on_progress: OnProgress) -> list[list[float]]:
    """Milliseconds of every stage in each of `repeats` passes through all stages, after `WARM_UP` that don't count.

    On CUDA the device is waited for before and after each stage.
    """
    passes: list[list[float]] = []
    for index in range(WARM_UP + repeats):
        times = []
        for _, run in stages:
            before = _now(device)
            run()
            times.append(1000 * (_now(device) - before))
        passes.append(times)
        on_progress("passes", index + 1, WARM_UP + repeats)
    return passes[WARM_UP:]


def summary(names: list[str], passes: list[list[float]]) -> list[StageTime]:
    """Spread of each stage over the passes, and its share of the sum of the medians."""
    spreads = [Spread.of(times) for times in zip(*passes, strict=True)]
    whole = sum(spread.median for spread in spreads)
    return [StageTime(name, ms, ms.median / whole) for name, ms in zip(names, spreads, strict=True)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
