"""Two optimizers in one engine, and a backbone that rests and wakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

from tests.engine.conftest import rows
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToySystem, toy_recipe, write_data
from vlscale.config import Recipe, Sgd, Train
from vlscale.data.sample import Batch, Vocabulary
from vlscale.engine.build import Choice, build_engine, complete
from vlscale.engine.loop import RunResult
from vlscale.engine.mixed import MixedOptimizer
from vlscale.engine.optim import build_optimizer, has_backbone, parameter_groups, set_learning_rate
from vlscale.engine.schedule import batch_plan
from vlscale.engine.writer import EngineWriter
from vlscale.errors import UserError
from vlscale.interop.export import read_tensors
from vlscale.systems.protocol import Progress

Pretrain = Callable[..., RunResult]
TOY = "tests.engine.toy_main"
VOCABULARY = Vocabulary(20, 0, 1, 2, 3)
SGD: dict[str, Any] = {"lr": 1e-2, "warmup_lr": 1e-2, "warmup_steps": 0, "schedule": "steps", "milestones": [3]}
STEPS_PER_EPOCH, WAKES = 3, 6
"""24 images by 8; the toy's backbone rests for two epochs, so its first training step is the one after 6."""

SOHO: dict[str, Any] = {
    "system": {"name": "soho", "backbone": {"freeze_epochs": WAKES / STEPS_PER_EPOCH}},
    "weights": {"itm": 0.0},  # SOHO's would ask for several texts per image
}


def soho_toy(data: Path, **changes: Any) -> Recipe:
    return toy_recipe(data, **{**SOHO, "train__max_steps": 10, "train__backbone": SGD, **changes})


