"""Recipes of fine-tuning: what ships resolves for its base recipe with the sources' numbers; mistakes are one line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from vlscale.config import LOSSES, Recipe, load_recipe, recipe_names, write_recipe
from vlscale.config.tasks import TASKS, Nlvr2Task, VqaTask
from vlscale.config.tuning import tuning_recipe
from vlscale.errors import UserError

READS_REGIONS = ("mvptr_base", "mvptr_tiny")


def shipped(task: str) -> list[str]:
    text = (resources.files("vlscale.recipes.tasks") / f"{task}.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load(text))


SHIPPED = [(name, task) for task in TASKS for name in shipped(task)]


def resolved(name: str, task: str, *overrides: str) -> Recipe:
    return tuning_recipe(load_recipe(name), task, None, list(overrides))


def test_every_recipe_has_every_task_that_its_system_can_do() -> None:
    for task in TASKS:
        able = set(recipe_names())
        if task == "nlvr2":
            able -= set(READS_REGIONS)
        if task == "grounding":
            able = set(READS_REGIONS)
        assert set(shipped(task)) == able, task


@pytest.mark.parametrize(("name", "task"), SHIPPED)
def test_shipped_recipes_resolve_and_survive_being_written(name: str, task: str, tmp_path: Path) -> None:
    base, recipe = load_recipe(name), resolved(name, task)
    assert recipe.task is not None
    assert (recipe.name, recipe.task.name, recipe.system.name) == (f"{name}-{task}", task, base.system.name)
    assert recipe.data.tokenizer.max_tokens >= base.data.tokenizer.max_tokens
    assert (
        recipe.data.tokenizer.model_copy(update={"max_tokens": base.data.tokenizer.max_tokens}) == base.data.tokenizer
    )
    assert recipe.stages == [recipe]
    assert getattr(recipe.system, "stage", 2) == 2
    if hasattr(recipe.system, "backbone"):
        assert recipe.system.backbone.freeze_epochs == 0
    distills = getattr(recipe.task, "distill", None) is not None
    assert distills == (task in ("vqa", "nlvr2", "snli-ve") and hasattr(recipe.system, "teacher"))
    if name.endswith("_tiny"):
        assert recipe.train.max_steps is not None
        assert recipe.train.max_steps <= 1200
    else:
        assert recipe.train.max_steps is None
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("task", "epochs", "batch", "rate", "warmup"),
    [("retrieval", 25, 256, 1e-5, 100), ("vqa", 8, 256, 2e-5, 400), ("snli-ve", 5, 256, 2e-5, 100)],
)
@pytest.mark.parametrize("name", ["albef_base", "codis_base", "cb_vila_base"])
def test_vit_systems_follow_albefs_release(
    name: str, task: str, epochs: int, batch: int, rate: float, warmup: int
) -> None:
    recipe = resolved(name, task)
    train = recipe.train
    assert (train.epochs, train.global_batch, train.lr, train.warmup_steps) == (epochs, batch, rate, warmup)
    assert (train.warmup_lr, train.min_lr, train.weight_decay, train.schedule) == (1e-5, 1e-6, 0.02, "cosine")
    assert (recipe.data.image_size, recipe.data.augment.crop_scale) == (384, (0.5, 1.0))


def test_numbers_of_the_papers() -> None:
    nlvr2 = resolved("albef_base", "nlvr2")
    assert isinstance(nlvr2.task, Nlvr2Task)
    assert (nlvr2.task.mode, nlvr2.task.assignment_steps, nlvr2.train.global_batch) == ("paired", 675, 128)
    soho = resolved("soho_base", "vqa")
    assert isinstance(soho.task, VqaTask)
    assert soho.train.backbone is not None
    assert (soho.task.mode, soho.task.size, soho.train.milestones) == ("classify", 3192, (12, 16))
    assert (soho.train.backbone.lr, soho.train.backbone.milestones, soho.train.lr) == (1e-2, (12, 16), 1e-4)
    pairs = resolved("soho_base", "retrieval")
    assert (pairs.data.texts.per_image, pairs.train.global_batch, pairs.train.factor) == (24, 24, 0.5)
    mvptr = resolved("mvptr_base", "vqa")
    assert isinstance(mvptr.task, VqaTask)
    assert (mvptr.task.head, mvptr.train.epochs, mvptr.system.text.dropout) == ("words", 25, 0.3)
    assert mvptr.data.concepts is not None
    assert (mvptr.data.concepts.max_words, mvptr.data.concepts.phrases) == (128, "auto")


@pytest.mark.parametrize("name", ["albef_base", "cb_vila_base", "codis_base", "soho_base", "mvptr_base"])
def test_retrieval_keeps_contrast_and_matching(name: str) -> None:
    recipe = resolved(name, "retrieval")
    kept = {loss for loss in LOSSES[recipe.system.name] if recipe.weights.get(loss, 1.0) != 0}
    assert kept <= {"itc", "align", "vsc", "itm"}
    assert "itm" in kept


@pytest.mark.parametrize(
    ("name", "task", "override", "message"),
    [
        ("soho_tiny", "nlvr2", "task.mode=paired", "task.mode: paired doubles layers .*soho has none: use passes"),
        ("albef_tiny", "vqa", "task.speed=1", r"task\.vqa\.speed: unknown key"),
        ("albef_tiny", "vqa", "task.mode=classify", "distill: soft scores have no teacher: remove it"),
        ("cb_vila_tiny", "nlvr2", "task={name: nlvr2, mode: passes, assignment_steps: 5}", "assignment_steps: only"),
        ("albef_tiny", "vqa", "task.name=snli-ve", "vqa is to be learned|unknown key"),
        ("albef_tiny", "vqa", "weights.mlm=1", "mlm is no loss of albef; it has vqa"),
        ("soho_tiny", "retrieval", "data.texts.negative=0", "data.texts: soho learns to match from texts"),
        ("albef_tiny", "vqa", "task.max_answer=2", "max_answer"),
        ("albef_tiny", "retrieval", "task.head_lr=2", "head_lr: unknown key"),
    ],
)
def test_mistakes_are_one_line(name: str, task: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolved(name, task, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("mvptr_tiny", "nlvr2", "task: nlvr2 shows two images, and mvptr reads regions of one"),
        ("albef_tiny", "grounding", "task: grounding teaches which region .*albef reads no regions"),
    ],
)
def test_what_a_system_cannot_do_is_said(name: str, task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none for"):
        resolved(name, task)
    changes = tmp_path / "mine.yaml"
    changes.write_text("train: {lr: 1e-4}")
    with pytest.raises(UserError, match=message) as caught:
        tuning_recipe(load_recipe(name), task, str(changes))
    assert "\n" not in str(caught.value)
