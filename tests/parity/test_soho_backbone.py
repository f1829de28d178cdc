"""SOHO's backbone, joint transformer and answer head against recordings of the public release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from vlscale.config import Backbone, Joint
from vlscale.data.sample import Vocabulary
from vlscale.nn.cnn import CnnEncoder
from vlscale.nn.heads import AnswerHead
from vlscale.nn.joint import JointEncoder

FOLDER = REFERENCE / "soho"


def narrow_backbone(sizes: dict[str, Any], depth: int, weights: dict[str, Tensor]) -> CnnEncoder:
    """timm's ResNet with the recorded stem, which timm fixes at 64 channels, and the recorded weights."""
    stem, base = sizes["stem"], sizes["base"]
    net: Any = timm.create_model(
        f"resnet{depth}", num_classes=0, global_pool="", channels=tuple(base * 2**stage for stage in range(4))
    )
    first = net.layer1[0]
    net.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
    net.bn1 = nn.BatchNorm2d(stem)
    old = first.conv1
    first.conv1 = nn.Conv2d(stem, old.out_channels, old.kernel_size, padding=old.padding, bias=False)
    first.downsample = nn.Sequential(
        nn.Conv2d(stem, base * first.expansion, 1, bias=False), nn.BatchNorm2d(base * first.expansion)
    )
    net.load_state_dict(weights)
    return CnnEncoder(Backbone(frozen_stages=sizes["frozen_stages"]), net=net)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def watched(encoder: CnnEncoder) -> dict[str, Tensor]:
    """The maps of the recorded modules, filled by the forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(encoder.net, name).register_forward_hook(keep(name))
    return seen


@pytest.mark.parametrize("path", cases("soho", "case_backbone_other.safetensors"))
def test_backbone(path: Path) -> None:
    case, sizes = Case(path), config_of(FOLDER)
    encoder = narrow_backbone(sizes, sizes["backbone_other_depth"], case.weights()).train()
    seen = watched(encoder)
    features = encoder(case["in.img"])
    assert features.shape[1] == encoder.width
    features.square().mean().backward()
    for name, value in seen.items():
        case.check(name, value)
    state, gradients = encoder.net.state_dict(), dict(encoder.net.named_parameters())
    for name in case.names("after."):
        case.check(name, state[name.removeprefix("after.")])
    for name in case.names("grad."):
        gradient = gradients[name.removeprefix("grad.")].grad
        assert gradient is not None, name
        case.check(name, gradient)
    with torch.no_grad():
        case.check("layer4_eval_after_update", encoder.eval()(case["in.img"]))
    assert {f"out.{name}" for name in case.ratios} == {name for name in case.tensors if name.startswith("out.")}


@pytest.mark.parametrize("path", cases("soho", "case_pretrain.safetensors"))
def test_backbone_of_the_pretraining_step(path: Path) -> None:
    case, sizes = Case(path), config_of(FOLDER)
    weights = part(case.weights(), "backbone.")
    encoder = narrow_backbone(sizes, sizes["res_depth"], weights).train()
    case.check("backbone_feat", encoder(case["in.img"]))
    for name in case.names("after.backbone."):
        case.check(name, encoder.net.state_dict()[name.removeprefix("after.backbone.")])
    trained = {name for name, parameter in encoder.net.named_parameters() if parameter.requires_grad}
    order = sizes["grad_norms_all_order"]["pretrain"]
    assert trained == {name.removeprefix("backbone.") for name in order if name.startswith("backbone.")}


def recorded_joint(sizes: dict[str, Any], weights: dict[str, Tensor]) -> JointEncoder:
    config = Joint(
        width=sizes["hidden"],
        heads=sizes["heads"],
        intermediate=sizes["intermediate"],
        layers=sizes["layers"],
        max_positions=sizes["max_position"],
        dropout=sizes["dropout"],
    )
    encoder = JointEncoder(config, Vocabulary(size=sizes["vocab"], **sizes["special_ids"]))
    named = part(weights, "language.bert.")
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in named.items()})
    return encoder.eval()


@pytest.mark.parametrize("path", cases("soho", "case_pretrain.safetensors"))
def test_joint_transformer(path: Path) -> None:
    case, sizes = Case(path), config_of(FOLDER)
    encoder = recorded_joint(sizes, case.weights())
    words = encoder.embed(case["in.language_tokens"])
    case.check("text_embedding", words)
    states = torch.cat([words, case["out.visual_tokens"]], dim=1)
    mask = torch.cat([case["in.language_attention"], case["out.visual_mask"]], dim=1)
    assert (mask == 0).any()
    case.check("fusion_feature", encoder(states, mask))


@pytest.mark.parametrize("path", cases("soho", "case_vqa.safetensors"))
def test_answers(path: Path) -> None:
    case, sizes = Case(path), config_of(FOLDER)
    head = AnswerHead(sizes["hidden"], sizes["num_answers"], sizes["dropout"])
    head.layers.load_state_dict(part(case.weights(), "head.vqa."))
    case.check("logits", head(case["out.fusion_feature"][:, 0]))