def sgd_group(parameter: nn.Parameter, **numbers: Any) -> dict[str, Any]:
    group = {"name": "s", "kind": "sgd", "params": [parameter], "lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    return {**group, **numbers}


def adamw_group(parameter: nn.Parameter, **numbers: Any) -> dict[str, Any]:
    group = {"name": "a", "kind": "adamw", "params": [parameter], "lr": 0.1, "weight_decay": 0.05}
    return {**group, "betas": (0.9, 0.99), "eps": 1e-6, **numbers}


# --- the optimizer itself


def test_both_kinds_are_torch_s_own() -> None:
    mine = [nn.Parameter(torch.randn(7, 5)) for _ in range(2)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    mixed = MixedOptimizer([sgd_group(mine[0]), adamw_group(mine[1])])
    sgd = torch.optim.SGD([theirs[0]], 0.1, momentum=0.9, weight_decay=0.05)
    adamw = torch.optim.AdamW([theirs[1]], 0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05, fused=True)
    for _ in range(5):
        for parameter, other in zip(mine, theirs, strict=True):
            parameter.grad = torch.randn(7, 5)
            other.grad = parameter.grad.clone()
        for optimizer in (mixed, sgd, adamw):
            optimizer.step()
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-7)
        assert torch.equal(mine[1], theirs[1])
    torch.testing.assert_close(mixed.state[mine[0]]["exp_avg"], sgd.state[theirs[0]]["momentum_buffer"])
    for parameter in mine:
        assert {key: value.shape for key, value in mixed.state[parameter].items()} == {
            "step": (),
            "exp_avg": (7, 5),
            "exp_avg_sq": (7, 5),
        }
        assert mixed.state[parameter]["step"].item() == 5


@pytest.mark.parametrize("make", [sgd_group, adamw_group])
def test_a_resting_group_keeps_everything_to_the_bit(make: Callable[..., dict[str, Any]]) -> None:
    """Though its rate is not 0, and its gradient is one of zeros, as under ZeRO."""
    parameter = nn.Parameter(torch.randn(5))
    optimizer = MixedOptimizer([make(parameter)])
    group = optimizer.param_groups[0]
    parameter.grad = torch.randn(5)
    optimizer.step()
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter])
    group["resting"], parameter.grad = True, torch.zeros(5)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    group["resting"] = False
    optimizer.step()
    assert not torch.equal(parameter, before)
    assert optimizer.state[parameter]["step"].item() == 2


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    def build() -> tuple[list[nn.Parameter], MixedOptimizer]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(4)) for _ in range(2)]
        return parameters, MixedOptimizer([sgd_group(parameters[0]), adamw_group(parameters[1])])

    def step(parameters: list[nn.Parameter], optimizer: MixedOptimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(4, generator=generator)
        optimizer.step()

    (ours, optimizer), (theirs, other) = build(), build()
    for seed in range(3):
        step(ours, optimizer, seed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, source in zip(theirs, ours, strict=True):
        parameter.data.copy_(source.data)
    step(ours, optimizer, 9)
    step(theirs, other, 9)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_group_without_kind_or_numbers_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="group s: kind adam"):
        MixedOptimizer([sgd_group(parameter, kind="adam")])
    with pytest.raises(ValueError, match=r"kind adamw, missing \['betas', 'eps'\]"):
        MixedOptimizer([sgd_group(parameter, kind="adamw")])


# --- groups of a system


def test_groups_bring_their_kind_and_numbers() -> None:
    train = Train(weight_decay=0.1, backbone=Sgd(lr=0.5, warmup_lr=0.25, momentum=0.8, weight_decay=0.3))
    groups = {group["name"]: group for group in parameter_groups(ToySystem(VOCABULARY, backbone=True), train)}
    assert list(groups) == ["decay", "no_decay", "backbone_decay", "backbone_no_decay"]
    shown = {name: (g["kind"], g["weight_decay"], g["lr"], g.get("momentum")) for name, g in groups.items()}
    assert shown["decay"] == ("adamw", 0.1, train.warmup_lr, None)
    assert shown["no_decay"] == ("adamw", 0.0, train.warmup_lr, None)
    assert shown["backbone_decay"] == ("sgd", 0.3, 0.25, 0.8)
    assert shown["backbone_no_decay"] == ("sgd", 0.0, 0.25, 0.8)
    assert [tuple(parameter.shape) for parameter in groups["backbone_decay"]["params"]] == [(192, 192)]


def test_what_is_frozen_for_good_and_empty_groups_are_left_out() -> None:
    system = ToySystem(VOCABULARY, backbone=True)
    system.backbone.bias.requires_grad_(False)
    groups = parameter_groups(system, Train())
    assert [group["name"] for group in groups] == ["decay", "no_decay", "backbone_decay"]
    assert {group["kind"] for group in groups} == {"adamw"}


def test_which_optimizer() -> None:
    plain, backbone = ToySystem(VOCABULARY), ToySystem(VOCABULARY, backbone=True)
    assert type(build_optimizer(plain, Train())) is torch.optim.AdamW
    assert not has_backbone(build_optimizer(plain, Train()))
    for train in (Train(), Train(backbone=Sgd())):
        optimizer = build_optimizer(backbone, train)
        assert isinstance(optimizer, MixedOptimizer)
        assert has_backbone(optimizer)
    backbone.backbone.requires_grad_(False)
    with pytest.raises(UserError, match=r"train\.backbone: nothing of the system's backbone is trained"):
        build_optimizer(backbone, Train(backbone=Sgd()))


# --- under ZeRO


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 20, (4, 3), generator=generator)
    return Batch(torch.rand(4, 3, 8, 8, generator=generator), ids, torch.ones_like(ids), torch.arange(4))


def loss_of(system: Any, seed: int, step: int) -> Tensor:
    progress = Progress(step, 10, 5.0, torch.Generator().manual_seed(seed))
    return torch.stack(list(system(batch_of(seed), progress).losses.values())).sum()


REST = [True, True, False, False, True, True, False, False]
"""Rests, wakes, rests again with momentum in hand, and wakes again."""
ACCUMULATION = 2


