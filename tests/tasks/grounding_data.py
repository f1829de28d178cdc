"""Images with regions and phrases, a system whose scores are known, and a small run, for the tests of grounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tests.data.concept_data import WIDTH, data_with, stored, tokenizer_of, write_vocabularies
from vlscale.config import Recipe, write_recipe
from vlscale.data.captions import vocabulary_of
from vlscale.data.regions import Regions, pack
from vlscale.data.sample import Batch, Box, Phrase, Sample
from vlscale.interop import layout
from vlscale.interop.export import module_tensors, write_tensors
from vlscale.systems.registry import build_system

LEFT: Box = (0.0, 0.0, 0.5, 1.0)
RIGHT: Box = (0.5, 0.0, 1.0, 1.0)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
CORNER: Box = (0.0, 0.0, 0.25, 0.25)
CAPTION = "A black dog , a man-riding man and the big wave !"
DOG, MAN, WAVE = ("A black dog", 0), ("a man-riding man", 4), ("the big wave", 8)


class Known(nn.Module):
    """Scores that a function gives of a phrase's token ids and a region's box."""

    grounding_layer = 2

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score
        self.layers: list[int | None] = []
        self.rows: list[int] = []

    def phrase_region_scores(self, batch: Batch, spans: Tensor, layer: int | None = None) -> Tensor:
        self.layers.append(layer)
        self.rows.append(len(batch))
        assert batch.region_boxes is not None
        assert batch.region_mask is not None
        scores = torch.full((*spans.shape[:2], batch.region_mask.shape[1]), -torch.inf)
        for row, own in enumerate(spans):
            for slot, span in enumerate(own):
                for region in range(int(batch.region_mask[row].sum())):
                    box = batch.region_boxes[row, region].tolist()
                    scores[row, slot, region] = self.score(batch.input_ids[row][span].tolist(), box)
        return scores


def phrase(said: tuple[str, int], *boxes: Box, caption: int = 0, **more: Any) -> Phrase:
    return Phrase(said[0], boxes, caption, said[1], **more)


def sample(folder: Path, number: int, seen: list[Box], phrases: tuple[Phrase, ...], **more: Any) -> Sample:
    """An image with a picture, stored regions and phrases."""
    count = len(seen)
    features = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(number)).half()
    regions = Regions(features, torch.tensor(seen).reshape(count, 4), torch.ones(count), ("",) * count)
    path = folder / f"{number}.png"
    Image.new("RGB", (40, 30), (40 * number % 256, 90, 120)).save(path)
    known = {"captions": (CAPTION, "a man"), "split": "test", "phrases": phrases, **more}
    return Sample(f"s{number}", path, regions=stored(folder / f"{number}.safetensors", pack(regions)), **known)


def recipe_of(place: Path, **options: Any) -> Recipe:
    """A recipe of a small system with regions; `place` gets its vocabularies."""
    write_vocabularies(place)
    data = data_with(place, max_words=14, max_phrases=3, max_regions=12, **options)
    text = {"width": 16, "heads": 2, "intermediate": 32, "layers": 3, "max_positions": 32, "init": "random"}
    return Recipe.model_validate(
        {
            "name": "small",
            "system": {"name": "mvptr", "text": text},
            "data": data.model_dump(),
            "eval": {"rerank": 4, "batch_size": 3},
        }
    )


def make_run(folder: Path, data: Path) -> Path:
    """An untrained run whose own boxes stand for regions, with `data` as its own."""
    folder.mkdir(parents=True)
    recipe = recipe_of(folder, pixels=2, region_width=12)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(data), "workers": 0})})
    tokenizer = tokenizer_of(recipe.data)
    torch.manual_seed(0)
    system = build_system(recipe, vocabulary_of(tokenizer, recipe.data)).eval()
    run = folder / "run"
    checkpoint = run / layout.CHECKPOINTS / layout.checkpoint_name(3)
    checkpoint.mkdir(parents=True)
    write_recipe(recipe, run / layout.RECIPE)
    shutil.copy(folder / "phrases.jsonl", run)
    tokenizer.save(run / layout.TOKENIZER)
    write_tensors(checkpoint / layout.MODEL, module_tensors(system))
    write_tensors(checkpoint / layout.CARRIED, system.carried_state())  # type: ignore[operator]
    (checkpoint / layout.COMPLETE).touch()
    return run


def write_data(folder: Path, phrases: bool = True, count: int = 5) -> Path:
    """A jsonl file of images with captions that would break a page, and phrases with boxes."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        Image.new("RGB", (40, 30), (40 * number, 90, 120)).save(folder / f"{number}.png")
        caption = f"a black dog, <b>& number {number}</b> \ud800"
        row: dict[str, Any] = {"image": f"{number}.png", "id": f"s{number}", "split": "test", "captions": [caption]}
        row |= {"boxes": [LEFT, RIGHT], "tags": ["dog", "wave"]}
        if phrases:
            dog = {"text": "a black dog", "caption": 0, "first_word": 0, "boxes": [LEFT], "kinds": ["animals"]}
            both = {"text": f"number {number}</b>", "caption": 0, "first_word": 4, "boxes": [LEFT, RIGHT]}
            row["phrases"] = [dog, both]
        lines.append(json.dumps(row) + "\n")
    path = folder / "captions.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path
