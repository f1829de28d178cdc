"""SOHO's neck, visual dictionary and masked visual modelling against recordings of the public release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.recordings import Case, cases, config_of
from vlscale.codebooks.dictionary import VisualDictionary
from vlscale.codebooks.neck import VisualNeck, valid_cells
from vlscale.config import Dictionary, Neck
from vlscale.nn.sine import sine_positions
from vlscale.objectives import visual_masking

KINDS = {"SimpleVDforPreGate": "gated", "SimpleVDforPre": "sum"}
DICTIONARY_NAMES = {
    "embed": "codes",
    "cluster_size": "moving_counts",
    "cluster_sum": "total_counts",
    "embed_avg": "moving_sums",
}
NECK_NAMES = {
    "conv.conv": "conv",
    "conv.bn": "norm",
    "gate_fc.conv": "gate",
    "gate_fc.bn": "gate_norm",
    "pos_line": "code_proj",
    "ln": "out_norm",
}


def neck_weights(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A recorded neck's weights under our names."""
    weights = {}
    for key, value in recorded.items():
        owner, leaf = key.rsplit(".", 1)
        if owner == "vq":
            weights[f"dictionary.{DICTIONARY_NAMES[leaf]}"] = value
        elif owner == "mask_emb":
            weights["mask_embed"] = value[0]
        else:
            weights[f"{NECK_NAMES[owner]}.{leaf}"] = value
    return weights


def options(sizes: dict[str, Any]) -> Dictionary:
    return Dictionary(size=sizes["num_tokens"], update="release", decay=sizes["decay"])


class Replay:
    """A recorded training forward of a neck, with masking and backward, run again."""

    def __init__(self, path: Path) -> None:
        self.case = case = Case(path)
        sizes = config_of(path.parent)
        kind = KINDS[sizes[case.metadata["kind"]]]
        self.neck = neck = VisualNeck(
            Neck(kind=kind), options(sizes), sizes["neck_in_channels"], sizes["hidden"]
        ).train()
        neck.load_state_dict(neck_weights(case.weights()))
        self.feat = case["in.feat"].clone().requires_grad_()
        self.valid = self._valid()
        self.seen: dict[str, Tensor] = {}
        for name in ("norm", "code_proj", "gate_norm", "dictionary"):
            if hasattr(neck, name):
                getattr(neck, name).register_forward_hook(self._keep(name))
        self.states = neck(self.feat, self.valid)
        assert self.states.indices is not None
        self.masked = visual_masking.mask_cell(
            self.states.indices,
            self.valid.flatten(1),
            sizes["mask_prob"],
            position=case["choice.np_randint"],
            coins=case["choice.bernoulli"].flatten(),
        )
        self.tokens = neck.tokens(self.states.embeds, self.valid, self.masked.mask)
        (self.tokens * case["in.w"]).sum().backward()

    def _valid(self) -> Tensor:
        shapes, pads = self.case["in.img_shape"], self.case["in.pad_shape"]
        canvas = (int(pads[:, 0].max()), int(pads[:, 1].max()))
        grid = tuple(side // 2 for side in self.feat.shape[2:])
        valid = valid_cells(shapes[:, :2], canvas, grid, True, len(shapes), self.feat.device)  # type: ignore[arg-type]
        return valid.repeat_interleave(len(self.feat) // len(shapes), 0)

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return hook


@pytest.fixture(scope="module", params=cases("soho", "case_neck_*.safetensors"))
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(request.param)


def test_cells_and_codes(replay: Replay) -> None:
    case, width = replay.case, replay.neck.width
    case.check("visual_mask", replay.valid.flatten(1))
    case.check("conv_out", replay.seen["norm"])
    case.check("indices", replay.states.indices)  # type: ignore[arg-type]
    case.check("quantized", replay.seen["dictionary"].flatten(0, 1))
    case.check("pos_line_out", replay.seen["code_proj"].flatten(0, 1))
    assert ("gate_logits" in case.names("")) == ("gate_norm" in replay.seen)
    if "gate_norm" in replay.seen:
        case.check("gate_logits", replay.seen["gate_norm"])
    positions = sine_positions(replay.valid, width)
    case.check("pos", positions.transpose(1, 2).unflatten(2, replay.valid.shape[1:]))


def test_masking_and_tokens(replay: Replay) -> None:
    replay.case.check("labels", replay.masked.labels)
    assert torch.equal(replay.masked.mask, replay.masked.labels >= 0)
    replay.case.check("tokens", replay.tokens)


def test_state_after(replay: Replay) -> None:
    case, neck = replay.case, replay.neck
    for recorded, ours in DICTIONARY_NAMES.items():
        case.check(f"{recorded}_after", getattr(neck.dictionary, ours))
    for name in ("running_mean", "running_var"):
        case.check(f"bn_{name}_after", getattr(neck.norm, name))


def test_gradients(replay: Replay) -> None:
    case, neck = replay.case, replay.neck
    gradients = {
        "grad_feat": replay.feat.grad,
        "grad.conv.conv.weight": neck.conv.weight.grad,
        "grad.mask_emb": neck.mask_embed.grad[None],  # type: ignore[index]
    }
    assert set(gradients) == set(case.names("grad"))
    for name, gradient in gradients.items():
        case.check(name, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", cases("soho", "case_vd_*.safetensors"))
def test_dictionary_over_steps(path: Path) -> None:
    """Training steps, then one in evaluation mode; the buffers carried over."""
    case, sizes = Case(path), config_of(path.parent)
    book = VisualDictionary(options(sizes), sizes["vd_dim"])
    book.load_state_dict({DICTIONARY_NAMES[name]: value for name, value in case.weights().items()})
    steps = case["in.x"]
    for step, features in enumerate(steps):
        book.train(step < len(steps) - 1)
        book.decay = float(case[f"out.step{step}.curr_decay"])  # the product's is constant, as the release's
        features = features[None].clone().requires_grad_()
        quantised = book(features, torch.ones(features.shape[:2], dtype=torch.bool))
        (quantised.values[0] * case["in.w"]).sum().backward()
        case.check(f"step{step}.indices", quantised.indices[0])
        case.check(f"step{step}.quantize", quantised.values[0])
        case.check(f"step{step}.grad_x", features.grad[0])  # type: ignore[index]
        for recorded, ours in DICTIONARY_NAMES.items():
            case.check(f"step{step}.{recorded}", getattr(book, ours))


@pytest.mark.parametrize("path", cases("soho", "case_vd_constant_decay.safetensors"))
def test_the_recorded_decay_is_the_configured_one(path: Path) -> None:
    decay = config_of(path.parent)["decay"]
    assert {float(value) for name, value in Case(path).tensors.items() if name.endswith("curr_decay")} == {decay}


@pytest.mark.parametrize("path", cases("soho", "case_pretrain.safetensors"))
def test_masked_modelling_scores_and_loss(path: Path) -> None:
    case = Case(path)
    states = case["out.fusion_feature"][:, case["in.language_tokens"].shape[1] :]
    logits = visual_masking.cosine_logits(states, case["out.after.neck.vq.embed"]).flatten(0, 1)
    case.check("mvm_scores", logits)
    case.check("losses.loss_mvm", visual_masking.mvm_loss(logits, case["out.mvm_labels"]))
