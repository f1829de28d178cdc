"""ALBEF's fine-tuned checkpoints: a place for every entry, strictness, and what a task's parts start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.parity.recordings import Case, cases, config_of
from tests.parity.test_albef import build
from tests.parity.test_albef_downstream import TEACHERS, Parts
from vlscale.config import AlbefSystem, Text, Vision
from vlscale.config import Teacher as TeacherOptions
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.interop import albef
from vlscale.interop.albef_tasks import Kind, load_task_weights, our_names
from vlscale.nn.teacher import Teacher
from vlscale.nn.vision import resize_positions
from vlscale.systems.albef import Albef

CARRIED = ("image_queue.", "text_queue.", "id_queue.")


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("path", cases("albef", "keys_full.json"))
def test_full_size_checkpoint_has_a_place_for_every_key(path: Path, kind: Kind) -> None:
    """Names and shapes of the published models against the default configuration, without their weights."""
    published = json.loads(path.read_text(encoding="utf-8"))[kind]
    side = int((published["visual_encoder.pos_embed"][1] - 1) ** 0.5)
    with torch.device("meta"):
        config = AlbefSystem()
        parts = Parts(Albef(config, side * 16, Vocabulary(30522, 0, 101, 102, 103)), kind)
        taught = {name: getattr(parts, name) for name in TEACHERS.get(kind, ())}
        teacher = Teacher(taught, 0.995) if taught else None
    ours = {name: list(value.shape) for name, value in parts.state_dict().items()}
    if teacher is not None:
        ours |= {f"teacher.{name}": list(value.shape) for name, value in teacher.state().items()}
    found = {name: shape for key, shape in published.items() for name in our_names(key, kind, config.text.text_layers)}
    assert {name: shape for name, shape in found.items() if not name.startswith(CARRIED)} == ours
    assert any(name.startswith(CARRIED) for name in found) == (kind == "retrieval")


def started(kind: Kind) -> tuple[Albef, Parts]:
    """Random pre-trained weights of full depth and little width, and a task's parts started from them."""
    torch.manual_seed(0)
    vision = Vision(overrides={"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 8})
    text = Text(width=8, heads=2, intermediate=8, max_positions=8)
    config = AlbefSystem(vision=vision, text=text, embed_dim=4, teacher=TeacherOptions(queue_size=4))
    base = Albef(config, 16, Vocabulary(20, 0, 1, 2, 3))
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    parts: Any = Parts(base, kind)
    if kind == "vqa":
        not_copied = parts.decoder.start_from(base.fusion_encoder, base.text_encoder.embeddings, base.mlm_head)
        assert not_copied == []
    else:
        parts.paired_encoder.start_from(base.fusion_encoder)
    return base, parts


@pytest.mark.parametrize("kind", ["vqa", "nlvr_pretrain"])
@pytest.mark.parametrize("path", cases("albef", "extra_checkpoint_key_map.json"))
def test_parts_start_from_what_the_release_starts_them_from(path: Path, kind: Kind) -> None:
    base, parts = started(kind)
    given, own = base.state_dict(), parts.state_dict()
    starts = json.loads(path.read_text(encoding="utf-8"))[kind]["map"]
    compared = set()
    for target, source in starts.items():
        if "_m." in target or target.startswith("visual_encoder"):
            continue
        theirs = albef.our_names(source, base.config.text.text_layers)
        for name in our_names(target, kind, base.config.text.text_layers):
            assert torch.equal(own[name], given[theirs[0]]), target
            compared.add(name)
    fresh = {name for name in own.keys() - compared if not name.startswith("vision.")}
    assert fresh == ({"assignment_head.weight", "assignment_head.bias"} if kind == "nlvr_pretrain" else set())


@pytest.mark.parametrize("path", cases("albef", "weights_nlvr.safetensors"))
def test_loading_is_strict(path: Path) -> None:
    sizes, weights = config_of(path.parent), Case(path).tensors
    base = build(sizes, alpha=0.4)
    layers = sizes["fusion_layer"]
    second_key = f"text_encoder.encoder.layer.{layers + 1}.crossattention.self.key.weight"
    for wrong, message in (
        ({k: v for k, v in weights.items() if not k.startswith("cls_head.")}, "class_head.layers.0.bias"),
        (weights | {"ta_head.weight": torch.zeros(1)}, "assignment_head.weight"),
        (weights | {"cls_head.0.bias": torch.zeros(1)}, "class_head.layers.0.bias: expected"),
        (weights | {"answer.bias": torch.zeros(1)}, "answer.bias is no entry"),
        (weights | {second_key: torch.zeros_like(weights[second_key])}, "differs from its pair's"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            load_task_weights(Parts(base, "nlvr"), wrong, "nlvr", layers, base.grid)


@pytest.mark.parametrize("path", cases("albef", "weights_ve.safetensors"))
def test_position_tables_follow_the_resolution(path: Path) -> None:
    """The student's and the teacher's."""
    sizes, weights = config_of(path.parent), Case(path).tensors
    base = build(sizes | {"image_res": 2 * sizes["image_res"]}, alpha=0.4)
    parts = Parts(base, "ve")
    carried = load_task_weights(parts, weights, "ve", sizes["fusion_layer"], base.grid)
    for found, key in ((parts.vision.vit.pos_embed, "visual_encoder"), (carried, "visual_encoder_m")):
        table = found if isinstance(found, torch.Tensor) else found["teacher.vision.vit.pos_embed"]
        assert torch.equal(table, resize_positions(weights[f"{key}.pos_embed"], base.grid))
