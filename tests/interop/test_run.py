from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.toy import ToySystem, toy_recipe, write_data
from vlscale.config import load_recipe, write_recipe
from vlscale.data.text import build_tokenizer
from vlscale.errors import UserError
from vlscale.interop import layout, run
from vlscale.interop.export import load_weights, module_tensors, read_tensors, write_tensors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two complete checkpoints and a half one, written without an engine."""
    monkeypatch.setattr(run, "build_system", lambda recipe, vocabulary: ToySystem(vocabulary))
    recipe = toy_recipe(write_data(tmp_path / "data"))
    tokenizer = build_tokenizer(recipe.data.tokenizer, ["a red square", "a blue square"])
    write_recipe(recipe, tmp_path / layout.RECIPE)
    tokenizer.save(tmp_path / layout.TOKENIZER)
    for step in (1, 2, 3):
        system = ToySystem(tokenizer.vocabulary)
        checkpoint = tmp_path / layout.CHECKPOINTS / layout.checkpoint_name(step)
        checkpoint.mkdir(parents=True)
        system.pushed = torch.tensor(float(step))
        write_tensors(checkpoint / layout.MODEL, module_tensors(system))
        write_tensors(checkpoint / layout.CARRIED, system.carried_state())
        if step < 3:
            layout.write_json(checkpoint / layout.COMPLETE, {})
    return tmp_path


def test_a_run_folder_means_its_newest_complete_checkpoint(folder: Path) -> None:
    loaded = run.load_run(folder, "cpu")
    assert (loaded.step, loaded.checkpoint.name) == (2, "step-00000002")
    assert loaded.system.pushed.item() == 2.0
    assert not loaded.system.training
    saved = read_tensors(loaded.checkpoint / layout.MODEL)
    assert all(torch.equal(value, saved[name]) for name, value in loaded.system.state_dict().items())
    assert loaded.recipe == load_recipe(str(folder / layout.RECIPE))
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(["a red square"])[0][0]) == "a red square"


def test_a_checkpoint_may_be_named(folder: Path) -> None:
    loaded = run.load_run(folder / "checkpoints/step-00000001")
    assert loaded.step == 1
    assert loaded.folder.samefile(folder)


def test_a_half_checkpoint_and_a_folder_without_a_run_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not saved to the end"):
        run.load_run(folder / "checkpoints/step-00000003")
    with pytest.raises(UserError, match=r"no recipe\.yaml in it"):
        run.load_run(folder / "data")
    with pytest.raises(UserError, match="no such folder"):
        run.load_run(folder / "nothing")
    for checkpoint in layout.complete_checkpoints(folder):
        (checkpoint / layout.COMPLETE).unlink()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        run.load_run(folder)


def test_weights_are_loaded_strictly(folder: Path) -> None:
    checkpoint = folder / "checkpoints/step-00000002"
    tensors = read_tensors(checkpoint / layout.MODEL)
    del tensors["codes"]
    write_tensors(checkpoint / layout.MODEL, tensors)
    with pytest.raises(UserError, match=r"does not fit the recipe's system.*codes"):
        run.load_run(folder)


def test_a_torn_file_is_one_line(folder: Path) -> None:
    path = folder / "checkpoints/step-00000002" / layout.MODEL
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        run.load_run(folder)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        run.load_run(folder)


def test_samples_are_the_runs_own_or_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = run.load_run(folder)
    asked: list[tuple[str | None, str | None]] = []
    read: Callable[..., list[int]] = lambda data: asked.append((data.path, data.image_root)) or []  # noqa: E731
    monkeypatch.setattr(run, "read_data", read)
    monkeypatch.setattr(run, "evaluation_split", lambda samples, split: (split, samples))
    run.run_samples(loaded, None, "test")
    run.run_samples(loaded, "other.jsonl", "val", "pictures")
    run.run_samples(loaded, "other.jsonl", "val")
    assert asked == [(loaded.recipe.data.path, None), ("other.jsonl", "pictures"), ("other.jsonl", None)]


def test_tensors_that_share_storage_are_written_apart_in_fp32(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2).half()
    module.twin = module.weight
    write_tensors(tmp_path / "a.safetensors", module_tensors(module))
    read = read_tensors(tmp_path / "a.safetensors")
    assert {value.dtype for value in read.values()} == {torch.float32}
    assert torch.equal(read["twin"], read["weight"])
    load_weights(module, tmp_path / "a.safetensors")


def test_random_initialisation_replaces_downloads() -> None:
    recipe = toy_recipe(Path("x"), system={"name": "albef", "vision": {"init": "pretrained"}, "text": {"init": "bert"}})
    light = run.without_downloads(recipe)
    assert (light.system.vision.init, light.system.text.init) == ("random", "random")
    assert recipe.system.vision.init == "pretrained"
