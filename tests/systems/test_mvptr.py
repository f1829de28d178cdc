"""MVPTR: what may be read of what is hidden, both stages' losses, negatives computed once, edge cases, one GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.systems.albef_fixtures import DirectWriter
from tests.systems.fake_gpu import put_on_fake_gpu
from tests.systems.test_albef import Calls
from vlscale.config.mvptr import Mcr, MvptrSystem, Stacks, Vsc, Wpg
from vlscale.data.sample import Batch, Vocabulary
from vlscale.objectives.masking import IGNORED
from vlscale.systems.concept_inputs import mask_inputs, phrase_masks, phrase_slots
from vlscale.systems.mvptr import Mvptr
from vlscale.systems.protocol import Choices, Progress

PHRASES, WIDTH, LENGTH, SLOTS, TAGS, REGIONS = 9, 5, 12, 3, 6, 4
VOCABULARY = Vocabulary(40, 0, 1, 2, 3, tuple((4 + number, 5 + number) for number in range(PHRASES)))
LOSSES = {"mcr_v", "mcr_s", "vsc", "itm", "mlm", "wpg"}


def mvptr(seed: int = 0, **changes: Any) -> Mvptr:
    torch.manual_seed(seed)
    text = Stacks(width=16, heads=2, intermediate=32, layers=3, max_positions=24, dropout=0.0, norm="pre")
    options = {"mcr": Mcr(tags=0.5, phrases=0.5), "mlm_probability": 0.3, **changes}
    config = MvptrSystem(text=text, **options)
    return Mvptr(config, WIDTH, VOCABULARY)


def batch_of(size: int = 4, seed: int = 0) -> Batch:
    """[CLS] five words, up to three phrases [SEP]; phrase p of row b covers words p + 1 and p + 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(size, LENGTH, dtype=torch.int64)
    places = torch.zeros_like(ids)
    words = torch.zeros(size, SLOTS, LENGTH, dtype=torch.bool)
    for row in range(size):
        count = row % (SLOTS + 1)
        ids[row, 0] = VOCABULARY.cls
        ids[row, 1:6] = torch.randint(4, VOCABULARY.size, (5,), generator=generator)
        for phrase in range(count):
            ids[row, 6 + phrase] = VOCABULARY.size + int(torch.randint(PHRASES, (1,), generator=generator))
            places[row, 6 + phrase] = phrase + 1
            words[row, phrase, phrase + 1 : phrase + 3] = True
        ids[row, 6 + count] = VOCABULARY.sep
    tags = torch.randint(4, VOCABULARY.size, (size, TAGS), generator=generator)
    tags[:, 0], tags[:, -1] = VOCABULARY.cls, VOCABULARY.sep
    region_mask = torch.ones(size, REGIONS, dtype=torch.int64)
    region_mask[1:, -1] = 0
    tag_places = torch.arange(TAGS).expand(size, -1).clone()
    tag_places[:, -1] = 0
    return Batch(
        torch.zeros(size, 3, 0, 0),
        ids,
        (ids != VOCABULARY.pad).long(),
        torch.arange(size),
        phrase_places=places,
        phrase_words=words,
        tag_ids=tags,
        tag_mask=torch.ones_like(tags),
        tag_places=tag_places,
        regions=torch.randn(size, REGIONS, WIDTH + 6, generator=generator),
        region_mask=region_mask,
    )


