"""SOHO's VQA model against a recording of the public release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.parity.recordings import Case, cases, config_of
from tests.parity.test_soho import batch_of, recorded_system
from vlscale.config import Backbone, Dictionary, Joint, Neck, SohoSystem
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.interop.soho import load_soho_vqa, our_name
from vlscale.nn.heads import AnswerHead
from vlscale.objectives import answers
from vlscale.systems.soho import Soho


@pytest.mark.parametrize("path", cases("soho", "case_vqa.safetensors"))
def test_answers_as_classes(path: Path) -> None:
    """Without a dictionary the features are the tokens; the answer is read off the first word."""
    case, sizes = Case(path), config_of(path.parent)
    weights = case.weights()
    system = recorded_system(sizes, weights, use_dictionary=False)
    head = AnswerHead(sizes["hidden"], sizes["num_answers"], dropout=0.0)
    load_soho_vqa(system, head, weights)
    batch, labels = batch_of(case), case["in.vqa_labels"]
    image = system.encode_image(batch)
    case.check("visual_tokens", image.tokens)
    mask = torch.cat([batch.attention_mask, image.mask], dim=1)
    case.check("fusion_feature", system.joint(torch.cat([system.joint.embed(batch.input_ids), image.tokens], 1), mask))
    logits = head(system.fuse(system.encode_text(batch), image)[:, 0])
    case.check("logits", logits)
    case.check("score", answers.soft_scores_won(logits, labels))
    loss = answers.soft_score_loss(logits, labels)
    case.check("loss", loss)
    case.check("loss_total", loss)
    loss.backward()
    parameters = {f"answer_head.{name}": value for name, value in head.named_parameters()}
    for name in case.names("grad."):
        gradient = parameters[str(our_name(name.removeprefix("grad.")))].grad
        assert gradient is not None, name
        case.check(name, gradient)


@pytest.mark.parametrize("path", cases("soho", "weights_vqa.safetensors"))
def test_loading_is_strict_and_keeps_what_vqa_does_not_train(path: Path) -> None:
    sizes, weights = config_of(path.parent), Case(path).tensors
    system = recorded_system(sizes, weights, use_dictionary=False)
    head = AnswerHead(sizes["hidden"], sizes["num_answers"])
    untrained = system.itm_head.weight.detach().clone()
    load_soho_vqa(system, head, weights)
    assert torch.equal(system.itm_head.weight, untrained)
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != "head.vqa.3.bias"}, "answer_head.layers.3.bias is missing"),
        (weights | {"head.match_class.weight": torch.zeros(2, 1)}, "itm_head.weight has no place"),
        (weights | {"head.vqa.3.bias": torch.zeros(1)}, "answer_head.layers.3.bias: expected"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            load_soho_vqa(system, head, wrong)


@pytest.mark.parametrize("path", cases("soho", "keys_full.json"))
def test_full_size_checkpoint_has_a_place_for_every_key(path: Path) -> None:
    """Names and shapes of the published VQA models against systems of their size, without their weights."""
    published = json.loads(path.read_text(encoding="utf-8"))
    for model, layers in {"resnet18": 3, "resnet101": 12}.items():
        entries = published[f"vqa_{model.replace('net', '')}"]
        config = SohoSystem(
            backbone=Backbone(model=model),
            neck=Neck(kind="sum"),
            dictionary=Dictionary(use=False),
            text=Joint(layers=layers),
        )
        with torch.device("meta"):
            system = Soho(config, 640, Vocabulary(30522, 0, 101, 102, 103))
            head = AnswerHead(config.text.width, entries["head.vqa.3.weight"][0])
        ours = system.state_dict() | {f"answer_head.{name}": value for name, value in head.state_dict().items()}
        found = {name: shape for key, shape in entries.items() if (name := our_name(key)) is not None}
        assert found.keys() == {name for name in ours if not name.startswith(("itm_head.", "neck.mask_embed"))}, model
        assert all(list(ours[name].shape) == shape for name, shape in found.items()), model
