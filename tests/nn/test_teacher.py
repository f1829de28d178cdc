"""The moving averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlscale.nn.teacher import Teacher


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def disturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data += torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def test_update_against_the_formula() -> None:
    module = student()
    teacher = Teacher({"net": module}, momentum=0.9)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for seed in (1, 2):
        disturb(module, seed)
        teacher.update()
        now = module.state_dict()
        for name, _ in module.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * now[name]
        for name, _ in module.named_buffers():
            expected[name] = now[name].clone()
    for name, value in teacher.state().items():
        assert torch.allclose(value, expected[name.removeprefix("net.")], atol=1e-6), name


def test_copies_are_frozen_fp32_and_without_dropout() -> None:
    teacher = Teacher({"net": student().train()}, momentum=0.9)
    copy = teacher["net"]
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    inputs = torch.randn(5, 3)
    assert torch.equal(copy(inputs), copy(inputs))


def test_a_half_precision_student_has_an_fp32_teacher_that_moves() -> None:
    module = nn.Linear(3, 4).bfloat16()
    teacher = Teacher({"net": module}, momentum=0.999)
    before = teacher["net"].weight.clone()
    module.weight.data += 1
    teacher.update()
    assert teacher["net"].weight.dtype == torch.float32
    assert torch.allclose(teacher["net"].weight - before, torch.full((4, 3), 0.001), atol=1e-5)  # bf16 would lose it


def test_state_goes_round_and_is_strict() -> None:
    module = student()
    teacher = Teacher({"net": module}, momentum=0.9)
    disturb(module, 3)
    teacher.update()
    state = {name: value.clone() for name, value in teacher.state().items()}
    other = Teacher({"net": student()}, momentum=0.9)
    other.load_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    with pytest.raises(KeyError, match=r"net\.0\.bias"):
        other.load_state({name: value for name, value in state.items() if name != "net.0.bias"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state(state | {"net.0.bias": torch.zeros(9)})
    other.copy_students()
    assert not torch.equal(other["net"][0].weight, state["net.0.weight"])
