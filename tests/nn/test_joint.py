"""The joint transformer against transformers' BERT, and the short cuts against the long way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlscale.config import Joint
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.heads import AnswerHead
from vlscale.nn.joint import JointEncoder, load_joint

VOCABULARY = Vocabulary(size=30, pad=0, cls=1, sep=2, mask=3)


def encoder(vocabulary: Vocabulary = VOCABULARY, checkpointing: bool = False, **changes: object) -> JointEncoder:
    torch.manual_seed(0)
    config = Joint(width=16, heads=4, intermediate=24, layers=2, max_positions=12, dropout=0.0)
    return JointEncoder(config.model_copy(update=changes), vocabulary, checkpointing)


def inputs() -> tuple[Tensor, Tensor]:
    """Words and cells of three pairs, both padded."""
    mask = torch.ones(3, 9).long()
    mask[1, 3:5] = 0  # words
    mask[2, 7:] = 0  # cells
    return torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1)), mask


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(folder)
    return folder


def test_computes_what_transformers_does(bert_folder: Path) -> None:
    from transformers import BertModel

    theirs = BertModel.from_pretrained(bert_folder).eval()
    ours = encoder(layers=3)
    load_joint(str(bert_folder), ours)
    ids = torch.randint(1, 30, (3, 5), generator=torch.Generator().manual_seed(2))
    cells = torch.randn(3, 4, 16)
    _, mask = inputs()
    with torch.no_grad():
        words = ours.embed(ids)
        assert torch.allclose(words, theirs.embeddings(ids), atol=1e-5)
        # inputs_embeds gets positions, segment and LayerNorm on top; hence the layers alone
        states = torch.cat([words, cells], dim=1)
        bias = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        expected = theirs.encoder(states, attention_mask=bias).last_hidden_state
        assert torch.allclose(ours(states, mask), expected, atol=1e-5)
        text_alone = theirs(inputs_embeds=theirs.embeddings.word_embeddings(ids), attention_mask=mask[:, :5])
        assert torch.allclose(ours(words, mask[:, :5]), text_alone.last_hidden_state, atol=1e-5)


def test_takes_the_first_layers(bert_folder: Path) -> None:
    from transformers import BertModel

    theirs = BertModel.from_pretrained(bert_folder).encoder.layer
    ours = encoder(layers=2)
    load_joint(str(bert_folder), ours)
    for index, layer in enumerate(ours.layer):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, theirs[index].state_dict()[name]), name


def test_a_bert_that_does_not_fit_is_named(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 3 layers, system\.text\.layers needs 4"):
        load_joint(str(bert_folder), encoder(layers=4))
    with pytest.raises(UserError, match=r"layer\.0\.intermediate\.dense\.weight: expected \(32, 16\)"):
        load_joint(str(bert_folder), encoder(intermediate=32))
    with pytest.raises(UserError, match=r"word_embeddings\.weight: expected \(31, 16\), found \(30, 16\)"):
        load_joint(str(bert_folder), encoder(Vocabulary(size=31, pad=0, cls=1, sep=2, mask=3)))
    with pytest.raises(UserError, match=r"system\.text\.init"):
        load_joint(str(tmp_path / "absent"), encoder())


def test_what_the_mask_hides_changes_nothing() -> None:
    joint = encoder()
    states, mask = inputs()
    disturbed = torch.where(mask[:, :, None] == 1, states, 5.0)
    seen = mask[:, :, None] == 1
    assert torch.allclose(joint(states, mask) * seen, joint(disturbed, mask) * seen, atol=1e-6)
    assert not torch.allclose(joint(states, mask), joint(states, torch.ones_like(mask)), atol=1e-4)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_cls_only_is_the_first_row(norm: str) -> None:
    joint = encoder(norm=norm)
    states, mask = inputs()
    only = joint(states, mask, cls_only=True)
    assert only.shape == (3, 1, 16)
    assert torch.allclose(only, joint(states, mask)[:, :1], atol=1e-6)
    assert torch.allclose(only.mean(-1), torch.zeros(3, 1), atol=1e-5)  # both end in a LayerNorm


def test_recomputing_activations_keeps_the_gradients() -> None:
    states, mask = inputs()
    gradients = []
    for checkpointing in (False, True):
        joint = encoder(checkpointing=checkpointing)
        joint(states, mask, cls_only=True).square().mul(torch.arange(16)).sum().backward()
        gradients.append([p.grad for p in joint.layer.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-5)


def test_answers_are_dropped_out_only_in_training() -> None:
    torch.manual_seed(0)
    head, states = AnswerHead(16, answers=5, dropout=0.5), torch.randn(3, 16)
    first, _, _, last = head.layers
    expected = (states @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    assert torch.allclose(head.eval()(states), expected, atol=1e-6)
    assert not torch.allclose(head.train()(states), expected, atol=1e-4)
