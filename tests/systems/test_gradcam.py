"""Grad-CAM of systems: pairs stand alone, padding gets nothing, nothing is left behind, systems without maps say so."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from tests.systems import test_cb_vila as cb_vila
from tests.systems.albef_fixtures import tiny_albef, tiny_batch
from tests.systems.test_mvptr import mvptr
from tests.systems.test_soho import batch_of, soho
from vlscale.data.sample import Batch
from vlscale.errors import UserError
from vlscale.nn.attention import attend
from vlscale.systems.albef import Albef
from vlscale.systems.gradcam import contrast_gradcam, gradcam
from vlscale.systems.protocol import Cells, ImageStates, TextStates


def albef() -> Albef:
    """With weights large enough for attention to differ from the mean."""
    system = tiny_albef().eval()
    torch.manual_seed(3)
    for parameter in system.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
    return system


def rows(batch: Batch, index: Tensor) -> Batch:
    return Batch(batch.images[index], batch.input_ids[index], batch.attention_mask[index], batch.image_ids[index])


def test_every_pair_has_its_own_maps() -> None:
    system, batch = albef(), tiny_batch()
    found = gradcam(system, batch)
    contrast = contrast_gradcam(system, batch)
    assert found.maps.shape == (4, 9, 4, 4)
    assert contrast.maps.shape == (4, 4, 4)
    assert found.layer == 0, "the first of two"
    assert contrast.layer == 1, "the last of two"
    for row in range(4):
        alone = gradcam(system, rows(batch, torch.tensor([row])))
        torch.testing.assert_close(alone.maps[0], found.maps[row], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(alone.match_logits[0], found.match_logits[row])
        one = contrast_gradcam(system, rows(batch, torch.tensor([row])))
        torch.testing.assert_close(one.maps[0], contrast.maps[row], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(one.similarity[0], contrast.similarity[row])


def test_padding_finds_nothing_and_words_do() -> None:
    batch = tiny_batch()
    maps = gradcam(albef(), batch).maps
    assert (maps >= 0).all()
    assert (maps.sum((2, 3)) > 0).equal(batch.attention_mask.bool())
    last = gradcam(albef(), batch, layer=1).maps
    assert last[:, 0].sum() > 0
    assert not last[:, 1:].any(), "the match reads [CLS], which after the last layer is all that counts"


def test_the_mean_is_that_of_the_heads_and_of_the_tokens() -> None:
    system, batch = albef(), tiny_batch()
    found = gradcam(system, batch)
    heads = torch.stack([gradcam(system, batch, head=head).maps for head in range(2)])
    assert not torch.allclose(heads[0], heads[1])
    torch.testing.assert_close(found.maps, heads.mean(0))
    torch.testing.assert_close(found.whole(), found.maps.sum(1) / batch.input_ids.shape[1])


def test_one_image_serves_all_texts() -> None:
    system, batch = albef(), tiny_batch()
    one = replace(batch, images=batch.images[:1], image_ids=batch.image_ids[:1])
    many = replace(batch, images=batch.images[:1].expand(4, -1, -1, -1))
    torch.testing.assert_close(gradcam(system, one).maps, gradcam(system, many).maps, rtol=1e-4, atol=1e-9)


class Lookup(nn.Module):
    """Words read the evidence that a cell holds, and nothing else; there is a [CLS] before the 2 × 3 cells."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.keys, self.evidence = torch.randn(2, 4, 7, generator=generator), torch.randn(2, 7, 1, generator=generator)
        self.attention = Attending()

    def word_attention(self) -> list[nn.Module]:
        return [self.attention]

    def cells(self, batch: Batch) -> Cells:
        return Cells(2, 3, torch.ones(2, 6, dtype=torch.bool))

    def encode_image(self, batch: Batch) -> ImageStates:
        return ImageStates(self.keys, torch.ones(2, 7).long(), torch.zeros(2, 0))

    def encode_text(self, batch: Batch) -> TextStates:
        return TextStates(batch.input_ids[..., None].float().cos(), batch.attention_mask, torch.zeros(2, 0))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        queries = (text.tokens * torch.arange(1.0, 5)).requires_grad_()  # [2, L, 4]
        return self.attention(queries[:, None], image.tokens.mT[:, None], self.evidence[:, None])  # [2, L, 1]

    def match_logits(self, states: Tensor) -> Tensor:
        return torch.cat([-states.sum(1), states.sum(1)], dim=1)


class Attending(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, None)


def test_evidence_lies_where_the_match_comes_from() -> None:
    """Where the logit is Σ attention · evidence, a map is attention · positive evidence, cell by cell."""
    system, batch = Lookup(), rows(tiny_batch(), torch.tensor([0, 1]))
    found = gradcam(system, batch)
    queries = system.encode_text(batch).tokens * torch.arange(1.0, 5)
    attention = (queries @ system.keys / 2).softmax(-1)[:, :, 1:]  # [2, L, 6], without [CLS]
    expected = attention * system.evidence[:, 1:].mT.clamp(min=0) * batch.attention_mask[..., None]
    torch.testing.assert_close(found.maps, expected.unflatten(2, (2, 3)))
    assert (found.maps > 0).any()
    assert not found.maps[1, -1].any(), "padding"


def test_looking_leaves_nothing_behind() -> None:
    """No gradients of parameters, and the same maps where the caller has switched gradients off."""
    system, batch = albef(), tiny_batch()
    maps, contrast = gradcam(system, batch).maps, contrast_gradcam(system, batch).maps
    assert not maps.requires_grad
    assert all(parameter.grad is None for parameter in system.parameters())
    with torch.inference_mode():
        made_here = Batch(**{f.name: clone(getattr(batch, f.name)) for f in fields(batch)})
        assert torch.equal(gradcam(system, made_here).maps, maps)
        assert torch.equal(contrast_gradcam(system, made_here).maps, contrast)


def clone(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def test_a_joint_transformer_shows_how_words_read_cells() -> None:
    system, given = soho().eval(), batch_of(images=3)
    texts = torch.tensor([0, 4, 8])
    sizes = torch.tensor([[64, 64], [64, 32], [32, 64]])
    batch = Batch(given.images, given.input_ids[texts], given.attention_mask[texts], given.image_ids, image_sizes=sizes)
    found = gradcam(system, batch, layer=0)
    cells = system.cells(batch)
    assert found.maps.shape == (3, 7, cells.rows, cells.columns)
    valid = cells.valid.unflatten(1, (cells.rows, cells.columns))
    assert not valid.all()
    assert not found.maps[~valid[:, None].expand_as(found.maps)].any(), "padding of images finds nothing"
    assert (found.maps.sum((2, 3)) > 0).equal(batch.attention_mask.bool())
    with pytest.raises(UserError, match="no Grad-CAM of the contrast"):
        contrast_gradcam(system, batch)


def test_what_a_system_does_not_have_is_said() -> None:
    batch = tiny_batch()
    with pytest.raises(UserError, match="layer 2: there are 2 of them, counted from 0"):
        gradcam(albef(), batch, layer=2)
    with pytest.raises(UserError, match="head 3: there are 3"):
        contrast_gradcam(albef(), batch, head=3)
    with pytest.raises(UserError, match="it reads regions"):
        gradcam(mvptr(), batch)
    assert gradcam(cb_vila.system().eval(), cb_vila.batch()).maps.dim() == 4
    with pytest.raises(UserError, match="trained without one"):
        contrast_gradcam(cb_vila.system(contrast=False), cb_vila.batch())
