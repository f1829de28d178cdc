"""A run in two stages: what the second takes over, what it doesn't, and how an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import rows
from tests.engine.test_real_systems import small_recipe
from vlscale.config import Recipe, load_recipe, parse_recipe
from vlscale.engine import loop, stages
from vlscale.engine.checkpoint import consolidated, read_state
from vlscale.errors import UserError
from vlscale.interop.export import read_tensors
from vlscale.interop.run import load_run

FUSION = ("encoder.multimodal", "encoder.pooler", "word_head", "itm_head")


def recipe_of(folder: Path, **train: Any) -> Recipe:
    tree = small_recipe(folder, "mvptr").model_dump(mode="json")
    tree["train"] |= {"stages": [1.0, 2.0], "max_steps": 6, "weight_decay": 0.5, **train}
    tree["checkpoint"]["every"] = 3
    return parse_recipe(tree, "test")


def run(recipe: Recipe, out: Path, **options: Any) -> loop.RunResult:
    return stages.pretrain(recipe, out=out, ds_config="zero2_cpu", threads=torch.get_num_threads(), **options)


def weights_of(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return read_tensors(run / f"checkpoints/step-{step:08d}" / "model.safetensors")


def test_the_second_stage_starts_from_the_first_ones_weights(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    train = loop._train

    def spy(run: loop.Run, last: int, on_epoch: None) -> dict[str, float | int]:
        started.append(consolidated(run.system))
        assert not run.engine.optimizer.state_dict()["base_optimizer_state"]["state"].get(0)
        return train(run, last)

    monkeypatch.setattr(loop, "_train", spy)
    out = tmp_path / "run"
    result = run(recipe_of(tmp_path), out)
    assert (result.out, result.step, result.finished) == (out, 6, True)
    first, second = weights_of(out / "stage-1"), weights_of(out)
    assert first.keys() == started[1].keys() == second.keys()
    for name, value in started[1].items():
        assert torch.equal(first[name], value), name
        rests = name.startswith(FUSION)
        assert torch.equal(first[name], started[0][name]) is rests, f"{name}: stage 1, weight decay included"
        if rests:
            assert not torch.equal(second[name], value), f"{name}: stage 2"
    assert {"mcr_v", "mcr_s", "vsc"} <= rows(out / "stage-1")[0].keys()
    assert "wpg" not in rows(out / "stage-1")[0]
    assert "wpg" in rows(out)[0]
    for folder in (out / "stage-1", out):
        rates = [row["lr"] for row in rows(folder)]
        assert rates[0] < rates[1] > rates[-1]
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert load_recipe(str(out / "recipe.yaml")).train.stages == ()
    assert (out / "phrases.jsonl").read_bytes() == (out / "stage-1/phrases.jsonl").read_bytes()


def test_stages_one_by_one_are_the_run_at_once(group: None, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts", stage=1)
    assert not (tmp_path / "parts/recipe.yaml").exists()
    run(recipe, tmp_path / "parts", stage=2)
    for stage in ("", "stage-1"):
        assert rows(tmp_path / "parts" / stage) == rows(tmp_path / "whole" / stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_run_goes_on_where_it_was(group: None, tmp_path: Path, stage: int) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe, tmp_path / "straight")
    out = tmp_path / "parts"
    if stage == 2:
        run(recipe, out, stage=1)
    folder = out if stage == 2 else out / "stage-1"
    first = out / "stage-1/checkpoints/step-00000006" if stage == 2 else None
    loop.pretrain(
        recipe.stages[stage - 1],
        out=folder,
        ds_config="zero2_cpu",
        threads=torch.get_num_threads(),
        stop_after=4,
        weights=first,
    )
    run(recipe, out, resume="auto")
    for name in ("", "stage-1"):
        assert rows(out / name) == rows(tmp_path / "straight" / name)
    for name, value in weights_of(out).items():
        assert torch.equal(value, weights_of(tmp_path / "straight")[name]), name
    run(recipe, out, resume="auto")  # nothing is left to do
    assert rows(out) == rows(tmp_path / "straight")


def test_the_first_stage_may_be_gone_once_the_second_has_begun(group: None, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe, tmp_path / "run")
    before = rows(tmp_path / "run")
    (tmp_path / "run/stage-1").rename(tmp_path / "gone")
    run(recipe, tmp_path / "run", resume="auto")
    assert rows(tmp_path / "run") == before
    assert not (tmp_path / "run/stage-1").exists()


def test_the_run_keeps_its_phrases(group: None, tmp_path: Path) -> None:
    """The file that they were read from may change: the ids of the rows may not."""
    recipe = recipe_of(tmp_path)
    run(recipe, tmp_path / "made", stage=1)
    given = tmp_path / "given.jsonl"
    given.write_bytes((tmp_path / "made/stage-1/phrases.jsonl").read_bytes())
    concepts = recipe.data.concepts
    assert concepts is not None
    data = recipe.data.model_copy(update={"concepts": concepts.model_copy(update={"phrases": str(given)})})
    run(recipe.model_copy(update={"data": data}), tmp_path / "run", stage=1)
    given.write_text("changed\n")
    loaded = load_run(tmp_path / "run/stage-1", "cpu")
    assert loaded.recipe.data.concepts is not None
    assert loaded.recipe.data.concepts.phrases == str(tmp_path / "run/stage-1/phrases.jsonl")
    run(recipe.model_copy(update={"data": data}), tmp_path / "run", stage=1, resume="auto")


def test_phrases_start_as_the_mean_of_their_words(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_train", lambda run, last, on_epoch: systems.append(run.system) or {})
    systems: list[Any] = []
    run(recipe_of(tmp_path), tmp_path / "run", stage=1)
    table = systems[0].encoder.embeddings
    pieces = systems[0].vocabulary.phrase_pieces
    phrases = [
        json.loads(line)["text"] for line in (tmp_path / "run/stage-1/phrases.jsonl").read_text().splitlines()[1:]
    ]
    assert len(phrases) == len(pieces) > 0
    for row, own in zip(table.phrase_rows(), pieces, strict=True):
        assert torch.allclose(row, table.word_rows()[list(own)].mean(0), atol=1e-6)


def test_mistakes_are_told_before_anything_starts(group: None, tmp_path: Path) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "run"
    for options, message in (
        ({"stage": 3}, "has stages 1 to 2"),
        ({"stage": 2}, "no complete checkpoint; run --stage 1 first"),
        ({"resume": str(tmp_path)}, "say with --stage"),
    ):
        with pytest.raises(UserError, match=message):
            run(recipe, out, **options)
    with pytest.raises(UserError, match="is trained in one stage"):
        run(recipe.stages[1], out, stage=1)
    assert not out.exists()
    loop.pretrain(recipe.stages[0], out=out / "stage-1", ds_config="zero2_cpu", stop_after=3)
    assert read_state(out / "stage-1/checkpoints/step-00000003").total_steps == 6
    with pytest.raises(UserError, match="is not finished; go on with --stage 1 --resume auto"):
        run(recipe, out, stage=2)
    with pytest.raises(UserError, match="holds a run already"):
        run(recipe, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"stages": [1]}}, "train.stages: 1 stages of mvptr, but it has 2"),
        ({"data": {"concepts": None}}, "mvptr reads phrases, tags and regions"),
        ({"data": {"concepts": {"max_words": 60}}}, r"data.concepts: 65 tokens, but system.text.max_positions is 64"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = load_recipe("mvptr_tiny").model_dump(mode="json")
    for section, values in changes.items():
        for key, value in values.items():
            nested = isinstance(value, dict)
            tree[section][key] = {**tree[section][key], **value} if nested else value
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace(r"\\.", r"\.")):
        parse_recipe(tree, "test")


def test_only_systems_with_stages_have_them() -> None:
    with pytest.raises(UserError, match=r"2 stages of albef, but it has one: remove it, and set train\.epochs"):
        load_recipe("albef_tiny", ["train.stages=[1, 2]"])


def test_one_encoder_is_trained_in_the_last_stage_for_the_epochs_of_all() -> None:
    recipe = load_recipe("mvptr_tiny", ["system.fusion=merged", "system.wpg.layer=4", "train.stages=[3, 6]"])
    (only,) = recipe.stages
    assert (only.train.epochs, only.train.stages) == (9, ())
    assert only.system.model_dump()["stage"] == 2