@pytest.mark.parametrize("backbone", [Sgd(weight_decay=0.1), None], ids=["sgd", "adamw"])
@pytest.mark.parametrize("stage", [1, 2])
def test_resting_and_waking_are_what_two_plain_optimizers_do(group: None, stage: int, backbone: Sgd | None) -> None:
    """Accumulated, clipped, against torch.optim on single tensors where the backbone's optimizer is just not called."""
    train = Train(global_batch=8, micro_batch=4, weight_decay=0.1, clip=0.5, eps=1e-3, backbone=backbone)
    choice = Choice("test", {"zero_optimization": {"stage": stage}}, "")
    ours = ToySystem(VOCABULARY, backbone=True)
    ours.dropout = 0.0
    theirs = copy.deepcopy(ours)
    engine = build_engine(ours, complete(choice, batch_plan(train, 1), train), choice, train)
    main, other = plain_optimizers(theirs, train)
    start = ours.backbone.weight.detach().clone()
    for step, resting in enumerate(REST):
        ours.backbone.requires_grad_(not resting)
        set_learning_rate(engine.optimizer, 1e-2, 0.0 if resting else 2e-2, resting)
        before = {name: value.detach().clone() for name, value in ours.backbone.named_parameters()}
        for micro in range(ACCUMULATION):
            engine.backward(loss_of(engine, 10 * step + micro, step))
            engine.step()
        plain_step(theirs, [main] if resting else [main, other], step, train.clip)
        unmoved = [torch.equal(value, before[name]) for name, value in ours.backbone.named_parameters()]
        assert all(unmoved) if resting else not any(unmoved)
        for (name, mine), plain in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=2e-6, msg=f"step {step}: {name}")
    assert (ours.backbone.weight - start).abs().max() > 1e-3


def plain_optimizers(system: ToySystem, train: Train) -> list[torch.optim.Optimizer]:
    """AdamW for the rest, and the backbone's: one torch optimizer each."""
    groups = parameter_groups(system, train)
    for entry in groups:
        entry["lr"] = 2e-2 if entry["name"].startswith("backbone") else 1e-2
    backbone = [entry for entry in groups if entry["name"].startswith("backbone")]
    kind = torch.optim.SGD if train.backbone is not None else torch.optim.AdamW
    return [torch.optim.AdamW([entry for entry in groups if entry not in backbone]), kind(backbone)]


def plain_step(system: ToySystem, optimizers: list[torch.optim.Optimizer], step: int, clip: float) -> None:
    for parameter in system.parameters():
        parameter.grad = None
    for micro in range(ACCUMULATION):
        (loss_of(system, 10 * step + micro, step) / ACCUMULATION).backward()
    trained = [
        parameter for optimizer in optimizers for entry in optimizer.param_groups for parameter in entry["params"]
    ]
    for parameter in trained:  # ZeRO fills missing gradients with zeros
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    nn.utils.clip_grad_norm_(trained, clip)
    for optimizer in optimizers:
        optimizer.step()


def test_moments_of_codes_are_reset_while_the_backbone_rests(group: None) -> None:
    """DeepSpeed links the moments once: a resting group must have its own by then."""
    train = Train(global_batch=4, backbone=Sgd())
    choice = Choice("test", {"zero_optimization": {"stage": 2}}, "")
    system = ToySystem(VOCABULARY, backbone=True)
    engine = build_engine(system, complete(choice, batch_plan(train, 1), train), choice, train)
    revived = torch.tensor([True, False, True, False, False, False])
    for resting in (True, False):
        system.backbone.requires_grad_(not resting)
        set_learning_rate(engine.optimizer, 1e-2, 0.0, resting)
        engine.backward(loss_of(engine, 0, 0))
        engine.step()
        before = safe_get_full_optimizer_state(system.codes, "exp_avg").clone()
        EngineWriter().reset_moments(system.codes, revived)
        after = safe_get_full_optimizer_state(system.codes, "exp_avg")
        assert not after[revived].any()
        assert torch.equal(after[~revived], before[~revived])
        momentum = safe_get_full_optimizer_state(system.backbone.weight, "exp_avg")
        assert momentum.any() != resting


# --- in a run


def saved_moments(run: Path, step: int, rank: int = 0) -> dict[str, dict[str, Tensor]]:
    """This rank's optimizer state in a checkpoint, by the name of the group."""
    folder = run / f"checkpoints/step-{step:08d}"
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    return {entry["name"]: state["state"][entry["params"][0]] for entry in state["param_groups"]}


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return read_tensors(run / f"checkpoints/step-{step:08d}/model.safetensors")


