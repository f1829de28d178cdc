"""Against the recorded evaluation of ALBEF's release: both score matrices and its recalls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.recordings import Case, cases, config_of
from tests.parity.test_albef import build
from vlscale.config import Data
from vlscale.data.sample import Batch
from vlscale.interop.albef import our_names
from vlscale.systems.albef import Albef
from vlscale.tasks import stages
from vlscale.tasks.features import ImageStore, Precision, TextStore
from vlscale.tasks.recall import ranks, recall_at, recalls

FP32 = Precision(torch.device("cpu"), torch.float32)
RECORDED = cases("albef", "case_retrieval_eval*.safetensors")


@pytest.mark.parametrize("path", RECORDED)
def test_recalls(path: Path) -> None:
    """Equal to the release's wherever no tie decides; with ties ours is the lower end of what sorting may give."""
    case = Case(path)
    image_of_text = case["in.txt2img"]
    relevant = image_of_text == torch.arange(len(case["out.score_matrix_i2t"]))[:, None]
    for matrix, right, theirs in (("i2t", relevant, "txt"), ("t2i", relevant.T, "img")):
        scores = case[f"out.score_matrix_{matrix}"]
        lowest = recalls(scores, right)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        highest = recall_at(((scores > best) & ~right).sum(1))
        assert torch.equal(ranks(scores, right) >= ((scores > best) & ~right).sum(1), torch.ones(len(scores)).bool())
        for k in (1, 5, 10):
            recorded = case[f"out.metric.{theirs}_r{k}"].item()
            assert lowest[f"r{k}"] - 1e-9 <= recorded <= highest[f"r{k}"] + 1e-9
            if lowest[f"r{k}"] == highest[f"r{k}"]:
                assert lowest[f"r{k}"] == pytest.approx(recorded)


@pytest.mark.parametrize("path", RECORDED)
def test_score_matrices(path: Path) -> None:
    """First stage, candidates and ITM logits of the recorded weights, through the same code as `vlscale eval`."""
    case = Case(path)
    system = load_finetuned(case, build(config_of(path.parent), alpha=0.0)).eval()
    images, texts = stores(system, case)
    image_of_text, k = case["in.txt2img"], int(case.metadata["k_test"])
    with torch.inference_mode():
        directions = stages.first_stage(system, images, texts, image_of_text, k, FP32)
    assert directions is not None
    pairs = stages.score_pairs(system, images, texts, directions, FP32, ([], Data(), None, 4), lambda *_: None)
    for name, direction, transposed in (("t2i", directions[0], True), ("i2t", directions[1], False)):
        candidates = direction.candidates[:, :k]
        matrix = torch.full(case[f"out.score_matrix_{name}"].shape, -100.0)
        matrix.scatter_(1, candidates, pairs.of(*direction.pairs())[..., 1])
        case.check(f"score_matrix_{name}", matrix)
        sims = case["out.coarse_sims"].T if transposed else case["out.coarse_sims"]
        ours = direction.similarity[:, :k] * system.temperature.item()
        assert torch.allclose(ours, sims.gather(1, candidates), atol=1e-5)


def load_finetuned(case: Case, system: Albef) -> Albef:
    """The recorded retrieval weights: the student alone, named without `bert.`, and without an MLM head."""
    layers = len(system.text_encoder.layer)
    found: dict[str, Tensor] = {}
    for key, value in case.weights().items():
        part = key.split(".")[0]
        if part.endswith("_m") or "queue" in part:
            continue
        full = key.replace("text_encoder.", "text_encoder.bert.", 1) if part == "text_encoder" else key
        found |= dict.fromkeys(our_names(full, layers), value)
    missing, unknown = system.load_state_dict(found, strict=False)
    assert not unknown
    assert all(name.startswith("mlm_head.") for name in missing)
    return system


@torch.inference_mode()
def stores(system: Albef, case: Case) -> tuple[ImageStore, TextStore]:
    ids, mask = case["in.input_ids"], case["in.attention_mask"]
    pictures = case["in.image"]
    image = system.encode_image(Batch(pictures, ids, mask, torch.arange(len(pictures))))
    text = system.encode_text(Batch(pictures, ids, mask, torch.arange(len(ids))))
    length = mask.sum(1)
    kept = list(range(len(pictures)))
    return (
        ImageStore(image.pooled, image.tokens[image.mask.bool()], image.mask.sum(1), kept, skipped=[]),
        TextStore(text.pooled, text.tokens[mask.bool()], length.cumsum(0) - length, length),
    )
