"""What the doctor's checks find, on machines and data with a known fault."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import build_toy, toy_recipe, write_data
from vlscale.config import Recipe
from vlscale.data.sample import Vocabulary
from vlscale.engine import checks_data, checks_machine, checks_ranks, checks_storage, doctor, loop
from vlscale.engine.checks_finding import Case, Finding, guarded, note, read_notes
from vlscale.errors import UserError

Usage = namedtuple("Usage", "total used free")


def wide(data: Path, **changes: Any) -> Recipe:
    """ALBEF with a million parameters, so that what torch writes around tensors weighs little."""
    vision = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    text = {"width": 128, "heads": 2, "intermediate": 512, "text_layers": 2, "fusion_layers": 2, "max_positions": 16}
    system = {
        "name": "albef",
        "vision": {"model": "vit_tiny_patch16_224", "init": "random", "overrides": vision},
        "text": {"init": "random", **text},
        "embed_dim": 16,
        "teacher": {"queue_size": 64},
    }
    tokenizer = {"vocab_size": 70, "max_tokens": 12}
    return toy_recipe(data, system=system, data__tokenizer=tokenizer, **changes)


@pytest.fixture
def case(data: Path, tmp_path: Path) -> Case:
    return Case(wide(data), "zero2_cpu", tmp_path / "runs" / "toy", world=1, local_world=1, threads=1)


def one(findings: list[Finding], name: str | None = None) -> Finding:
    chosen = [finding for finding in findings if name in (None, finding.name)]
    assert len(chosen) == 1, findings
    return chosen[0]


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> list[Finding]:
        raise UserError("train.lr: too much")

    def broken() -> list[Finding]:
        raise ZeroDivisionError("of a\nbug")

    assert guarded("a", mistaken) == [Finding("a", "failed", "train.lr: too much")]
    found = one(guarded("b", broken))
    assert (found.state, found.found) == ("failed", "ZeroDivisionError: of a bug")
    assert "Traceback" in capfd.readouterr().err


def test_notes_are_read_back_while_a_line_is_being_written(tmp_path: Path) -> None:
    file, finding = tmp_path / "notes", Finding("naïve", "warning", "found", "fix")
    assert read_notes(file) == []
    note(file, [finding, doctor.done("here")])
    file.write_bytes(file.read_bytes() + b'{"name": "half')
    assert read_notes(file) == [finding, doctor.done("here")]


def test_versions_of_this_environment_fit_and_wrong_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(checks_machine.versions(), "versions").state == "ok"
    real = metadata.version

    def version(name: str) -> str:
        if name == "pot":
            raise metadata.PackageNotFoundError(name)
        return "1.0.0" if name == "timm" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = one(checks_machine.versions())
    assert found.state == "failed"
    assert "pot>=0.9.6: missing" in found.found
    assert "timm>=1.0.20: 1.0.0 is installed" in found.found
    assert found.fix == "pip install 'timm>=1.0.20' 'pot>=0.9.6'"


def test_more_threads_than_cores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks_machine.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert one(checks_machine.accelerator(replace(case, local_world=2))).state == "ok"
    found = one(checks_machine.accelerator(replace(case, local_world=2, threads=2)))
    assert found.state == "warning"
    assert "2 ranks × 2 threads" in found.found


def test_ds_config_must_fit_the_recipe(case: Case, tmp_path: Path) -> None:
    assert "fp32" in one(checks_machine.ds_config(case)).found
    file = tmp_path / "own.json"
    file.write_text('{"train_batch_size": 999}')
    with pytest.raises(UserError, match="train_batch_size is 999"):
        checks_machine.ds_config(replace(case, ds_config=str(file)))


def test_an_address_or_interface_that_is_not_there(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert one(checks_machine.meeting_point(case)).state == "ok"
    two_nodes = replace(case, world=2)
    monkeypatch.setattr(checks_machine.socket, "gethostbyname", lambda _: "127.0.1.1")
    assert one(checks_machine.meeting_point(two_nodes)).state == "warning"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert one(checks_machine.meeting_point(two_nodes)).state == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "no such interface" in one(checks_machine.meeting_point(case)).found
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert "does not resolve" in one(checks_machine.meeting_point(case)).found


def test_few_open_files_and_little_shared_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_machine.resource, "getrlimit", lambda _: (256, 4096))
    found = one(checks_machine.open_files())
    assert (found.state, found.fix) == ("warning", "ulimit -n 4096")
    monkeypatch.setattr(checks_machine.shutil, "disk_usage", lambda _: Usage(0, 0, 64 << 20))
    assert one(checks_machine.shared_memory(case)).state == "ok"  # without workers nothing is handed over
    assert case.recipe is not None
    data = case.recipe.data.model_copy(update={"workers": 4, "image_size": 1024})  # 4 × 2 × 8 × 3 MiB
    large = replace(case, recipe=case.recipe.model_copy(update={"data": data}))
    found = one(checks_machine.shared_memory(large))
    assert found.state == "failed"
    assert "192 MiB" in found.found


def test_run_folder(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(checks_storage, "file_system", lambda _: "nfs4")
    found = one(checks_storage.run_folder(case))
    assert "renames and fsync work (nfs4)" in found.found
    assert set(tmp_path.rglob("*")) == before
    monkeypatch.setattr(checks_storage, "file_system", lambda _: "ext4")
    assert "2 machines" in one(checks_storage.run_folder(replace(case, world=2))).found
    (tmp_path / "file").touch()
    found = one(checks_storage.run_folder(replace(case, out=tmp_path / "file" / "run")))
    assert (found.state, found.found) == ("failed", f"{tmp_path / 'file'} is a file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "trial")

    monkeypatch.setattr(checks_storage.os, "replace", full)
    found = one(checks_storage.run_folder(case))
    assert found.state == "failed"
    assert "No space left" in found.found
    assert not list(tmp_path.glob(".vlscale-doctor-*"))


def test_file_system_is_that_of_the_innermost_mount() -> None:
    assert checks_storage.file_system(Path("/proc/self")) == "proc"


def test_a_checkpoint_takes_what_was_computed(group: None, data: Path, tmp_path: Path) -> None:
    recipe, threads = wide(data, train__max_steps=1), torch.get_num_threads()
    result = loop.pretrain(recipe, ds_config="zero2_cpu", out=tmp_path / "run", threads=threads)
    assert result.checkpoint is not None
    written = sum(file.stat().st_size for file in result.checkpoint.rglob("*") if file.is_file())
    computed = checks_storage.needs(recipe, "zero2_cpu", 1).checkpoint
    assert written > 10 << 20
    assert computed == pytest.approx(written, rel=0.03)


def test_disk_holds_kept_checkpoints_and_the_one_being_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert case.recipe is not None
    each = checks_storage.needs(case.recipe, "zero2_cpu", 1).checkpoint
    for free, state in ((4 * each - 1, "failed"), (4 * each, "ok")):
        monkeypatch.setattr(checks_storage.shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        assert one(checks_storage.disk(case)).state == state
    if not torch.cuda.is_available():
        assert one(checks_storage.disk(replace(case, ds_config="zero2_fp16"))).state == "unknown"


def test_masters_and_moments_are_shared_among_ranks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert case.recipe is not None
    alone, shared = (checks_storage.needs(case.recipe, "zero2_cpu", world) for world in (1, 2))
    assert alone.checkpoint == shared.checkpoint
    assert alone.memory / 2 < shared.memory < alone.memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, state in ((shared.memory, "failed"), (2 * shared.memory, "ok")):
        monkeypatch.setattr(checks_storage, "free_memory", lambda free=free: free)
        assert one(checks_storage.memory(replace(case, world=2, local_world=2))).state == state


def test_a_cgroup_with_less_memory_than_the_machine_counts() -> None:
    free = checks_storage.free_memory()
    assert free is not None
    assert 0 < free <= min([free, *checks_storage._left_in_cgroups()])


def test_data_with_what_is_wrong_in_it(case: Case, tmp_path: Path) -> None:
    findings = checks_data.data_and_steps(case)
    assert {finding.state for finding in findings} == {"ok"}
    assert "3.0 an epoch, 20 in all = 6.67 epochs" in one(findings, "steps").found

    data = write_data(tmp_path / "bad", count=6, broken=1)
    (data.parent / "004.png").unlink()
    findings = checks_data.data_and_steps(replace(case, recipe=toy_recipe(data, train__warmup_steps=20)))
    assert one(findings, "data").state == "warning"
    assert "6 samples" in one(findings, "data").found
    read = one(findings, "samples")
    assert (read.state, "001.png" in read.found, "004.png" in read.found) == ("warning", True, True)
    assert "never reaches" in one(findings, "steps").found

    shutil.rmtree(tmp_path / "data")
    shutil.move(data.parent, tmp_path / "data")
    for image in (tmp_path / "data").glob("*.png"):
        image.write_bytes(b"no image")
    assert one(checks_data.data_and_steps(case), "samples").state == "failed"


def test_batch_arithmetic(case: Case) -> None:
    assert "8 images per step" in one(checks_data.batch(case)).found
    assert "leaves 2 images" in one(guarded("batch", lambda: checks_data.batch(replace(case, world=3)))).found


Dry = Callable[..., dict[str, Finding]]


@pytest.fixture
def dry(group: None, case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dry]:
    """The dry step of the toy system after `change` was made to it."""
    threads = torch.get_num_threads()

    def run(change: Callable[[nn.Module], None] = lambda system: None) -> dict[str, Finding]:
        def build(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
            system = build_toy(recipe, vocabulary)
            change(system)
            return system

        monkeypatch.setattr(loop, "build_system", build)
        findings = checks_ranks.dry_step(replace(case, threads=threads), tmp_path / "scratch")
        shutil.rmtree(tmp_path / "scratch")
        return {finding.name: finding for finding in findings}

    yield run
    assert not case.out.exists()


def test_a_dry_step_leaves_the_run_folder_alone_and_sees_late_gradients(dry: Dry) -> None:
    findings = dry()
    assert findings["dry step"].state == "ok"
    assert findings["dry step"].found.startswith("8 images a rank: loss ")
    assert findings["gradients"].state == "ok"
    assert "reach 9 of 9" in findings["gradients"].found
    assert "2 of them not from the first step on" in findings["gradients"].found


def test_parameters_without_gradient_are_named(dry: Dry) -> None:
    def add(system: nn.Module) -> None:
        system.idle = nn.Linear(2, 2)

    found = dry(add)["gradients"]
    assert found.state == "warning"
    assert "none for idle.weight, idle.bias" in found.found


def test_a_loss_that_is_not_finite_fails(dry: Dry) -> None:
    def poison(system: nn.Module) -> None:
        system.poison = {0: float("inf")}  # type: ignore[assignment]

    assert dry(poison)["dry step"].state == "failed"


def test_what_is_too_large_is_not_tried(dry: Dry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks_storage, "free_memory", lambda: 1000)
    found = dry()
    assert found["dry step"].state == "unknown"
    assert "too large" in found["dry step"].found


def test_a_file_that_a_rank_does_not_see(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(checks_ranks.shared_files(tmp_path / "scratch")).state == "ok"
    monkeypatch.setattr(checks_ranks, "_APPEAR_SECONDS", 0.1)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    found = one(checks_ranks.shared_files(tmp_path / "scratch"))
    assert found.state == "failed"
    assert "sees no file of ranks 0" in found.found
