"""Grad-CAM against recordings of ALBEF's release: attention, its gradients and the maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.recordings import Case, cases, config_of
from tests.parity.test_albef import build
from vlscale.data.sample import Batch
from vlscale.interop.albef import our_names
from vlscale.nn.attention import recorded_attention
from vlscale.systems.albef import Albef
from vlscale.systems.gradcam import contrast_gradcam, gradcam


class Replay:
    """The recorded pairs and the retrieval model they were looked at with."""

    def __init__(self, path: Path) -> None:
        self.case = case = Case(path)
        self.sizes = config_of(path.parent)
        self.system = build(self.sizes, alpha=0.4).eval()
        load_retrieval_weights(self.system, case.weights(), self.sizes["fusion_layer"])
        ids = case["in.input_ids"]
        self.batch = Batch(case["in.image"], ids, case["in.attention_mask"], torch.arange(len(ids)))
        self.fusion_layer = int(case.metadata["itm_block"]) - self.sizes["fusion_layer"]
        self.vision_layer = int(case.metadata["itc_block"])


def load_retrieval_weights(system: Albef, weights: dict[str, Tensor], text_layers: int) -> None:
    """The student alone; a retrieval model has no `bert.` in its names and no MLM head."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key in {"idx_queue", "queue_ptr", "image_queue", "text_queue"} or key.split(".")[0].endswith("_m"):
            continue
        for name in our_names(key.replace("text_encoder.", "text_encoder.bert.", 1), text_layers):
            found[name] = value
    result = system.load_state_dict(found, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("mlm_head.") for name in result.missing_keys)


@pytest.fixture(scope="module", params=cases("albef", "case_gradcam*.safetensors"))
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(request.param)


def test_cross_attention_and_its_gradient(replay: Replay) -> None:
    case, system, batch = replay.case, replay.system, replay.batch
    module = system.word_attention()[replay.fusion_layer]
    with recorded_attention({"words": module}) as found:
        logits = system.match_logits(system.fuse(system.encode_text(batch), system.encode_image(batch)))
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), [found["words"]])
    case.check("itm_logits", logits)
    case.check("itm_attention", found["words"])
    case.check("itm_attention_grad", gradient)


def test_self_attention_and_its_gradient(replay: Replay) -> None:
    case, system, batch = replay.case, replay.system, replay.batch
    with recorded_attention({"cls": system.cls_attention()[replay.vision_layer]}) as found:
        similarity = system.similarity(system.encode_image(batch), system.encode_text(batch))
        assert similarity is not None
        (gradient,) = torch.autograd.grad(similarity.trace(), [found["cls"]])
    case.check("itc_sim", similarity)
    case.check("itc_attention", found["cls"])
    case.check("itc_attention_grad", gradient)


def test_maps_of_the_match(replay: Replay) -> None:
    found = gradcam(replay.system, replay.batch, layer=replay.fusion_layer)
    replay.case.check("itm_logits", found.match_logits)
    replay.case.check("itm_gradcam", found.whole())


def test_maps_of_the_contrast(replay: Replay) -> None:
    found = contrast_gradcam(replay.system, replay.batch, layer=replay.vision_layer)
    replay.case.check("itc_gradcam", found.maps)
    assert torch.equal(found.similarity.argsort(), replay.case["out.itc_sim"].diagonal().argsort())


def test_the_defaults_are_the_releases(replay: Replay) -> None:
    """The last block of the image encoder; of six fusion layers the third, which BERT counts as layer 8."""
    system, batch = replay.system, replay.batch
    assert replay.vision_layer == replay.sizes["vision_depth"] - 1
    assert torch.equal(contrast_gradcam(system, batch).maps, contrast_gradcam(system, batch, replay.vision_layer).maps)
