import math
from typing import Any

import pytest

from vlscale.config import Sgd, Train, parse_recipe
from vlscale.engine.schedule import batch_plan, draw_seed, learning_rate, total_steps
from vlscale.errors import UserError


def test_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    train = Train(lr=1.0, warmup_lr=0.2, min_lr=0.1, warmup_steps=4)
    assert learning_rate(train, 0, 12, 3.0) == 0.2
    assert learning_rate(train, 2, 12, 3.0) == pytest.approx(0.6)
    assert learning_rate(train, 4, 12, 3.0) == 1.0
    assert learning_rate(train, 8, 12, 3.0) == pytest.approx(0.55)
    assert learning_rate(train, 12, 12, 3.0) == pytest.approx(0.1)
    assert learning_rate(train, 6, 12, 3.0) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_warmup_may_outlast_the_run_and_be_absent() -> None:
    assert learning_rate(Train(lr=1.0, warmup_lr=0.0, warmup_steps=100), 50, 10, 5.0) == 0.5
    assert learning_rate(Train(lr=1.0, warmup_steps=0), 0, 10, 5.0) == 1.0


def test_milestones_divide_the_rate_by_ten_from_their_step_on() -> None:
    """Epochs of 10.4 steps: 2 epochs are passed at step 21, 2.5 at step 26."""
    sgd = Sgd(lr=1.0, warmup_lr=0.5, warmup_steps=4, schedule="steps", milestones=(2, 2.5))
    rates = [learning_rate(sgd, step, 40, 10.4) for step in range(40)]
    assert rates[:4] == [0.5, 0.625, 0.75, 0.875]
    assert set(rates[4:21]) == {1.0}
    assert set(rates[21:26]) == {0.1}
    assert set(rates[26:]) == {0.01}


def test_a_warm_up_that_outlasts_a_milestone_falls_to_the_lower_rate() -> None:
    rate = Train(lr=1.0, warmup_lr=0.0, warmup_steps=10, schedule="steps", milestones=(0.5,))
    assert learning_rate(rate, 9, 40, 10.0) == 0.9
    assert learning_rate(rate, 10, 40, 10.0) == 0.1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"schedule": "steps"}, r"milestones: `schedule: steps` needs the epochs"),
        ({"milestones": [25, 35]}, r"milestones: `schedule: cosine` does not read them"),
        ({"backbone": {"schedule": "steps"}}, r"train.backbone.*needs the epochs"),
    ],
)
def test_milestones_and_steps_come_together(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_recipe({"name": "x", "system": {"name": "soho"}, "train": keys}, "x.yaml")


def test_max_steps_win_over_epochs() -> None:
    assert total_steps(Train(epochs=2, max_steps=None), 12.5) == 25
    assert total_steps(Train(epochs=2, max_steps=7), 12.5) == 7
    assert total_steps(Train(epochs=0.01), 12.5) == 1
    with pytest.raises(UserError, match="max_steps or epochs"):
        total_steps(Train(epochs=None), 12.5)


def test_the_global_batch_is_split_over_ranks_and_passes() -> None:
    assert batch_plan(Train(global_batch=64), 2).micro_batch == 32
    plan = batch_plan(Train(global_batch=64, micro_batch=8), 2)
    assert (plan.accumulation, plan.micro_batch * plan.world * plan.accumulation) == (4, 64)
    assert str(plan) == "64 images per step = 8 per rank and pass × 2 ranks × 4 accumulated"


def test_an_indivisible_batch_prints_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"100 is not a multiple of micro_batch × ranks = 16 × 2 = 32"):
        batch_plan(Train(global_batch=100, micro_batch=16), 2)
    with pytest.raises(UserError, match=r"100 over 3 ranks leaves 1 images: take a multiple of 3, such as 99"):
        batch_plan(Train(global_batch=100), 3)


def test_seeds_depend_on_every_key_and_on_nothing_else() -> None:
    keys = [
        (seed, step, micro, rank) for seed in range(3) for step in range(5) for micro in range(3) for rank in (0, 1)
    ]
    seeds = {draw_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(1, 23) != draw_seed(12, 3)
    assert draw_seed("dropout", 0, 0) == 8691682053986981599
