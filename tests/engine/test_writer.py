from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state

from tests.engine.toy import ToySystem
from vlscale.config import Train
from vlscale.data.sample import Vocabulary
from vlscale.engine.build import build_engine, choose, complete
from vlscale.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from vlscale.engine.schedule import batch_plan
from vlscale.engine.writer import EngineWriter, PlainWriter

ROWS = torch.tensor([True, False, True, False, False, False])
VOCABULARY = Vocabulary(20, 0, 1, 2, 3)


@pytest.fixture
def built(group: None) -> tuple[Any, ToySystem]:
    train = Train(global_batch=4, weight_decay=0.1)
    choice = choose("zero2_cpu")
    system = ToySystem(VOCABULARY)
    return build_engine(system, complete(choice, batch_plan(train, 1), train), choice, train), system


def step(engine: Any, system: ToySystem, rate: float) -> None:
    set_learning_rate(engine.optimizer, rate)
    loss = engine(_batch(), _progress()).losses["itm"] + system.image.weight.square().sum()
    engine.backward(loss)
    engine.step()


def _batch() -> Any:
    from vlscale.data.sample import Batch

    ids = torch.arange(12).view(4, 3)
    return Batch(torch.rand(4, 3, 8, 8), ids, torch.ones_like(ids), torch.arange(4))


def _progress() -> Any:
    from vlscale.systems.protocol import Progress

    return Progress(0, 10, 5.0, torch.Generator().manual_seed(0))


def test_a_written_value_survives_a_step_at_rate_zero(built: tuple[Any, ToySystem]) -> None:
    engine, system = built
    step(engine, system, 1e-2)
    value = torch.full((6, 16), 3.0)
    EngineWriter().write(system.codes, value)
    assert torch.equal(system.codes, value)
    step(engine, system, 0.0)
    assert torch.equal(system.codes, value)
    assert torch.equal(EngineWriter().read(system.codes), value)


def test_a_plain_copy_would_not_survive(built: tuple[Any, ToySystem]) -> None:
    """The trap that the writer is there for."""
    engine, system = built
    step(engine, system, 1e-2)
    system.codes.data.fill_(3.0)
    step(engine, system, 0.0)
    assert not torch.equal(system.codes, torch.full((6, 16), 3.0))


def test_scalars_are_read_and_written(built: tuple[Any, ToySystem]) -> None:
    engine, system = built
    step(engine, system, 1e-2)
    writer = EngineWriter()
    writer.write(system.temperature, writer.read(system.temperature).clamp(max=0.25))
    step(engine, system, 0.0)
    assert system.temperature.shape == ()
    assert system.temperature.item() == 0.25


def test_moments_of_the_rows_alone_are_zeroed(built: tuple[Any, ToySystem]) -> None:
    engine, system = built
    system.codes.data.mul_(3)
    for _ in range(3):
        step(engine, system, 1e-2)
    before = {key: safe_get_full_optimizer_state(system.codes, key).clone() for key in ("exp_avg", "exp_avg_sq")}
    image = safe_get_full_optimizer_state(system.image.weight, "exp_avg").clone()
    EngineWriter().reset_moments(system.codes, ROWS)
    for key, old in before.items():
        new = safe_get_full_optimizer_state(system.codes, key)
        assert not new[ROWS].any()
        assert torch.equal(new[~ROWS], old[~ROWS])
        assert old.any()
    assert torch.equal(safe_get_full_optimizer_state(system.image.weight, "exp_avg"), image)


def test_frozen_parameters_are_read_as_they_are(group: None) -> None:
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert torch.equal(EngineWriter().read(parameter), torch.ones(2))


def test_plain_writer_does_the_same_without_an_engine() -> None:
    system = ToySystem(VOCABULARY)
    optimizer = build_optimizer(system, Train())
    system.codes.square().sum().backward()
    optimizer.step()
    writer = PlainWriter(optimizer)
    writer.write(system.codes, torch.zeros(6, 16))
    writer.reset_moments(system.codes, ROWS)
    assert not writer.read(system.codes).any()
    moments = optimizer.state[system.codes]["exp_avg"]
    assert not moments[ROWS].any()
    assert moments[~ROWS].all()
    PlainWriter().reset_moments(system.codes, ROWS)


def test_biases_norms_positions_temperature_and_codes_do_not_decay(tmp_path: Path) -> None:
    system = ToySystem(VOCABULARY)
    system.position_embeddings = torch.nn.Embedding(4, 4)
    groups = {group["name"]: group for group in parameter_groups(system, Train(weight_decay=0.1))}
    names = {parameter: name for name, parameter in system.named_parameters()}
    spared = {names[parameter] for parameter in groups["no_decay"]["params"]}
    assert spared == {
        "codes",
        "temperature",
        "image.bias",
        "norm.weight",
        "norm.bias",
        "late.bias",
        "position_embeddings.weight",
    }
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert groups["decay"]["weight_decay"] == 0.1
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