def test_the_backbone_rests_to_the_bit_and_then_trains(pretrain: Pretrain, data: Path, tmp_path: Path) -> None:
    recipe = soho_toy(data, checkpoint__every=1, checkpoint__keep=20)
    pretrain(recipe, tmp_path / "run")
    for step in range(1, WAKES + 1):
        for name in ("backbone.weight", "backbone.bias"):
            assert torch.equal(weights(tmp_path / "run", step)[name], weights(tmp_path / "run", 1)[name])
        for name, state in saved_moments(tmp_path / "run", step).items():
            assert any(value.any() for value in state.values()) == (not name.startswith("backbone")), (step, name)
    first = weights(tmp_path / "run", WAKES)
    for step in range(WAKES + 1, 11):
        now, moments = weights(tmp_path / "run", step), saved_moments(tmp_path / "run", step)
        assert all(not torch.equal(now[name], first[name]) for name in ("backbone.weight", "backbone.bias"))
        assert moments["backbone_decay"]["step"].item() == step - WAKES
        assert moments["backbone_decay"]["exp_avg"].all()
        assert not moments["backbone_decay"]["exp_avg_sq"].any()
        assert moments["decay"]["step"].item() == step
        first = now
    log = rows(tmp_path / "run")
    # 3 epochs are over after step 9: from the tenth on, a tenth.
    assert [row["lr_backbone"] for row in log] == [0.0] * WAKES + [1e-2] * 3 + [1e-3]
    assert log[WAKES]["lr"] == pytest.approx(log[WAKES - 1]["lr"], rel=0.5)
    assert log[-1]["skipped_steps"] == 0


def test_without_sgd_the_backbone_follows_the_other_groups(pretrain: Pretrain, data: Path, tmp_path: Path) -> None:
    pretrain(soho_toy(data, train__backbone=None), tmp_path / "run")
    log = rows(tmp_path / "run")
    assert [row["lr_backbone"] for row in log] == [0.0] * WAKES + [row["lr"] for row in log[WAKES:]]
    assert saved_moments(tmp_path / "run", 10)["backbone_decay"]["step"].item() == 10 - WAKES


def test_a_system_without_backbone_logs_no_rate_for_it(pretrain: Pretrain, recipe: Recipe, tmp_path: Path) -> None:
    assert "lr_backbone" not in pretrain(recipe, tmp_path / "run", stop_after=1).metrics


@pytest.mark.parametrize("world", [1, 2])
def test_resume_across_the_waking_is_exact(tmp_path: Path, world: int) -> None:
    """Cut while the backbone rests, at the step where it wakes, and after it."""
    data, cuts = write_data(tmp_path / "data"), (WAKES - 1, WAKES, WAKES + 1)
    changes = {
        **SOHO,
        "train": {**soho_toy(data).train.model_dump(mode="json"), "micro_batch": 8 // world // 2},
        "checkpoint": {"every": 100},
    }
    runs = [{"out": str(tmp_path / "straight"), "recipe": changes}]
    for cut in cuts:
        out = str(tmp_path / f"cut{cut}")
        runs += [{"out": out, "recipe": changes, "stop_after": cut}, {"out": out, "recipe": changes, "resume": "auto"}]
    results = run_ranks(TOY, {"data": str(data), "runs": runs}, world)
    assert [code for code, _ in results] == [0] * world, results
    straight, final = tmp_path / "straight", weights(tmp_path / "straight", 10)
    for cut in cuts:
        parts = tmp_path / f"cut{cut}"
        assert rows(parts) == rows(straight)
        assert all(torch.equal(value, final[name]) for name, value in weights(parts, 10).items())
        for rank in range(world):
            ours, theirs = saved_moments(parts, 10, rank), saved_moments(straight, 10, rank)
            for name, state in ours.items():
                assert all(torch.equal(value, theirs[name][key]) for key, value in state.items()), (cut, name)
    assert saved_moments(straight, 10)["backbone_decay"]["step"].item() == 10 - WAKES
