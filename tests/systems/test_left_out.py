"""Losses that are left out: the others stay what they are, and what nobody asks for is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.systems import albef_fixtures, test_cb_vila, test_codis, test_soho
from vlscale.config import MimOptions
from vlscale.systems.albef import Albef
from vlscale.systems.cb_vila import CbVila
from vlscale.systems.protocol import Choices, StepOutput

ALPHA_STEP = 2
"""Of one-step epochs: the teacher's targets count."""


def albef(left_out: set[str]) -> Albef:
    torch.manual_seed(0)
    config = albef_fixtures.tiny_config()
    return Albef(config, albef_fixtures.IMAGE_SIZE, albef_fixtures.VOCABULARY, frozenset(left_out)).train()


def cb_vila(left_out: set[str], **changes: Any) -> CbVila:
    torch.manual_seed(0)
    config = test_cb_vila.config(**changes)
    return CbVila(config, test_cb_vila.IMAGE_SIZE, test_cb_vila.VOCABULARY, frozenset(left_out)).train()


def calls_of(module: nn.Module) -> list[int]:
    """Grows by the rows of every call."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    return seen


def same(output: StepOutput, whole: StepOutput, left_out: set[str]) -> None:
    assert set(output.losses) == set(whole.losses) - left_out
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss, whole.losses[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, value in output.metrics.items():
        torch.testing.assert_close(value, whole.metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not {f"{name}_accuracy" for name in left_out} & output.metrics.keys()


@pytest.mark.parametrize("left_out", [{"mlm"}, {"itm"}, {"itm", "mlm"}], ids=lambda names: "+".join(sorted(names)))
def test_albef_without_a_loss(left_out: set[str]) -> None:
    system, batch = albef(left_out), albef_fixtures.tiny_batch(8)
    words, texts = calls_of(system.mlm_head), calls_of(system.text_encoder)
    teacher = calls_of(system.momentum.teacher["fusion_encoder"])
    output = system(batch, albef_fixtures.progress(ALPHA_STEP, seed=5))
    same(output, albef(set())(batch, albef_fixtures.progress(ALPHA_STEP, seed=5)), left_out)
    without = "mlm" in left_out
    assert (words, teacher, texts) == (([], [], [8]) if without else ([words[0]], [8], [16]))


@pytest.mark.parametrize("left_out", [{"mlm"}, {"itm"}, {"mlm", "code"}], ids=lambda names: "+".join(sorted(names)))
def test_codis_without_a_loss(left_out: set[str]) -> None:
    def step(names: set[str]) -> StepOutput:
        system = test_codis.codis(left_out=frozenset(names)).train()
        return system(albef_fixtures.tiny_batch(8), albef_fixtures.progress(ALPHA_STEP, seed=5))

    same(step(left_out), step(set()), left_out)


ALL_CELLS = {"mim", "pixel", "codebook"}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "left_out",
    [{"mlm"}, {"itm"}, {"mim"}, {"pixel"}, {"codebook"}, {"mim", "pixel"}, ALL_CELLS, {"mlm", *ALL_CELLS}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_cb_vila_without_a_loss(left_out: set[str], share: bool) -> None:
    batch = test_cb_vila.batch(8)

    def step(system: CbVila, number: int) -> StepOutput:
        return system(batch, test_cb_vila.progress(number, seed=5))

    for number in (1, 5):  # in the warm-up and after it
        whole, part = (cb_vila(names, mim=MimOptions(share_pass=share)) for names in (set(), left_out))
        same(step(part, number), step(whole, number), left_out)


def test_cb_vila_leaves_its_codes_alone_where_nothing_is_quantised() -> None:
    system = cb_vila({"mlm", *ALL_CELLS})
    codes = system.codebook.codes.detach().clone()
    fused = calls_of(system.fusion_encoder)
    for step in range(1, 4):  # k-means would come at step 2
        system(test_cb_vila.batch(), test_cb_vila.progress(step))
        system.after_step(test_cb_vila.progress(step), albef_fixtures.DirectWriter())
    assert torch.equal(system.codebook.codes, codes)
    assert not system.codebook.tracker.counts.any()
    assert fused == [12, 12, 12], "ITM's three passes and no other"


def test_soho_hides_no_words_where_nobody_asks_for_them() -> None:
    batch = test_soho.batch_of()
    whole, part = (test_soho.soho(left_out=names).train() for names in (set(), {"mlm"}))
    words = part._masked_words(batch, test_soho.progress(), Choices())
    assert torch.equal(words.input_ids, batch.input_ids)
    assert bool((words.labels == -100).all())
    masks: list[Tensor] = []
    for system in (whole, part):
        system.neck.register_forward_hook(lambda _m, _i, states: masks.append(states.indices))
        drawn = test_soho._after_words(batch, system)
        masks.append(system._visual_pairs(batch, drawn, Choices()).labels)
    assert torch.equal(masks[1], masks[3]), "cells are masked as with MLM"
    assert set(part(batch, test_soho.progress()).losses) == {"itm", "mvm"}


def test_soho_hides_no_cells_without_mvm() -> None:
    system, batch = test_soho.soho(left_out={"mvm"}).train(), test_soho.batch_of()
    pairs = system._visual_pairs(batch, test_soho.progress(), Choices())
    assert pairs.labels is None
    embeds, valid = system._neck(batch, 1)
    tokens = system.neck.tokens(embeds.embeds, valid, None)
    torch.testing.assert_close(pairs.tokens, tokens.repeat_interleave(test_soho.TEXTS, 0))
    assert set(system(batch, test_soho.progress()).losses) == {"itm", "mlm"}


def test_a_fine_tuned_soho_reads_what_the_dictionary_would_quantise() -> None:
    tuned, pretrained = (test_soho.soho(quantise=flag).eval() for flag in (False, True))
    batch = test_soho.batch_of()
    features = tuned._neck(batch, 1)[0]
    assert features.indices is None
    assert torch.equal(features.embeds, pretrained._neck(batch, 1)[0].features)
    assert not torch.equal(tuned.encode_image(batch).tokens, pretrained.encode_image(batch).tokens)
    tuned.train()
    codes = tuned.codebooks()["dictionary"].codes.clone()  # type: ignore[attr-defined]
    assert set(tuned(batch, test_soho.progress()).losses) == {"itm", "mlm"}
    tuned.after_step(test_soho.progress(), albef_fixtures.DirectWriter())
    assert torch.equal(tuned.codebooks()["dictionary"].codes, codes)  # type: ignore[attr-defined]
