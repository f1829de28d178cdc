"""Examples of VQA, NLVR2 and SNLI-VE, a system whose scores are a function of text and pixels, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tests.engine.toy import toy_recipe
from vlscale.config import Recipe, write_recipe
from vlscale.data.answers import save_answers
from vlscale.data.sample import Batch, Vocabulary
from vlscale.data.text import TextTokenizer, build_tokenizer
from vlscale.interop import layout
from vlscale.interop.export import module_tensors, write_tensors

ANSWERS = ["yes", "red", "2", "no", "blue", "a dog's"]
WORDS = "is what the red blue thing here left <b>& now then there two"
LABELS = {"snli-ve": ("entailment", "neutral", "contradiction"), "nlvr2": ("false", "true"), "vqa": ANSWERS}


class Known(nn.Module):
    """Scores of classes from the mean of the token ids and of the pixels, and of the right image of a pair."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3, generator=torch.Generator().manual_seed(3)))
        self.sizes: list[int] = []

    def predict(self, batch: Batch) -> Tensor:
        assert not self.training
        self.sizes.append(len(batch))
        count = batch.attention_mask.sum(1)
        words = (batch.input_ids * batch.attention_mask).sum(1) / count
        right = batch.images if batch.right is None else batch.right.images
        facts = torch.stack([words / 10, batch.images.mean((1, 2, 3)), right.mean((1, 2, 3))], 1)  # [B, 3]
        return (facts[:, None] * self.weight).sum(2)  # no matrix product: autocast leaves it in fp32

    def carried_state(self) -> dict[str, Tensor]:
        return {}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        assert not state

    def place(self, device: torch.device) -> None:
        pass


def build_known(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    """Stands in for `registry.build_system`."""
    assert recipe.task is not None
    return Known(len(vocabulary.answer_pieces) if recipe.task.name == "vqa" else len(LABELS[recipe.task.name]))


def write_data(folder: Path, count: int = 7, broken: int | None = None, split: str = "test") -> Path:
    """A jsonl of images with two questions and two hypotheses each; the image numbered `broken` is none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (16, 8), (37 * number % 256, 90, 255 - 20 * number % 256)).save(path)
        if number == broken:
            path.write_bytes(b"no image")
        kinds = ("yes/no", ["yes"] * 6 + ["no"] * 4), ("other", ["Red.", "red", "blue", f"{number}", "two"])
        asked = [
            {"id": f"{100 * number + one}", "text": f"{WORDS[: 9 + 4 * number + one]} ?", "answers": answers, "kind": k}
            for one, (k, answers) in enumerate(kinds)
        ]
        stated = [
            {"id": f"{number}#{one}", "text": WORDS[one : 20 + number], "label": LABELS["snli-ve"][(number + one) % 3]}
            for one in range(2)
        ]
        row = {"image": path.name, "id": f"s{number}", "split": split, "captions": [f"<b>picture</b> {number}"]}
        lines.append(json.dumps({**row, "questions": asked, "statements": stated}) + "\n")
    data = folder / "captions.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    return data


def write_pairs(folder: Path, sets: int = 2, broken: int | None = None, split: str = "test") -> Path:
    """Sentences with four pairs each, true of two of them, over the images of `write_data`."""
    write_data(folder, 4 * sets, broken)
    lines = []
    for number in range(4 * sets):
        identity = f"{split}-{number // 4}-{number % 4}"
        statement = {"id": f"{identity}-0", "text": WORDS[: 12 + number // 4], "label": str(number % 2 == 0).lower()}
        row = {"image": f"{number}.png", "second": f"{number // 2}.png", "id": identity, "split": split}
        lines.append(json.dumps(row | {"statements": [statement]}) + "\n")
    path = folder / "some_pairs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe_of(data: Path, task: str, **changes: Any) -> Recipe:
    """A recipe of the task on this data."""
    mode = {"mode": "classify", "min_count": 1} if task == "vqa" else {}
    return toy_recipe(data, task={"name": task, **mode}, eval={"batch_size": 3}, **changes)


def tokenizer_of(recipe: Recipe) -> TextTokenizer:
    return build_tokenizer(recipe.data.tokenizer, [WORDS, "is what ?"])


def make_run(folder: Path, recipe: Recipe) -> Path:
    """A run folder with one checkpoint of `Known`, to be loaded where `build_known` stands in."""
    checkpoint = folder / layout.CHECKPOINTS / layout.checkpoint_name(3)
    checkpoint.mkdir(parents=True)
    tokenizer = tokenizer_of(recipe)
    write_recipe(recipe, folder / layout.RECIPE)
    tokenizer.save(folder / layout.TOKENIZER)
    save_answers(folder / layout.ANSWERS, ANSWERS)
    system = Known(len(LABELS[recipe.task.name if recipe.task else "nlvr2"]))
    write_tensors(checkpoint / layout.MODEL, module_tensors(system))
    write_tensors(checkpoint / layout.CARRIED, {})
    (checkpoint / layout.COMPLETE).touch()
    return folder
