"""The answer decoder: what a position may see, and where it starts from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlscale.config import Text
from vlscale.data.sample import Vocabulary
from vlscale.nn.bert import FusionEncoder, TextEncoder, select_context
from vlscale.nn.decoder import AnswerDecoder
from vlscale.nn.heads import MlmHead

VOCABULARY = Vocabulary(size=30, pad=0, cls=1, sep=2, mask=3)
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def options(norm: str = "post") -> Text:
    return Text(
        width=16,
        heads=4,
        intermediate=24,
        text_layers=2,
        fusion_layers=2,
        max_positions=12,
        dropout=0.0,
        norm=norm,  # type: ignore[arg-type]
    )


def decoder(norm: str = "post", checkpointing: bool = False) -> AnswerDecoder:
    torch.manual_seed(1)
    built = AnswerDecoder(options(norm), VOCABULARY, checkpointing=checkpointing)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two questions of which one is shorter; three answers of different lengths."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 8, 9, 10, 2]])
    question_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return ids, (ids != 0).long(), torch.randn(2, 4, 16), question_mask


ASKED = torch.tensor([0, 0, 1])


def run(module: AnswerDecoder, ids: Tensor, mask: Tensor, questions: Tensor, question_mask: Tensor) -> Tensor:
    context = select_context(module.project_context(questions), ASKED)
    return module.word_logits(module(ids, mask, context, question_mask[ASKED]))


@NORMS
def test_a_position_sees_what_comes_before_it_and_the_question(norm: str) -> None:
    module, (ids, mask, questions, question_mask) = decoder(norm), inputs()
    before = run(module, ids, mask, questions, question_mask)
    for position in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, position] = 20
        after = run(module, changed, mask, questions, question_mask)
        assert torch.allclose(after[:, :position], before[:, :position], atol=1e-6)
        real = mask[:, position].bool()
        assert ((after - before)[real, position:].abs().amax((1, 2)) > 1e-3).all()
    louder = questions.clone()
    louder[0, 0] += 1
    after = run(module, ids, mask, louder, question_mask)
    assert ((after - before)[:2].abs().amax((1, 2)) > 1e-3).all()
    assert torch.allclose(after[2], before[2])


def test_padding_of_question_and_answer_is_not_seen() -> None:
    module, (ids, mask, questions, question_mask) = decoder(), inputs()
    before = run(module, ids, mask, questions, question_mask)
    padded = torch.cat([ids, torch.full((3, 2), 20)], dim=1), torch.cat([mask, torch.zeros(3, 2).long()], dim=1)
    louder = questions.clone()
    louder[1, 2:] += 5
    after = run(module, *padded, louder, question_mask)
    assert torch.allclose(after[:, :5], before, atol=1e-6)


@NORMS
def test_word_by_word_gives_what_one_pass_gives(norm: str) -> None:
    module, (ids, mask, questions, question_mask) = decoder(norm), inputs()
    whole = run(module, ids, mask, questions, question_mask)
    for length in range(1, 6):
        part = run(module, ids[:, :length], mask[:, :length], questions, question_mask)
        assert torch.allclose(part[:, -1], whole[:, length - 1], atol=1e-5)


@NORMS
def test_starts_from_fusion_layers_embeddings_and_head(norm: str) -> None:
    text, fusion, head = TextEncoder(options(norm), VOCABULARY), FusionEncoder(options(norm), 16), MlmHead(16, 30)
    for parameter in fusion.final_norm.parameters():
        torch.nn.init.normal_(parameter)
    module = decoder(norm)
    assert module.start_from(fusion, text.embeddings, head) == []
    given = {f"embeddings.{k}": v for k, v in text.embeddings.state_dict().items()}
    given |= fusion.state_dict() | {f"mlm_head.{k}": v for k, v in head.state_dict().items()}
    own = module.state_dict()
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    fusion.layer[0].output.dense.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert module.layer[0].output.dense.weight.any()  # type: ignore[union-attr, operator]


def test_what_cannot_be_copied_is_named_and_kept() -> None:
    text, fusion, head = TextEncoder(options(), VOCABULARY), FusionEncoder(options(), 10), MlmHead(16, 30)
    module = decoder()
    kept = module.layer[1].crossattention.self.key.weight.clone()  # type: ignore[union-attr, operator]
    fresh = module.start_from(fusion, text.embeddings, head)
    assert fresh == [f"layer.{i}.crossattention.self.{part}.weight" for i in range(2) for part in ("key", "value")]
    assert torch.equal(module.get_parameter(fresh[2]), kept)
    with pytest.raises(ValueError, match="a decoder of 3 layers can't start from 2"):
        AnswerDecoder(options(), VOCABULARY, layers=3).start_from(fusion, text.embeddings, head)


def test_recomputing_activations_keeps_the_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        module = decoder(checkpointing=checkpointing)
        run(module, *inputs()).square().mean().backward()
        gradients.append([p.grad for p in module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)
