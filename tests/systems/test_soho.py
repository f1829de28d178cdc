"""SOHO: who learns from which pair, what padding may touch, what rests, state that survives, one GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.systems.albef_fixtures import VOCABULARY, DirectWriter
from tests.systems.fake_gpu import put_on_fake_gpu
from tests.systems.test_albef import Calls
from vlscale.config import LOSSES, Backbone, Dictionary, Joint, Mvm, Neck, SohoSystem
from vlscale.data.sample import Batch
from vlscale.systems.protocol import Choices, Progress
from vlscale.systems.soho import Soho

SIDE, LENGTH, TEXTS = 64, 7, 4


def soho(
    seed: int = 0,
    mvm: Mvm | None = None,
    neck: Neck | None = None,
    left_out: Iterable[str] = (),
    quantise: bool = True,
    **dictionary: Any,
) -> Soho:
    torch.manual_seed(seed)
    overrides = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "output_stride": 8}
    config = SohoSystem(
        backbone=Backbone(model="resnet18", overrides=overrides, frozen_stages=0, freeze_epochs=2),
        neck=neck or Neck(),
        dictionary=Dictionary(**{"size": 6, **dictionary}),
        mvm=mvm or Mvm(),
        text=Joint(width=16, heads=2, intermediate=32, layers=2, max_positions=12, dropout=0.0),
        mlm_probability=0.4,
    )
    return Soho(config, SIDE, VOCABULARY, frozenset(left_out), quantise=quantise)


def batch_of(images: int = 3, seed: int = 0, height: int = SIDE, width: int = SIDE) -> Batch:
    """Two texts of its own and two of others per image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, height, width, generator=generator)
    ids = torch.randint(4, VOCABULARY.size, (images * TEXTS, LENGTH), generator=generator)
    ids[:, 0] = VOCABULARY.cls
    mask = torch.ones_like(ids)
    mask[::2, LENGTH - 2 :] = 0
    ids = torch.where(mask == 1, ids, VOCABULARY.pad)
    matched = torch.tensor([1, 1, 0, 0]).repeat(images)
    return Batch(pixels, ids, mask, torch.arange(images), matched=matched)


def progress(step: int = 30, seed: int = 0) -> Progress:
    """Ten steps an epoch; two epochs at rest."""
    return Progress(step, 100, 10.0, torch.Generator().manual_seed(seed))


def test_losses_are_those_of_the_recipe_and_move_every_part() -> None:
    system = soho().train()
    output = system(batch_of(), progress())
    assert tuple(sorted(output.losses)) == tuple(sorted(LOSSES["soho"]))
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert system.backbone.net.conv1.weight.grad.abs().sum() > 0  # through the dictionary, eq. 5


def test_each_loss_against_a_slow_recomputation() -> None:
    """Pair by pair: BERT over words and cells, cross-entropy over what was masked in matching pairs, and over all."""
    system, batch = soho().train(), batch_of()
    system.backbone.rest(True)  # BatchNorm on stored statistics, so that images can be taken one by one
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    system.joint.register_forward_hook(lambda _m, inputs, output: seen.append((*inputs, output)))
    output = system(batch, progress())
    states, _mask, fused = seen[0]
    masked = system._masked_words(batch, progress(), Choices())
    assert torch.equal(states[:, :LENGTH], system.joint.embed(masked.input_ids))
    pairs = system._visual_pairs(batch, _after_words(batch, system), Choices())
    assert pairs.labels is not None
    sums = {"mlm": 0.0, "mvm": 0.0}
    counts = {"mlm": 0, "mvm": 0}
    matching = 0.0
    for pair in range(len(batch)):
        label = int(batch.matched[pair])  # type: ignore[index]
        matching -= float(system.itm_head(fused[pair, 0]).detach().log_softmax(0)[label])
        if not label:
            continue
        for place in range(LENGTH):
            if (wanted := int(masked.labels[pair, place])) >= 0:
                logits = system.joint.embeddings.word_embeddings.weight @ fused[pair, place]
                sums["mlm"] -= float(logits.log_softmax(0)[wanted])
                counts["mlm"] += 1
        for cell, wanted in enumerate(pairs.labels[pair].tolist()):
            if wanted >= 0:
                sums["mvm"] -= float(system.mvm_head(fused[pair, LENGTH + cell]).log_softmax(0)[wanted])
                counts["mvm"] += 1
    assert min(counts.values()) > 3
    assert float(output.losses["itm"].detach()) == pytest.approx(matching / len(batch), rel=1e-4)
    for name, total in sums.items():
        assert float(output.losses[name].detach()) == pytest.approx(total / counts[name], rel=1e-4), name


def _after_words(batch: Batch, system: Soho) -> Progress:
    """The step's generator after the words were drawn."""
    drawn = progress()
    system._masked_words(batch, drawn, Choices())
    return drawn


def test_a_mask_does_not_tell_whether_a_pair_matches() -> None:
    """Cells are masked in every pair; only the labels of the mismatched ones are left out."""
    system, batch = soho().train(), batch_of()
    pairs = system._visual_pairs(batch, progress(), Choices())
    assert pairs.labels is not None
    assert ((pairs.labels >= 0).sum(1) > 0).all()
    only = system(batch, progress()).metrics["mvm_cells"]
    every = soho(mvm=Mvm(pairs="all")).train()(batch, progress()).metrics["mvm_cells"]
    assert 0 < only < every


