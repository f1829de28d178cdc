import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import rows
from tests.engine.ranks import run_ranks
from tests.engine.toy import toy_recipe, write_data
from vlscale.config import Recipe
from vlscale.engine import checkpoint
from vlscale.engine.loop import RunResult
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.export import read_tensors

Pretrain = Callable[..., RunResult]
TOY = "tests.engine.toy_main"


class Killed(BaseException):
    """Ends a save where SIGKILL would."""


def tags(run: Path) -> list[str]:
    return [path.name for path in layout.complete_checkpoints(run)]


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = read_tensors(a), read_tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ten_steps_and_ten_more_are_twenty_to_the_bit(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    pretrain(recipe, straight)
    assert not pretrain(recipe, parts, stop_after=10).finished
    pretrain(recipe, parts, resume="auto")
    assert rows(parts) == rows(straight)
    for name in (layout.MODEL, layout.CARRIED):
        assert same_tensors(straight / "checkpoints/step-00000020" / name, parts / "checkpoints/step-00000020" / name)
    keys = [path.read_text().splitlines()[0] for path in (straight / "metrics.csv", parts / "metrics.csv")]
    assert keys[0] == keys[1]


def test_resume_at_two_ranks_is_exact_after_sigkill(tmp_path: Path) -> None:
    """20 straight against: killed inside the save of step 10, resumed from 5 in new processes."""
    data = write_data(tmp_path / "data")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    # Four replaces a save (model, carried, state, marker) and one for `latest`: the ninth is the marker of step 10.
    # Rank 0 dies there; rank 1 finds its peer gone and fails.
    killed = run_ranks(TOY, {"data": str(data), "runs": [{"out": str(straight)}, {"out": str(parts), "kill": 9}]}, 2)
    assert killed[0][0] == -signal.SIGKILL, killed
    assert killed[1][0] != 0
    assert len(rows(straight)) == 20
    assert tags(parts) == ["step-00000005"]
    assert (parts / "checkpoints/step-00000010" / layout.MODEL).exists()
    again = run_ranks(TOY, {"data": str(data), "runs": [{"out": str(parts), "resume": "auto"}]}, 2)
    assert [code for code, _ in again] == [0, 0], again
    assert "going on from" in again[0][1]
    assert again[1][1].strip() == "", "only rank 0 speaks"
    assert rows(parts) == rows(straight)
    for name in (layout.MODEL, layout.CARRIED):
        assert same_tensors(straight / "checkpoints/step-00000020" / name, parts / "checkpoints/step-00000020" / name)


@pytest.mark.parametrize("call", range(1, 6))
def test_a_kill_at_any_write_of_a_save_leaves_a_run_that_resumes(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The second save dies instead of its n-th rename; the one before is taken, or the new one if it was complete."""
    out, left = tmp_path / "run", [5 + call]
    replace = os.replace

    def replace_or_die(source: Any, target: Any) -> None:
        if "checkpoints" in str(target):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Killed):
            pretrain(recipe, out)
    expected = ["step-00000005", "step-00000010"] if call == 5 else ["step-00000005"]
    assert tags(out) == expected
    assert pretrain(recipe, out, resume="auto").finished
    assert [row["step"] for row in rows(out)] == list(range(1, 21))
    assert tags(out) == ["step-00000010", "step-00000015", "step-00000020"]
    assert (out / "checkpoints/latest").read_text() == "step-00000020\n"


def test_a_kill_while_pruning_leaves_no_half_checkpoint(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path) -> None:
        (path / layout.MODEL).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", die)
        with pytest.raises(Killed):
            pretrain(recipe, tmp_path / "run")
    assert tags(tmp_path / "run") == ["step-00000010", "step-00000015", "step-00000020"]
    pretrain(recipe, tmp_path / "run", resume="auto")
    assert not (tmp_path / "run/checkpoints/step-00000005").exists()


def test_a_damaged_checkpoint_is_passed_over_and_kept(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pretrain(recipe, out)
    damaged = out / "checkpoints/step-00000020" / layout.MODEL
    damaged.write_bytes(damaged.read_bytes()[:-7] + b"\0" * 7)  # same size
    before = rows(out)
    result = pretrain(recipe, out, resume="auto")
    said = capsys.readouterr().out
    assert "step-00000020: model.safetensors is not what was written; falling back" in said
    assert "going on from" in said
    assert result.finished
    assert rows(out) == before
    assert (out / "checkpoints/step-00000020.set-aside-1").is_dir()


def test_old_checkpoints_are_pruned(pretrain: Pretrain, data: Path, tmp_path: Path) -> None:
    pretrain(toy_recipe(data, checkpoint__every=4, checkpoint__keep=2), tmp_path / "run")
    assert tags(tmp_path / "run") == ["step-00000016", "step-00000020"]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()} == set(
        tags(tmp_path / "run")
    )


def test_a_tag_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    checkpoint._create(folder)
    with pytest.raises(UserError, match="never overwritten"):
        checkpoint._create(folder)


def test_resume_auto_starts_anew_when_there_is_nothing(
    pretrain: Pretrain, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(recipe, out, resume="auto", stop_after=3).step == 3
    assert "nothing to resume" in capsys.readouterr().out
    (out / "checkpoints/step-00000003" / layout.COMPLETE).unlink()
    assert pretrain(recipe, out, resume="auto", stop_after=4).step == 4
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


def test_resuming_a_finished_run_changes_nothing(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    pretrain(recipe, tmp_path / "run")
    before = rows(tmp_path / "run")
    assert pretrain(recipe, tmp_path / "run", resume="auto").finished
    assert rows(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train__max_steps": 30}, "train.max_steps"),
        ({"train__lr": 1e-3}, "train.lr"),
        ({"weights": {"itc": 2}}, "itc"),
    ],
)
def test_resume_refuses_another_recipe(
    pretrain: Pretrain, recipe: Recipe, data: Path, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    pretrain(recipe, tmp_path / "run", stop_after=5)
    with pytest.raises(UserError, match=rf"the run was started with .*{key}"):
        pretrain(toy_recipe(data, **changes), tmp_path / "run", resume="auto")


def test_what_leaves_the_result_alone_may_change(
    pretrain: Pretrain, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    pretrain(recipe, tmp_path / "run", stop_after=5)
    other = toy_recipe(data, checkpoint__every=7, checkpoint__keep=1, train__max_bad_steps=9, eval={"rerank": 4})
    pretrain(other, tmp_path / "run", resume="auto")
    assert tags(tmp_path / "run") == ["step-00000020"]


def test_another_precision_is_refused(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    pretrain(recipe, tmp_path / "run", stop_after=5)
    with pytest.raises(UserError, match="was trained in fp32, --ds-config zero2_bf16 means autocast_bfloat16"):
        pretrain(recipe, tmp_path / "run", resume="auto", ds_config="zero2_bf16")


def test_other_data_under_the_same_name_is_refused(
    pretrain: Pretrain, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    pretrain(recipe, tmp_path / "run", stop_after=5)
    before = rows(tmp_path / "run")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"was trained on other data: 24 samples then, 23 now"):
        pretrain(recipe, tmp_path / "run", resume="auto")
    assert rows(tmp_path / "run") == before
    data.write_text("".join(lines))
    assert pretrain(recipe, tmp_path / "run", resume="auto").finished


def test_resume_from_a_path(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    first = pretrain(recipe, tmp_path / "first")
    assert first.checkpoint is not None
    older = first.checkpoint.with_name("step-00000010")
    # Into another folder: the steps that follow are the same ones.
    pretrain(recipe, tmp_path / "branch", resume=str(older))
    assert rows(tmp_path / "branch") == rows(tmp_path / "first")[10:]
    assert (tmp_path / "branch/tokenizer").is_dir()
    # In its own run: what lay after it is set aside.
    before = rows(tmp_path / "first")
    pretrain(recipe, tmp_path / "first", resume=str(older))
    assert rows(tmp_path / "first") == before
    assert (first.checkpoint.parent / "step-00000020.set-aside-1").is_dir()
    with pytest.raises(UserError, match="holds another run"):
        pretrain(recipe, tmp_path / "branch", resume=str(tmp_path / "first"))
    with pytest.raises(UserError, match="no complete checkpoint there"):
        pretrain(recipe, tmp_path / "third", resume=str(tmp_path / "data"))