def progress(seed: int = 0) -> Progress:
    return Progress(1, 100, 10.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_a_phrase_with_a_hidden_word_is_hidden_and_not_asked_for(seed: int) -> None:
    batch, system = batch_of(8, seed), mvptr()
    inputs = mask_inputs(batch, system.config, VOCABULARY, PHRASES, progress(seed).generator)
    words = batch.phrase_words
    assert words is not None
    standing = phrase_masks(batch)
    for row in range(len(batch)):
        for slot in range(SLOTS):
            if not standing[row, slot].any():
                assert not inputs.grounded[row, slot]
                continue
            place = int(standing[row, slot].nonzero())
            hidden = bool((inputs.word_labels[row][words[row, slot]] != IGNORED).any())
            label = int(inputs.phrase_labels[row, place])
            if hidden:
                assert int(inputs.text_ids[row, place]) == VOCABULARY.mask
                assert label == IGNORED
            assert bool(inputs.grounded[row, slot]) is (not hidden and label == IGNORED)
            if label != IGNORED:
                assert label == int(batch.input_ids[row, place]) - VOCABULARY.size
    kept = (inputs.word_labels == IGNORED) & (batch.phrase_places == 0)
    assert torch.equal(inputs.text_ids[kept], batch.input_ids[kept])
    special = (batch.input_ids <= VOCABULARY.sep).logical_or(batch.phrase_places > 0)
    assert (inputs.word_labels[special] == IGNORED).all()


def test_stage_one_hides_no_words_and_moves_no_fusion() -> None:
    system = mvptr(stage=1).train()
    inputs = mask_inputs(batch_of(), system.config, VOCABULARY, PHRASES, progress().generator)
    assert (inputs.word_labels == IGNORED).all()
    output = system(batch_of(), progress())
    assert set(output.losses) == {"mcr_v", "mcr_s", "vsc"}
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in system.named_parameters():
        frozen = name.startswith(("encoder.multimodal", "encoder.pooler", "word_head", "itm_head"))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


def test_stage_two_has_every_loss_and_moves_every_part() -> None:
    system = mvptr().train()
    output = system(batch_of(), progress())
    assert set(output.losses) == LOSSES
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_wrong_images_of_every_text_are_passed_once() -> None:
    """WPG's V' from ITM's pass and from its own: the same as a pass over all texts with their wrong images."""
    system, batch = mvptr().eval(), batch_of(6)
    seen = system._encode(batch, batch.input_ids, batch.tag_ids)  # type: ignore[arg-type]
    sims = system._contrast(seen, batch, {}, {})
    paired = system._pair(seen, batch, sims, progress(), Choices())
    found = system._other_images(paired, seen, batch)
    whole = system._fuse(seen, batch, torch.arange(6), paired.negatives.images).layers[system.config.wpg.layer]
    torch.testing.assert_close(found, whole)
    assert (paired.negatives.images != torch.arange(6)).all()


@pytest.mark.parametrize("changes", [{"wpg": Wpg(negatives="hard", pool="top3")}, {"clean_pass": True}])
def test_switches(changes: dict[str, Any]) -> None:
    output = mvptr(**changes).train()(batch_of(), progress())
    assert set(output.losses) == LOSSES
    assert all(loss.isfinite() for loss in output.losses.values())


def test_a_clean_pass_contrasts_what_is_not_hidden() -> None:
    batch, system = batch_of(), mvptr(clean_pass=True).train()
    first, second = (system(batch, progress(seed)).losses for seed in (0, 1))
    assert float(first["vsc"].detach()) == pytest.approx(float(second["vsc"].detach()))
    assert float(first["mcr_v"].detach()) != pytest.approx(float(second["mcr_v"].detach()))


def test_one_encoder_for_everything() -> None:
    """Table 4, last row: no contrast, uniform negatives, tags among what is read, concepts recovered from it all."""
    system = mvptr(fusion="merged", wpg=Wpg(layer=4)).train()
    output = system(batch_of(), progress())
    assert set(output.losses) == LOSSES - {"vsc"}
    torch.stack(list(output.losses.values())).sum().backward()
    batch = batch_of()
    image, text = system.encode_image(batch), system.encode_text(batch)
    assert system.similarity(image, text) is None
    assert image.tokens.shape[1] == TAGS - 1 + REGIONS
    system.after_step(progress(), DirectWriter())


@pytest.mark.parametrize("case", ["alone", "one image", "no phrases", "one region", "no regions"])
def test_edge_cases_contribute_nothing_and_crash_nothing(case: str) -> None:
    batch = batch_of(1 if case == "alone" else 3)
    if case == "one image":
        batch.image_ids = torch.zeros(3, dtype=torch.int64)
    if case == "no phrases":
        batch.input_ids = torch.where(batch.phrase_places > 0, VOCABULARY.pad, batch.input_ids)  # type: ignore[operator]
        batch.phrase_places = torch.zeros_like(batch.input_ids)
    if case in ("one region", "no regions"):
        batch.region_mask[:, int(case == "one region") :] = 0  # type: ignore[index]
    system = mvptr().train()
    output = system(batch, progress())
    torch.stack(list(output.losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in output.losses.values())
    if case in ("alone", "one image", "no phrases", "no regions"):
        assert float(output.losses["wpg"].detach()) == 0
    if case == "no phrases":
        assert float(output.losses["mcr_s"].detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())


def test_one_image_serves_many_texts() -> None:
    system, batch = mvptr().eval(), batch_of(3)
    image = system.encode_image(_rows(batch, slice(0, 1)))
    text = system.encode_text(batch)
    together = system.match_logits(system.fuse(text, image))
    for row in range(3):
        alone = system.encode_text(_rows(batch, slice(row, row + 1)))
        torch.testing.assert_close(system.match_logits(system.fuse(alone, image))[0], together[row])
    assert system.similarity(image, text).shape == (1, 3)  # type: ignore[union-attr]


def _rows(batch: Batch, rows: slice) -> Batch:
    tensors = {f.name: value[rows] for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)


def test_the_temperature_stays_in_its_range() -> None:
    system = mvptr(vsc=Vsc(temperature=0.07))
    for value in (-50.0, 50.0):
        system.logit_scale.data.fill_(value)
        system.after_step(progress(), DirectWriter())
        assert float((-system.logit_scale).exp()) * (1 + 1e-5) >= 0.001
        assert float((-system.logit_scale).exp()) <= 0.5 * (1 + 1e-5)


def test_one_copy_to_the_host_in_a_step() -> None:
    """The assignment's; nothing else waits for the device."""
    system, batch = mvptr(mcr=Mcr(order="ordered")).train(), batch_of()
    with Calls() as calls:
        output = system(batch, progress())
        torch.stack(list(output.losses.values())).sum().backward()
        system.after_step(progress(), DirectWriter())
    for name in ("_local_scalar_dense", "nonzero"):
        assert calls.counts[name] == 0, name
    assert phrase_slots(batch).any()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_forward_keeps_to_the_gpu() -> None:
    """With labels in order: the assignment leaves the device by design."""
    system, batch = mvptr(mcr=Mcr(order="ordered")).train(), batch_of()
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(system)
        tensors = {
            f.name: torch.empty_like(value, device="cuda")
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), Tensor)
        }
        output = system(replace(batch, **tensors), progress())
        assert {value.device.type for value in (*output.losses.values(), *output.metrics.values())} == {"cuda"}
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
