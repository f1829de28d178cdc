"""SOHO's pre-training step against a recording of the public release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from tests.parity.test_soho_backbone import narrow_backbone, part
from vlscale.config import Backbone, Dictionary, Joint, Mvm, Neck, SohoSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.interop.soho import load_soho_weights, our_name
from vlscale.systems.protocol import Choices, Progress
from vlscale.systems.soho import Soho

FOLDER = REFERENCE / "soho"
KINDS = {"SimpleVDforPre": "sum", "SimpleVDforPreGate": "gated"}


def recorded_system(sizes: dict[str, Any], weights: dict[str, Tensor], use_dictionary: bool = True) -> Soho:
    """The release's choices at the recorded sizes; random weights but for the backbone."""
    base = sizes["base"]
    config = SohoSystem(
        backbone=Backbone(
            model=f"resnet{sizes['res_depth']}",
            overrides={"channels": [base, 2 * base, 4 * base, 8 * base]},
            frozen_stages=sizes["frozen_stages"],
        ),
        neck=Neck(kind=KINDS[sizes["neck"]] if use_dictionary else "sum", repeat=True),  # type: ignore[arg-type]
        dictionary=Dictionary(use=use_dictionary, size=sizes["num_tokens"], update="release", decay=sizes["decay"]),
        mvm=Mvm(masking="cell", probability=sizes["mask_prob"], head="cosine", pairs="all"),
        text=Joint(
            width=sizes["hidden"],
            heads=sizes["heads"],
            intermediate=sizes["intermediate"],
            layers=sizes["layers"],
            max_positions=sizes["max_position"],
            dropout=sizes["dropout"],
        ),
    )
    system = Soho(config, sizes["pad"], Vocabulary(sizes["vocab"], *sizes["special_ids"].values()))
    system.backbone = narrow_backbone(sizes, sizes["res_depth"], part(weights, "backbone."))
    return system.train()


def batch_of(case: Case) -> Batch:
    images = case["in.img"]
    return Batch(
        images,
        case["in.language_tokens"],
        case["in.language_attention"],
        torch.arange(len(images)),
        image_sizes=case["in.img_shape"][:, :2],
        matched=case["in.next_label"] if "in.next_label" in case.tensors else None,
    )


@pytest.mark.parametrize("path", cases("soho", "case_pretrain.safetensors"))
def test_pretraining_step(path: Path) -> None:
    case, sizes = Case(path), config_of(FOLDER)
    weights = case.weights()
    system = recorded_system(sizes, weights)
    load_soho_weights(system, weights)
    choices = Choices(masked_input_ids=case["in.language_tokens"], mlm_labels=case["in.mask_labels"])
    choices.extra = {"mvm_position": case["choice.np_randint"], "mvm_coins": case["choice.bernoulli"].flatten()}
    seen = watch(system)
    output = system(batch_of(case), Progress(0, 100, 10.0, torch.Generator().manual_seed(0)), choices)

    losses = output.losses
    case.check("losses.loss_mlm", losses["mlm"])
    case.check("losses.loss_mvm", losses["mvm"])
    torch.testing.assert_close(losses["itm"], case["out.losses.loss_match"].mean())
    total = torch.stack([losses["mlm"], losses["mvm"], losses["itm"]]).sum()
    case.check("loss_total", total)
    for name, metric in (("acc_l", "mlm_accuracy"), ("acc_v", "mvm_accuracy"), ("acc_match", "itm_accuracy")):
        assert float(output.metrics[metric]) * 100 == pytest.approx(float(case[f"out.losses.{name}"]), abs=1e-4)
    case.check("backbone_feat", seen["backbone"])
    case.check("text_embedding", seen["text"])
    case.check("fusion_feature", seen["fused"])
    case.check("itm_logits", system.match_logits(seen["fused"]))
    case.check("mlm_logits", system.word_logits(seen["fused"][:, : case["in.language_tokens"].shape[1]].flatten(0, 1)))

    total.backward()
    parameters = dict(system.named_parameters())
    for name in case.names("grad."):
        gradient = parameters[str(our_name(name.removeprefix("grad.")))].grad
        assert gradient is not None, name
        case.check(name, gradient.view(case[f"out.{name}"].shape))
    norms = []
    for key in sizes["grad_norms_all_order"]["pretrain"]:
        gradient = parameters[str(our_name(key))].grad
        assert gradient is not None, key
        norms.append(gradient.double().norm())
    case.check("grad_norms_all", torch.stack(norms))
    state = system.state_dict()
    for name in case.names("after."):
        case.check(name, state[str(our_name(name.removeprefix("after.")))])


def watch(system: Soho) -> dict[str, Tensor]:
    """What the parts gave in the last forward."""
    seen: dict[str, Tensor] = {}
    system.backbone.register_forward_hook(lambda _m, _i, output: seen.__setitem__("backbone", output))
    system.joint.embeddings.register_forward_hook(lambda _m, _i, output: seen.__setitem__("text", output))
    system.joint.register_forward_hook(lambda _m, _i, output: seen.__setitem__("fused", output))
    return seen


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}; set VLSCALE_REFERENCE")
def test_every_published_name_has_a_place() -> None:
    """The full-size models' entries, heads of tasks aside."""
    for model, entries in json.loads((FOLDER / "keys_full.json").read_text(encoding="utf-8")).items():
        if model.startswith("pretrain"):
            names = [our_name(key) for key in entries]
            stored = [name for name in names if name is not None]
            assert len(stored) == len(set(stored)), model
