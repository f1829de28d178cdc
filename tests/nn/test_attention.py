"""Attention as it is looked at: the very probabilities of the normal path, which looking does not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vlscale.config import Text, Vision
from vlscale.nn import attention
from vlscale.nn.attention import additive_mask, attend, recorded_attention
from vlscale.nn.bert import FusionEncoder
from vlscale.nn.vision import VisionEncoder

CONTEXT = 10


def fusion(checkpointing: bool = False) -> FusionEncoder:
    torch.manual_seed(1)
    sizes = {"width": 16, "heads": 4, "intermediate": 24, "text_layers": 2, "fusion_layers": 2, "max_positions": 12}
    encoder = FusionEncoder(Text(**sizes, dropout=0.0), CONTEXT, checkpointing)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def inputs(images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Words, their mask, and the context of `images` images."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 6).long()
    mask[1, 4:] = 0
    return torch.randn(3, 6, 16, generator=generator), mask, torch.randn(images, 5, CONTEXT, generator=generator)


def by_hand(module: nn.Module, states: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) head by head, [B, h, L, M]; masked columns are left out."""
    query, key = module.query(states), module.key(context)
    heads = []
    for q, k in zip(query.chunk(module.heads, dim=2), key.chunk(module.heads, dim=2), strict=True):
        scores = torch.einsum("bld,bmd->blm", q, k.expand(len(q), -1, -1)) / q.shape[2] ** 0.5
        heads.append(scores if mask is None else scores.masked_fill(mask[:, None] == 0, float("-inf")))
    return torch.stack(heads, dim=1).softmax(-1)


@pytest.mark.parametrize("images", [3, 1])
def test_what_is_recorded_is_what_the_layer_computed(images: int) -> None:
    """Self- and cross-attention of the first layer; one image's keys and values serve all texts."""
    encoder, (words, mask, context) = fusion(), inputs(images)
    block = encoder.layer[0]
    normal = encoder(words, mask, encoder.project_context(context))
    with recorded_attention({"self": block.attention.self, "cross": block.crossattention.self}) as found:
        looked_at = encoder(words, mask, encoder.project_context(context))
    assert torch.equal(looked_at, normal)
    after = block.attention.output(
        block.attention.self(words, block.attention.self.project(words), additive_mask(mask, torch.float32)), words
    )
    torch.testing.assert_close(found["self"], by_hand(block.attention.self, words, words, mask))
    torch.testing.assert_close(found["cross"], by_hand(block.crossattention.self, after, context, None))
    assert found["cross"].shape == (3, 4, 6, 5)


def test_gradients_are_those_of_the_output() -> None:
    """A perturbed probability moves the score by as much as its gradient says."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 2, 3, 4, requires_grad=True), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    weight = torch.randn(2, 3, 8)

    class Head(nn.Module):
        def forward(self) -> Tensor:
            return attend(query, key, value, None)

    module = Head()
    with recorded_attention({"head": module}) as found:
        (gradient,) = torch.autograd.grad((module() * weight).sum(), [found["head"]])
    expected = torch.einsum("blhd,bhmd->bhlm", weight.unflatten(2, (2, 4)), value)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_activations_have_the_same_gradients(checkpointing: bool) -> None:
    encoder, (words, mask, context) = fusion(checkpointing), inputs()
    with recorded_attention({"cross": encoder.layer[0].crossattention.self}) as found:
        out = encoder(words, mask, encoder.project_context(context))
        (gradient,) = torch.autograd.grad(out[:, 0].square().sum(), [found["cross"]])
    plain = fusion()
    with recorded_attention({"cross": plain.layer[0].crossattention.self}) as expected:
        out = plain(words, mask, plain.project_context(context))
        (wanted,) = torch.autograd.grad(out[:, 0].square().sum(), [expected["cross"]])
    torch.testing.assert_close(found["cross"], expected["cross"])
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_timm(checkpointing: bool) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    encoder = VisionEncoder(Vision(model="vit_tiny_patch16_224", overrides=sizes), 32, checkpointing).eval()
    images = torch.randn(2, 3, 32, 32)
    normal = encoder(images)
    module = encoder.vit.blocks[1].attn
    with recorded_attention({"last": module}) as found:
        looked_at = encoder(images)
        (gradient,) = torch.autograd.grad(looked_at[:, 0].square().sum(), [found["last"]])
    assert torch.equal(looked_at, normal)
    assert found["last"].shape == gradient.shape == (2, 3, 17, 17)
    torch.testing.assert_close(found["last"].sum(-1), torch.ones(2, 3, 17))
    assert gradient[:, :, 0].abs().sum() > 0
    assert not gradient[:, :, 1:].any(), "after the last block only [CLS] is read here"


def test_fused_attention_of_timm_is_off_only_meanwhile() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(Vision(model="vit_tiny_patch16_224", overrides={"embed_dim": 24, "num_heads": 3}), 32)
    module, states = encoder.vit.blocks[0].attn.eval(), torch.randn(2, 5, 24)
    for fused in (True, False):
        module.fused_attn = fused
        normal = module(states)
        with recorded_attention({"a": module}) as found:
            torch.testing.assert_close(module(states), normal)
            assert module.fused_attn is fused
        assert found["a"].shape == (2, 3, 5, 5)
        with pytest.raises(RuntimeError, match="shape"), recorded_attention({"a": module}):
            module(torch.randn(2, 5, 23))
        assert module.fused_attn is fused
    assert not module._forward_hooks
    assert not module.attn_drop._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_the_fused_kernel_rests_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for tensors on a GPU: other modules, and the same one afterwards, take the fused kernel."""
    calls: list[int] = []
    kernel = F.scaled_dot_product_attention

    def counted(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)

    class Head(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return attend(query, key, key, None)

    looked_at, other = Head(), Head()
    with FakeTensorMode():
        query, key = torch.empty(3, 2, 4, 8, device="cuda"), torch.empty(1, 2, 5, 8, device="cuda")
        with recorded_attention({"a": looked_at}) as found:
            shape = looked_at(query, key).shape
            assert not calls
            other(query, key)
            assert len(calls) == 1
        assert found["a"].shape == (3, 2, 4, 5)
        assert found["a"].device.type == "cuda"
        assert looked_at(query, key).shape == shape
        assert len(calls) == 2


def test_the_first_call_counts() -> None:
    encoder, (words, mask, context) = fusion(), inputs()
    module = encoder.layer[1].crossattention.self
    with recorded_attention({"a": module}) as found:
        encoder(words, mask, encoder.project_context(context))
        first = found["a"]
        encoder(2 * words, mask, encoder.project_context(context))
    assert found["a"] is first


def test_misuse_is_an_error_and_leaves_nothing_behind() -> None:
    encoder, (words, mask, context) = fusion(), inputs()
    module = encoder.layer[0].attention.self
    nested = pytest.raises(RuntimeError, match="inside a block")
    with recorded_attention({"a": module}), nested, recorded_attention({"b": module}):
        pass
    with pytest.raises(RuntimeError, match="Linear computed no attention"), recorded_attention({"q": module.query}):
        module.query(words)
    with recorded_attention({"a": module}) as found:
        encoder(words, mask, encoder.project_context(context))
    assert list(found) == ["a"]
    assert attention._keep is None
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
