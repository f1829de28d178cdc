"""Attention of concepts: as the weights give it, whatever the encoders; rows sum to 1; padding gets nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.systems.albef_fixtures import tiny_albef
from tests.systems.test_mvptr import LENGTH, REGIONS, TAGS, batch_of, mvptr
from vlscale.config.mvptr import Wpg
from vlscale.errors import UserError
from vlscale.nn.attention import additive_mask
from vlscale.systems.concept_attention import as_reader, concept_attention, resting
from vlscale.systems.mvptr import Mvptr

MERGED: dict[str, Any] = {"fusion": "merged", "wpg": Wpg(layer=4)}
KINDS: dict[str, dict[str, Any]] = {"split": {}, "tags": {"tags_in_fusion": True}, "merged": MERGED}


def peaked(**changes: Any) -> Mvptr:
    """With weights large enough for attention to differ from the mean."""
    system = mvptr(**changes).eval()
    torch.manual_seed(3)
    for parameter in system.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return system


def slowly(stack: Any, states: Tensor, mask: Tensor, layer: int) -> Tensor:
    """Probabilities of a layer [B, h, T, T], query by query and key by key."""
    for index in range(layer):
        states = stack.layer[index](states, additive_mask(mask, torch.float32))
    block = stack.layer[layer].attention
    normed = block.output.LayerNorm(states)
    query, key = (normed @ part.weight.T + part.bias for part in (block.self.query, block.self.key))
    heads = block.self.heads
    width = query.shape[2] // heads
    found = torch.zeros(len(states), heads, states.shape[1], states.shape[1])
    for b, h, q in torch.cartesian_prod(*(torch.arange(size) for size in found.shape[:3])).tolist():
        part = slice(h * width, (h + 1) * width)
        scores = torch.tensor([float(query[b, q, part] @ key[b, k, part]) for k in range(found.shape[3])])
        powers = (scores / math.sqrt(width)).exp() * mask[b]
        found[b, h, q] = powers / powers.sum()
    return found


def expected(system: Mvptr, layer: int) -> dict[str, Tensor]:
    """What the encoders' own inputs and weights give."""
    batch, encoder = batch_of(3), system.encoder
    assert batch.tag_ids is not None
    assert batch.tag_mask is not None
    assert batch.regions is not None
    assert batch.region_mask is not None
    text = encoder.embeddings(batch.input_ids, 0)
    image = torch.cat([encoder.embeddings(batch.tag_ids, 1), encoder.regions(batch.regions)], dim=1)
    mask = torch.cat([batch.tag_mask, batch.region_mask], dim=1)
    found = {}
    if encoder.textual.layer:
        found = {
            "textual": slowly(encoder.textual, text, batch.attention_mask, layer),
            "visual": slowly(encoder.visual, image, mask, layer),
        }
    images, texts = system.encode_image(batch), system.encode_text(batch)
    joint = torch.cat([texts.tokens, images.tokens], dim=1)
    found["joint"] = slowly(encoder.multimodal, joint, torch.cat([texts.mask, images.mask], dim=1), layer)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [None, 1])
def test_attention_is_what_the_weights_give(kind: str, head: int | None) -> None:
    system = peaked(**KINDS[kind])
    with torch.no_grad():
        slow = {
            name: part.mean(1, keepdim=True) if head is None else part[:, [head]]
            for name, part in expected(system, 1).items()
        }
    found = concept_attention(system, batch_of(3), layer=1, head=head)
    joint = slow["joint"]
    torch.testing.assert_close(found.text_to_text, joint[:, :, :LENGTH, :LENGTH])
    torch.testing.assert_close(found.text_to_regions, joint[:, :, :LENGTH, -REGIONS:])
    assert found.text_to_tags.shape == (3, 1, LENGTH, TAGS)
    if kind == "split":
        assert not found.text_to_tags.any()
    else:
        torch.testing.assert_close(found.text_to_tags[..., 1:], joint[:, :, :LENGTH, LENGTH : LENGTH + TAGS - 1])
        assert not found.text_to_tags[..., 0].any(), "the tags' [CLS] is left out"
    if kind == "merged":
        torch.testing.assert_close(found.textual, joint[:, :, :LENGTH, :LENGTH])
        torch.testing.assert_close(found.visual[:, :, 1:, 1:], joint[:, :, LENGTH:, LENGTH:])
        assert found.visual.shape[2:] == (TAGS + REGIONS, TAGS + REGIONS)
    else:
        torch.testing.assert_close(found.textual, slow["textual"])
        torch.testing.assert_close(found.visual, slow["visual"])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_and_padding_gets_nothing(kind: str) -> None:
    system, batch = peaked(**KINDS[kind]), batch_of(3)
    assert batch.region_mask is not None
    found = concept_attention(system, batch)
    assert found.layer == len(system.encoder.multimodal.layer) - 1
    whole = torch.cat([found.text_to_text, found.text_to_tags, found.text_to_regions], dim=3)
    torch.testing.assert_close(whole.sum(3), torch.ones(3, 1, LENGTH))
    assert not found.text_to_regions[1, 0, :, -1].any(), "the second image has a region less"
    assert not found.visual[1, 0, :, -1].any()
    assert not found.textual[0, 0][:, batch.attention_mask[0] == 0].any()
    for part in (found.textual, found.visual):
        sums = part.sum(3)
        if kind == "merged":
            assert (sums < 1).all(), "the rest lies with the other modality"
        else:
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_the_mean_is_that_of_the_heads_and_a_pair_stands_alone() -> None:
    system = peaked()
    found = concept_attention(system, batch_of(3))
    heads = [concept_attention(system, batch_of(3), head=head) for head in range(2)]
    for mean, first, second in zip(found[:5], heads[0][:5], heads[1][:5], strict=True):
        torch.testing.assert_close(mean, (first + second) / 2)
    assert not torch.allclose(heads[0].textual, heads[1].textual)
    alone = concept_attention(system, batch_of(1))
    torch.testing.assert_close(found.textual[:1, :, :7, :7], alone.textual[..., :7, :7])


def test_what_is_asked_for_in_vain() -> None:
    with pytest.raises(UserError, match="layer 3: there are 3 of them"):
        concept_attention(peaked(), batch_of(), layer=3)
    with pytest.raises(UserError, match="head 2: there are 2 of them"):
        concept_attention(peaked(), batch_of(), head=2)
    with pytest.raises(UserError, match="runs/a: its system reads no phrases, tags or regions"):
        as_reader(tiny_albef(), "runs/a")


def test_only_the_first_stage_rests() -> None:
    assert resting(mvptr(stage=1))
    assert not resting(mvptr())


def test_rows_are_the_table() -> None:
    system = mvptr()
    rows = as_reader(system, "x").concept_rows()
    table = system.encoder.embeddings.word_embeddings.weight
    assert torch.equal(torch.cat([rows.words, rows.phrases]), table)
    assert len(rows.phrases) == system.phrases
