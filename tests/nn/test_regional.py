"""MVPTR's encoders: against transformers' BERT, what is seen by whom, and the short cuts against the long way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.systems.fake_gpu import put_on_fake_gpu
from vlscale.config.mvptr import MvptrSystem, Stacks, Wpg
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.nn.heads import MlmHead
from vlscale.nn.regional import ConceptEmbeddings, ConceptHead, MvpEncoder, SharedSpace, load_regional

WORDS, PHRASES, WIDTH, FEATURE = 30, 8, 16, 5
VOCABULARY = Vocabulary(WORDS, pad=0, cls=1, sep=2, mask=3, phrase_pieces=((4,),) * PHRASES)
SIZES: dict[str, Any] = {"width": WIDTH, "heads": 4, "intermediate": 24, "max_positions": 40, "dropout": 0.0}
TAGS, REGIONS, LENGTH = 4, 3, 7


def encoder(layers: int = 3, text: dict[str, Any] | None = None, **options: Any) -> MvpEncoder:
    torch.manual_seed(0)
    options.setdefault("wpg", Wpg(layer=0))
    config = MvptrSystem(text=Stacks(**SIZES, layers=layers, **(text or {})), **options)
    return MvpEncoder(config, FEATURE, VOCABULARY)


def texts() -> tuple[Tensor, Tensor]:
    """Words, then phrases, then [SEP]."""
    ids = torch.tensor([[1, 7, 9, 31, 33, 2, 0], [1, 12, 30, 2, 0, 0, 0]])
    return ids, (ids != 0).long()


def images() -> tuple[Tensor, Tensor, Tensor]:
    tags = torch.tensor([[1, 5, 6, 2], [1, 9, 2, 0]])
    features = torch.randn(2, REGIONS, FEATURE + 6, generator=torch.Generator().manual_seed(1))
    mask = torch.cat([(tags != 0).long(), torch.tensor([[1, 1, 1], [1, 0, 0]])], dim=1)
    return tags, features, mask


def both(model: MvpEncoder, **options: Any) -> Any:
    """The pairs through all three encoders."""
    ids, mask = texts()
    tags, features, image_mask = images()
    image = model.for_fusion(model.encode_image(tags, features, image_mask), TAGS)
    return model.fuse(model.encode_text(ids, mask), image, mask, model.for_fusion(image_mask, TAGS), **options)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fusion", ["split", "merged"])
@torch.no_grad()
def test_starts_from_bert(bert_folder: Path, fusion: str) -> None:
    """Split: layers 1 to 2 twice, then 3 to 4. Merged: all four. The head predicts what BERT does."""
    from transformers import BertForMaskedLM

    theirs = BertForMaskedLM.from_pretrained(bert_folder).eval()
    ours, head = encoder(2, fusion=fusion), ConceptHead(WIDTH, WORDS)
    kept = ours.embeddings.phrase_rows().clone()
    load_regional(str(bert_folder), ours, [head])
    assert torch.equal(ours.embeddings.phrase_rows(), kept)
    ids, mask = texts()
    words = ids.clamp(max=WORDS - 1)
    bias = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
    states = theirs.bert.embeddings(words)
    assert torch.allclose(ours.embeddings(words, 0), states, atol=1e-5)
    assert torch.allclose(ours.embeddings(words, 1), theirs.bert.embeddings(words, torch.ones_like(words)), atol=1e-5)
    for layer in theirs.bert.encoder.layer[: 2 if fusion == "split" else 0]:
        states = layer(states, attention_mask=bias)
    assert torch.allclose(ours.encode_text(words, mask), states, atol=1e-5)
    none = torch.zeros(2, 0, FEATURE + 6)
    assert torch.allclose(ours.encode_image(words, none, mask, segment=0), ours.encode_text(words, mask), atol=1e-6)
    for layer in theirs.bert.encoder.layer[2 if fusion == "split" else 0 :]:
        states = layer(states, attention_mask=bias)
    fused = ours.fuse(ours.encode_text(words, mask), torch.zeros(2, 0, WIDTH), mask, torch.zeros(2, 0).long())
    assert torch.allclose(fused.states, states, atol=1e-5)
    expected = theirs.cls(states)
    assert torch.allclose(head(fused.states), expected, atol=1e-4)


def test_a_bert_that_does_not_fit_is_named(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 4 layers, textual and multimodal encoders need 6"):
        load_regional(str(bert_folder), encoder(3), [])
    other = Vocabulary(size=31, pad=0, cls=1, sep=2, mask=3)
    config = MvptrSystem(text=Stacks(**SIZES, layers=2), wpg=Wpg(layer=0))
    with pytest.raises(UserError, match=r"word embeddings: expected \(31, 16\), found \(30, 16\)"):
        load_regional(str(bert_folder), MvpEncoder(config, FEATURE, other), [])
    with pytest.raises(UserError, match=r"system\.text\.init"):
        load_regional(str(tmp_path / "absent"), encoder(1), [])


@torch.no_grad()
def test_phrases_start_as_the_mean_of_their_words() -> None:
    pieces = ((4, 5), (6,), (7, 7, 8))
    embeddings = ConceptEmbeddings(Stacks(**SIZES), replace(VOCABULARY, phrase_pieces=pieces))
    words = embeddings.word_rows().clone()
    embeddings.start_phrases(pieces)
    for row, own in zip(embeddings.phrase_rows(), pieces, strict=True):
        assert torch.allclose(row, words[list(own)].mean(0), atol=1e-6)
    assert torch.equal(embeddings.word_rows(), words)


def test_words_tags_and_phrases_share_one_table() -> None:
    model = encoder()
    tied = MlmHead(WIDTH, PHRASES)
    (tied(torch.randn(2, WIDTH), model.embeddings.phrase_rows()).sum() + both(model).states.square().sum()).backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient is not None
    moved = gradient.any(1)
    assert moved[[7, 9, 12, 5, 6]].all()  # words; tags, through regions that attend to them
    assert moved[WORDS:].all()
    assert not moved[[0, 20]].any()


def test_regions_have_neither_position_nor_segment() -> None:
    """Another order of the regions is the same order of their states."""
    model = encoder().eval()
    tags, features, mask = images()
    mask = torch.ones_like(mask)
    order = torch.tensor([2, 0, 1])
    states = model.encode_image(tags, features, mask)
    mixed = model.encode_image(tags, features[:, order], mask)
    assert torch.allclose(mixed[:, TAGS:], states[:, TAGS:][:, order], atol=1e-5)
    assert torch.allclose(mixed[:, :TAGS], states[:, :TAGS], atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_region_embedding(norm: bool) -> None:
    model = encoder(region_norm=norm)
    features = images()[1]
    dense = model.regions.dense
    expected = features @ dense.weight.T + dense.bias
    if norm:
        expected = (expected - expected.mean(2, keepdim=True)) / expected.var(2, unbiased=False, keepdim=True).sqrt()
    assert torch.allclose(model.regions(features), expected, atol=1e-4)


@pytest.mark.parametrize("side", ["text", "tags", "regions"])
@pytest.mark.parametrize("fusion", ["split", "merged"])
def test_what_the_masks_hide_changes_nothing(side: str, fusion: str) -> None:
    model = encoder(fusion=fusion).eval()
    (ids, mask), (tags, features, image_mask) = texts(), images()

    def fused(ids: Tensor, tags: Tensor, features: Tensor) -> Tensor:
        image = model.for_fusion(model.encode_image(tags, features, image_mask), TAGS)
        seen = model.for_fusion(image_mask, TAGS)
        states = model.fuse(model.encode_text(ids, mask), image, mask, seen).states
        return states[torch.cat([mask, seen], dim=1) == 1]

    other = {
        "text": (torch.where(mask == 1, ids, 17), tags, features),
        "tags": (ids, torch.where(image_mask[:, :TAGS] == 1, tags, 17), features),
        "regions": (ids, tags, torch.where(image_mask[:, TAGS:, None] == 1, features, 9.0)),
    }[side]
    assert torch.allclose(fused(ids, tags, features), fused(*other), atol=1e-5)


def test_who_sees_the_tags() -> None:
    shapes = {
        (): LENGTH + REGIONS,
        (("tags_in_fusion", True),): LENGTH + TAGS - 1 + REGIONS,
        (("fusion", "merged"),): LENGTH + TAGS - 1 + REGIONS,
    }
    for options, width in shapes.items():
        assert both(encoder(**dict(options))).states.shape == (2, width, WIDTH)
    model = encoder()
    tags, features, mask = images()
    assert torch.equal(model.for_fusion(mask, TAGS), mask[:, TAGS:])
    states = model.encode_image(tags, features, mask)
    assert torch.equal(model.for_fusion(states, TAGS), states[:, TAGS:])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layers_and_short_cuts(norm: str) -> None:
    model = encoder(text={"norm": norm}).eval()
    whole = both(model, return_layers=True)
    assert len(whole.layers) == 3
    assert torch.allclose(model.multimodal.final_norm(whole.layers[-1]), whole.states, atol=1e-6)
    assert both(model).layers == ()
    for depth in (1, 2):
        part = both(model, depth=depth, return_layers=True)
        assert len(part.layers) == depth
        assert torch.equal(part.states, whole.layers[depth - 1])
    only = both(model, cls_only=True).states
    assert only.shape == (2, 1, WIDTH)
    assert torch.allclose(only, whole.states[:, :1], atol=1e-6)
    pooled = model.pool(only)
    assert torch.allclose(pooled, model.pooler(whole.states[:, 0]).tanh(), atol=1e-6)


def test_recomputing_activations_keeps_the_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = encoder(checkpoint_activations=again)
        both(model).states.square().mul(torch.arange(WIDTH)).sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if not name.startswith("pooler")])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-5)


def test_the_head_starts_from_the_words_and_goes_its_own_way() -> None:
    model, head = encoder(), ConceptHead(WIDTH, WORDS)
    head.start_from(model.embeddings.word_rows())
    assert torch.equal(head.decoder.weight, model.embeddings.word_rows())
    head(torch.randn(3, WIDTH)).sum().backward()
    assert head.decoder.weight.grad is not None
    assert model.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("proj", [True, False])
def test_the_shared_space(proj: bool) -> None:
    torch.manual_seed(0)
    space, states = SharedSpace(WIDTH, proj), torch.randn(2, 5, WIDTH)
    cls = states[:, 0] @ space.proj.weight.T if proj else states[:, 0]  # type: ignore[union-attr,operator]
    assert torch.allclose(space(states), cls / cls.norm(dim=1, keepdim=True), atol=1e-6)
    assert len(list(space.parameters())) == proj


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("fusion", ["split", "merged"])
def test_a_forward_keeps_to_the_gpu(fusion: str) -> None:
    model, space = encoder(fusion=fusion), SharedSpace(WIDTH, True)
    (ids, mask), (tags, features, image_mask) = texts(), images()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, space):
            put_on_fake_gpu(module)
        ids, mask, tags, image_mask = (torch.empty_like(t, device="cuda") for t in (ids, mask, tags, image_mask))
        text = model.encode_text(ids, mask)
        image = model.encode_image(tags, torch.empty_like(features, device="cuda"), image_mask)
        seen = model.for_fusion(image, TAGS), mask, model.for_fusion(image_mask, TAGS)
        fused = model.fuse(text, *seen, return_layers=True)
        assert {t.device.type for t in (*fused.layers, model.pool(fused.states), space(image))} == {"cuda"}


def test_options_that_do_not_fit_are_refused() -> None:
    assert MvptrSystem().multimodal_layers == 6
    assert MvptrSystem(fusion="merged", wpg=Wpg(layer=8)).multimodal_layers == 12
    for options, message in (
        ({"wpg": Wpg(layer=6)}, r"wpg\.layer 6 does not exist: the multimodal encoder has layers 0 to 5"),
        ({"fusion": "merged", "stage": 1}, "stage 1 trains the uni-modal encoders"),
    ):
        with pytest.raises(ValidationError, match=message):
            MvptrSystem(**options)  # type: ignore[arg-type]


def test_every_part_is_initialised_as_bert_s() -> None:
    for name, parameter in encoder(layers=1).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.25), name
    assert isinstance(encoder().textual.final_norm, nn.Identity)
