"""Learning rates that a task asks for: the head's, and those of deeper layers."""

from __future__ import annotations

import pytest
import torch

from tests.systems.tuned_fixtures import tuned
from vlscale.config import Sgd, Train
from vlscale.config.tasks import EntailmentTask, RetrievalTask
from vlscale.engine.mixed import MixedOptimizer
from vlscale.engine.optim import build_optimizer, parameter_groups, rate_factors, set_learning_rate


def test_without_a_task_or_its_factors_groups_are_as_ever() -> None:
    """Names and order of the groups stand in checkpoints."""
    system = tuned("soho", "snli-ve")
    expected = ["decay", "no_decay", "backbone_decay", "backbone_no_decay"]
    for task in (None, EntailmentTask()):
        groups = parameter_groups(system, Train(), task)
        assert [group["name"] for group in groups] == expected
        assert not any("scale" in group for group in groups)
    inner = parameter_groups(system.system, Train(), RetrievalTask())
    assert [group["name"] for group in inner] == expected


def test_heads_learn_faster_and_keep_their_rule() -> None:
    system = tuned("soho", "snli-ve")
    task = EntailmentTask(head_lr=10.0)
    optimizer = build_optimizer(system, Train(weight_decay=0.1, backbone=Sgd()), task)
    assert isinstance(optimizer, MixedOptimizer)
    set_learning_rate(optimizer, 1e-3, 1e-2)
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = ["decay_x10", "decay", "no_decay_x10", "no_decay", "backbone_decay", "backbone_no_decay"]
    assert list(groups) == names
    rates = [1e-2, 1e-3, 1e-2, 1e-3, 1e-2, 1e-2]
    assert [group["lr"] for group in groups.values()] == pytest.approx(rates)
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.1, 0.0, 0.0, 5e-4, 0.0]
    assert [group["kind"] for group in groups.values()] == ["adamw"] * 4 + ["sgd"] * 2
    heads = {id(parameter) for parameter in system.head.parameters()}
    assert {id(parameter) for name in ("decay_x10", "no_decay_x10") for parameter in groups[name]["params"]} == heads


def test_rates_fall_layer_by_layer_downwards() -> None:
    task = EntailmentTask(layer_decay=0.5, head_lr=3.0)
    names = [name for name, _ in tuned("cb_vila", "snli-ve").named_parameters()]
    factors = rate_factors(names, task)
    expected = {
        "system.vision.vit.pos_embed": 0.25,
        "system.vision.vit.patch_embed.proj.weight": 0.25,
        "system.vision.vit.blocks.0.attn.qkv.weight": 0.5,
        "system.vision.vit.blocks.1.attn.qkv.weight": 1.0,
        "system.vision.vit.norm.weight": 1.0,
        "system.text_encoder.embeddings.word_embeddings.weight": 0.25,
        "system.text_encoder.layer.0.output.dense.bias": 0.5,
        "system.text_encoder.final_norm.weight": 1.0,
        "system.fusion_encoder.layer.1.output.dense.bias": 1.0,
        "system.itm_head.weight": 1.0,
        "head.classifier.layers.0.weight": 3.0,
    }
    assert {name: factors[name] for name in expected} == expected
    bare = rate_factors([name.removeprefix("system.") for name in names], RetrievalTask(layer_decay=0.5))
    assert bare["text_encoder.layer.0.output.dense.bias"] == 0.5
    assert bare["itm_head.weight"] == 1.0


def test_embeddings_below_several_stacks_come_below_the_first() -> None:
    names = [name for name, _ in tuned("mvptr", "snli-ve").named_parameters()]
    factors = rate_factors(names, EntailmentTask(layer_decay=0.5))
    assert factors["system.encoder.embeddings.word_embeddings.weight"] == 0.125
    assert factors["system.encoder.visual.layer.0.output.dense.weight"] == 0.25
    assert factors["system.encoder.pooler.weight"] == 1.0
    decoder = [name for name, _ in tuned("albef", "generate").named_parameters() if name.startswith("head.")]
    own = rate_factors(["system.vision.vit.blocks.0.a", *decoder], EntailmentTask(layer_decay=0.5, head_lr=2.0))
    assert own["head.decoder.embeddings.word_embeddings.weight"] == 0.5
    assert own["head.decoder.layer.0.output.dense.weight"] == 1.0
    assert own["head.decoder.mlm_head.bias"] == 2.0


def test_every_trainable_parameter_is_in_one_group() -> None:
    system = tuned("albef", "paired")
    groups = parameter_groups(system, Train(), EntailmentTask(layer_decay=0.7, head_lr=5.0))
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in system.parameters() if parameter.requires_grad}
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(group["lr"] == pytest.approx(1e-5 * group.get("scale", 1.0)) for group in groups)
    torch.optim.AdamW(groups)