def test_padding_touches_nothing() -> None:
    """A wider canvas of zeros: the same tokens, the same losses, the same dictionary."""
    system = soho().train()
    system.backbone.rest(True)
    narrow = replace(batch_of(), image_sizes=torch.tensor([[SIDE, SIDE]] * 3))
    wide = replace(narrow, images=F.pad(narrow.images, (0, 32)))
    kept = []
    for batch in (narrow, wide):
        image = system.eval().encode_image(batch)
        valid = image.mask.bool()
        fused = system.fuse(system.encode_text(first_texts(batch)), image)
        cells = system.cells(batch)
        assert torch.equal(cells.valid, valid)
        assert cells.rows * cells.columns == valid.shape[1]
        kept.append((image.tokens[valid], fused, system.codebook_features(batch)["dictionary"][valid]))
    assert len(kept[0][0]) < system.cells(wide).valid.numel()
    inner = interior(system)  # the border's cells see the padding through the convolutions, as in every network
    torch.testing.assert_close(kept[0][2].view(3, -1, 16)[:, inner], kept[1][2].view(3, -1, 16)[:, inner])

    system.train()
    system(wide, progress())
    counts = system.neck.dictionary._pending[:, -1]  # type: ignore[index,union-attr]
    assert counts.sum() == 3 * system.grid[0] * system.grid[1]
    labels = system._visual_pairs(wide, progress(), Choices()).labels
    valid = system.cells(wide).valid.repeat_interleave(TEXTS, 0)
    assert (labels[~valid] == -100).all()  # type: ignore[index]


def first_texts(batch: Batch) -> Batch:
    return replace(batch, input_ids=batch.input_ids[::TEXTS], attention_mask=batch.attention_mask[::TEXTS])


def interior(system: Soho) -> Tensor:
    """Cells that are not in the last column."""
    rows, columns = system.grid
    return (torch.arange(rows * columns) % columns) < columns // 2


def test_one_image_serves_many_texts() -> None:
    system, batch = soho().eval(), batch_of(1)
    text, image = system.encode_text(batch), system.encode_image(batch)
    together = system.match_logits(system.fuse(text, image))
    for row in range(TEXTS):
        alone = type(text)(text.tokens[row : row + 1], text.mask[row : row + 1], text.pooled[row : row + 1])
        torch.testing.assert_close(system.match_logits(system.fuse(alone, image))[0], together[row])
    assert system.similarity(image, text) is None


def test_the_backbone_rests_and_wakes_with_the_epoch() -> None:
    system = soho().train()
    before = {name: buffer.clone() for name, buffer in system.backbone.named_buffers()}
    for step, resting in ((0, True), (19, True), (20, False), (50, False), (3, True)):
        assert system.rest(progress(step)) is resting
        assert any(p.requires_grad for p in system.backbone.parameters()) is not resting
        if resting:
            system(batch_of(), progress(step))
            moved = any(not torch.equal(b, before[n]) for n, b in system.backbone.named_buffers())
            assert moved is (step == 3)  # it was awake for no forward yet at 0 and 19
        else:
            system(batch_of(), progress(step))


@pytest.mark.parametrize("update", ["paper", "release"])
def test_the_dictionary_moves_once_per_step_and_not_for_a_skipped_one(update: str) -> None:
    system = soho(update=update, gamma=0.5).train()
    dictionary = system.neck.dictionary
    assert dictionary is not None
    start = dictionary.codes.clone()
    system(batch_of(), progress(30))
    assert torch.equal(dictionary.codes, start) is (update == "paper")
    system(batch_of(seed=5), progress(31))  # the step before was skipped
    system.after_step(progress(31), DirectWriter())
    assert not torch.equal(dictionary.codes, start)
    assert float(dictionary.tracker.counts.sum()) == pytest.approx(0.01 * 3 * system.grid[0] * system.grid[1])


def test_without_a_dictionary_features_are_the_tokens() -> None:
    system = soho(use=False).train()
    output = system(batch_of(), progress())
    assert set(output.losses) == {"itm", "mlm"}
    assert system.codebooks() == system.codebook_features(batch_of()) == system.carried_state() == {}
    system.after_step(progress(), DirectWriter())


def test_state_goes_out_and_comes_back() -> None:
    system, other = soho().train(), soho(seed=1).train()
    for step in range(2):
        system(batch_of(seed=step), progress(step))
        system.after_step(progress(step), DirectWriter())
    state = {name: value.clone() for name, value in system.carried_state().items()}
    other.load_carried_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.carried_state().items())
    with pytest.raises(KeyError, match=r"dictionary\.counts"):
        other.load_carried_state({})


def test_no_host_sync_in_a_step() -> None:
    system, batch = soho().train(), batch_of()
    with Calls() as calls:
        output = system(batch, progress())
        torch.stack(list(output.losses.values())).sum().backward()
        system.after_step(progress(), DirectWriter())
    for name in ("_local_scalar_dense", "nonzero"):
        assert calls.counts[name] == 0, name


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("mvm", [Mvm(), Mvm(masking="cell", head="cosine", probability=0.5)])
def test_a_forward_keeps_to_the_gpu(mvm: Mvm) -> None:
    system, batch = soho(mvm=mvm).train(), replace(batch_of(), image_sizes=torch.tensor([[SIDE, SIDE]] * 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(system)
        system.place(torch.device("cuda"))
        tensors = {
            name: torch.empty_like(value, device="cuda")
            for name in ("images", "input_ids", "attention_mask", "image_ids", "matched", "image_sizes")
            if isinstance(value := getattr(batch, name), Tensor)
        }
        output = system(replace(batch, **tensors), progress())
        assert {value.device.type for value in (*output.losses.values(), *output.metrics.values())} == {"cuda"}
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
        system.after_step(progress(), DirectWriter())
