"""Text and fusion encoders against transformers' BERT, and the short cuts against the long way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.config import Text
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.attention import additive_mask, attend
from vlscale.nn.bert import FusionEncoder, TextEncoder, concat_context, load_bert, select_context
from vlscale.nn.heads import MlmHead

VOCABULARY = Vocabulary(size=30, pad=0, cls=1, sep=2, mask=3)
CONTEXT = 10


def options(**changes: object) -> Text:
    text = Text(width=16, heads=4, intermediate=24, text_layers=2, fusion_layers=2, max_positions=12, dropout=0.0)
    return text.model_copy(update=changes)


def fusion_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask, context_mask = torch.ones(3, 6).long(), torch.ones(3, 5).long()
    mask[1, 4:], context_mask[2, 3:] = 0, 0
    return torch.randn(3, 6, 16), mask, torch.randn(3, 5, CONTEXT), context_mask


def fusion(**changes: object) -> FusionEncoder:
    torch.manual_seed(1)
    return FusionEncoder(options(**changes), CONTEXT)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_text_encoder_and_head_compute_what_transformers_does(bert_folder: Path) -> None:
    from transformers import BertForMaskedLM

    theirs = BertForMaskedLM.from_pretrained(bert_folder).eval()
    text, head = TextEncoder(options(), VOCABULARY), MlmHead(16, VOCABULARY.size)
    load_bert(str(bert_folder), text, fusion(), head)
    ids = torch.randint(4, 30, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = theirs.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        ours = text(ids, mask)
        assert torch.allclose(ours, expected, atol=1e-5)
        assert torch.allclose(head(ours, text.embeddings.word_embeddings.weight), theirs.cls(expected), atol=1e-5)


def test_fusion_takes_the_last_layers(bert_folder: Path) -> None:
    from transformers import BertForMaskedLM

    theirs = BertForMaskedLM.from_pretrained(bert_folder).bert.encoder.layer
    text, last = TextEncoder(options(), VOCABULARY), fusion()
    cross = last.layer[1].crossattention.self.key.weight.detach().clone()
    load_bert(str(bert_folder), text, last, MlmHead(16, VOCABULARY.size))
    for ours, index in ((text.layer[1], 1), (last.layer[0], 2), (last.layer[1], 3)):
        assert torch.equal(ours.attention.self.query.weight, theirs[index].attention.self.query.weight)
        assert torch.equal(ours.output.LayerNorm.weight, theirs[index].output.LayerNorm.weight)
    assert torch.equal(last.layer[1].crossattention.self.key.weight, cross)


def test_a_bert_that_does_not_fit_is_named(bert_folder: Path, tmp_path: Path) -> None:
    head = MlmHead(16, VOCABULARY.size)
    with pytest.raises(UserError, match="has 4 layers, text and fusion need 5"):
        load_bert(str(bert_folder), TextEncoder(options(text_layers=3), VOCABULARY), fusion(), head)
    wide = options(intermediate=32)
    with pytest.raises(UserError, match=r"intermediate\.dense\.weight: expected \(32, 16\)"):
        load_bert(str(bert_folder), TextEncoder(wide, VOCABULARY), FusionEncoder(wide, CONTEXT), head)
    with pytest.raises(UserError, match=r"system\.text\.init"):
        load_bert(str(tmp_path / "absent"), TextEncoder(options(), VOCABULARY), fusion(), head)


def test_attention_against_the_fused_kernel() -> None:
    """On a GPU the fused kernel runs instead."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 6, 3), torch.randn(2, 4, 6, 3)
    bias = additive_mask(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]]), torch.float32)
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    assert torch.allclose(attend(query, key, value, bias), fused, atol=1e-6)


def test_padding_changes_nothing() -> None:
    text = TextEncoder(options(), VOCABULARY)
    ids, mask = torch.tensor([[1, 7, 8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert torch.allclose(text(ids, mask)[:, :4], text(ids[:, :4], mask[:, :4]), atol=1e-6)
    encoder = fusion()
    queries, mask, context, context_mask = fusion_inputs()
    kv = encoder.project_context(context)
    disturbed = encoder.project_context(torch.where(context_mask[:, :, None] == 1, context, 5.0))
    whole, other = encoder(queries, mask, kv, context_mask), encoder(queries, mask, disturbed, context_mask)
    assert torch.allclose(whole, other, atol=1e-6)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_cls_only_is_the_first_row(norm: str) -> None:
    encoder = fusion(norm=norm)
    queries, mask, context, context_mask = fusion_inputs()
    kv = encoder.project_context(context)
    only = encoder(queries, mask, kv, context_mask, cls_only=True)
    assert only.shape == (3, 1, 16)
    assert torch.allclose(only, encoder(queries, mask, kv, context_mask)[:, :1], atol=1e-6)


def test_contexts_are_selected_and_joined_by_rows() -> None:
    encoder = fusion()
    _, _, context, _ = fusion_inputs()
    kv = encoder.project_context(context)
    rows = torch.tensor([2, 0, 2])
    for picked, expected in (
        (select_context(kv, rows), context[rows]),
        (concat_context(kv, select_context(kv, rows)), torch.cat([context, context[rows]])),
    ):
        for layer, wanted in zip(picked, encoder.project_context(expected), strict=True):
            assert torch.allclose(layer.key, wanted.key, atol=1e-6)
            assert torch.allclose(layer.value, wanted.value, atol=1e-6)


def test_recomputing_activations_keeps_the_gradients() -> None:
    queries, mask, context, context_mask = fusion_inputs()
    gradients = []
    for checkpointing in (False, True):
        encoder = fusion()
        encoder.checkpointing = checkpointing
        encoder(queries, mask, encoder.project_context(context), context_mask).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-5)
