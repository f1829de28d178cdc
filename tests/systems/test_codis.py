"""CODIS: four ways to align, a codebook for both, switches of the slides' ablation, state that survives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.systems.albef_fixtures import IMAGE_SIZE, VOCABULARY, progress, tiny_batch, tiny_config
from tests.systems.test_albef import Calls, _fake_parameters
from vlscale.config import LOSSES, AlignOptions, CodisSystem, PrototypeOptions, Teacher
from vlscale.data.sample import Batch
from vlscale.systems.albef import Albef
from vlscale.systems.codis import Codis
from vlscale.systems.momentum import unit
from vlscale.systems.protocol import StepOutput

TEACHER = Teacher(queue_size=10, momentum=0.9)


class Writer:
    """Parameters are written where they lie."""

    def read(self, parameter: torch.nn.Parameter) -> Tensor:
        return parameter.detach().float()

    def write(self, parameter: torch.nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def reset_moments(self, parameter: torch.nn.Parameter, rows: Tensor) -> None:
        pass


def codis(
    seed: int = 0,
    code: bool = True,
    left_out: frozenset[str] = frozenset(),
    queue_ids: bool = False,
    **changes: Any,
) -> Codis:
    albef = tiny_config()
    config = CodisSystem(
        vision=albef.vision,
        text=albef.text,
        embed_dim=8,
        teacher=TEACHER,
        codebook=PrototypeOptions(size=6),
    ).model_copy(update=changes)
    torch.manual_seed(seed)
    return Codis(config, IMAGE_SIZE, VOCABULARY, left_out if code else left_out | {"code"}, queue_ids=queue_ids)


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def test_losses_are_those_that_weights_may_name() -> None:
    output = codis().train()(tiny_batch(), progress())
    assert set(output.losses) == set(LOSSES["codis"])
    assert all(loss.isfinite() and loss.requires_grad for loss in output.losses.values())
    names = {f"align_{term}" for term in ("i2t", "t2i", "i2i", "t2t")}
    names |= {f"code_{term}" for term in ("i2p", "t2p", "ot_image", "ot_text")}
    assert names | {"code_agreement", "codebook_perplexity", "codebook_dead"} <= set(output.metrics)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_align_is_the_sum_of_its_four_terms_written_out() -> None:
    """Slides, part 2: softmax over the current teacher features and the queue, one-hot within a modality."""
    system, batch = codis(teacher=TEACHER.model_copy(update={"alpha": 0.0})).train(), tiny_batch()
    output = system(batch, progress())
    image, text = system.encode_image(batch).pooled, system.encode_text(batch).pooled
    teacher, queues = system.momentum.teacher, system.momentum
    taught_image = F.normalize(teacher["vision_proj"](teacher["vision"](batch.images)[:, 0]), dim=1)
    encoded = teacher["text_encoder"](batch.input_ids, batch.attention_mask)
    taught_text = F.normalize(teacher["text_proj"](encoded[:, 0]), dim=1)
    views = {
        "align_i2t": (image, taught_text, queues.text_queue),
        "align_t2i": (text, taught_image, queues.image_queue),
        "align_i2i": (image, taught_image, queues.image_queue),
        "align_t2t": (text, taught_text, queues.text_queue),
    }
    expected = 0.0
    for name, (student, taught, queue) in views.items():
        candidates = torch.cat([taught, queue.features.T])  # [B + Q, d]
        rows = [-((s @ candidates.T / 0.07).log_softmax(0)[row]) for row, s in enumerate(student)]
        term = float(torch.stack(rows).mean().detach())
        assert float(output.metrics[name]) == pytest.approx(term, rel=1e-4), name
        expected += term
    assert float(output.losses["align"]) == pytest.approx(expected, rel=1e-4)
    averaged = codis(teacher=system.config.teacher, align=AlignOptions(reduce="mean")).train()(batch, progress())
    assert float(averaged.losses["align"]) == pytest.approx(expected / 4, rel=1e-4)


def test_without_intra_terms_and_codebook_it_is_albef() -> None:
    """Row (a) of the slides' ablation: equal weights, equal draws, equal losses."""
    row_a, batch = codis(code=False, align=AlignOptions(intra=False)).train(), tiny_batch()
    albef = Albef(tiny_config(teacher=TEACHER), IMAGE_SIZE, VOCABULARY).train()
    albef.load_state_dict({k: v for k, v in row_a.state_dict().items() if not k.startswith("codebook.")})
    albef.momentum.teacher.copy_students()
    row_a.momentum.teacher.copy_students()

    ours, theirs = row_a(batch, progress(3, seed=7)), albef(batch, progress(3, seed=7))
    assert set(ours.losses) == {"align", "itm", "mlm"}
    for name, other in (("align", "itc"), ("itm", "itm"), ("mlm", "mlm")):
        assert torch.equal(ours.losses[name], theirs.losses[other]), name
    assert row_a.codebooks() == {}
    assert row_a.codebook_pairs(batch) == {}


@pytest.mark.parametrize("feature", ["teacher", "student"])
def test_whose_features_are_transported(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, batch = codis(codebook=PrototypeOptions(size=6, feature=feature)).train(), tiny_batch()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in system.vision_proj.parameters():  # student and teacher differ
            parameter.mul_(-1)
    seen: list[Tensor] = []
    original = system.codebook.transported
    monkeypatch.setattr(system.codebook, "transported", lambda f: seen.append(f) or original(f))
    system(batch, progress())
    student = system.encode_image(batch).pooled.detach()
    assert torch.allclose(seen[0], student if feature == "student" else -student, atol=1e-5)
    assert not any(features.requires_grad for features in seen)


def test_gradient_of_the_code_loss_moves_both_encoders_and_the_codes() -> None:
    system = codis().train()
    system(tiny_batch(), progress()).losses["code"].backward()
    for name in ("vision_proj.weight", "text_proj.weight", "codebook.codes"):
        gradient = system.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
    assert system.itm_head.weight.grad is None


def test_image_and_text_of_a_pair_choose_the_same_code() -> None:
    system, batch = codis().train(), tiny_batch()
    output = system(batch, progress())
    book = system.codebook
    image, text = book.assign(system.encode_image(batch).pooled), book.assign(system.encode_text(batch).pooled)
    assert float(output.metrics["code_agreement"]) == pytest.approx(float((image == text).float().mean()))
    system.after_step(progress(), Writer())
    counts = torch.bincount(torch.cat([image, text]), minlength=6)
    torch.testing.assert_close(book.tracker.counts, counts * (1 - book.tracker.DECAY))
    pair = system.codebook_pairs(batch)["shared"]
    assert [book.assign(features).tolist() for features in pair] == [image.tolist(), text.tolist()]
    assert system.codebooks()["shared"] is book


def test_the_code_loss_alone_brings_pairs_together() -> None:
    """Trained on `code` only, one batch's images and texts come to choose the same codes, and many of them."""
    system = codis(codebook=PrototypeOptions(size=4)).train()
    batch = tiny_batch(8)
    optimizer = torch.optim.Adam(system.parameters(), lr=0.02)
    first = last = 0.0
    for step in range(80):
        output = system(batch, progress(step=step))
        first = first or float(output.losses["code"].detach())
        last = float(output.losses["code"].detach())
        optimizer.zero_grad()
        output.losses["code"].backward()
        optimizer.step()
        system.after_step(progress(step=step), Writer())
    assert last < 0.6 * first
    # Chance is 1 in 4; which way it goes depends on the last bits, and so on the number of threads.
    assert float(output.metrics["code_agreement"]) >= 0.75
    assert len(system.codebook.assign(system.encode_image(batch).pooled).unique()) == 4


def test_the_teacher_sees_the_second_view() -> None:
    """And nobody else does: what the teacher learned of the second crop is kept, the student sees the first."""
    batch, other = tiny_batch(), tiny_batch(seed=1)
    both = replace(batch, second_images=other.images)
    kept = []
    for seen in (batch, replace(batch, second_images=batch.images), both):
        system = codis().train()
        system(seen, progress(step=1))
        kept.append(system.momentum.kept[0])
    width = kept[0].shape[1] // 2
    assert torch.equal(kept[0], kept[1])
    assert not torch.allclose(kept[0][:, :width], kept[2][:, :width])
    assert torch.equal(kept[0][:, width:], kept[2][:, width:])
    teacher = codis().momentum.teacher
    expected = unit(teacher["vision_proj"](teacher["vision"](other.images)[:, 0]))
    torch.testing.assert_close(kept[2][:, :width], expected)


def test_state_goes_out_and_comes_back() -> None:
    system, other = codis().train(), codis(seed=1).train()
    for step in range(2):
        system(tiny_batch(seed=step), progress(step=step))
        system.after_step(progress(step=step), Writer())
    state = {name: value.clone() for name, value in system.carried_state().items()}
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    other.load_carried_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.carried_state().items())
    with pytest.raises(KeyError, match=r"missing \['codebook\.counts'\]"):
        other.load_carried_state({name: value for name, value in state.items() if name != "codebook.counts"})


def test_a_step_never_asks_the_device() -> None:
    system, batch = codis().train(), tiny_batch()
    with Calls() as calls:
        total(system(batch, progress())).backward()
        system.after_step(progress(), Writer())
    assert calls.counts["addmm"] > 0
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
        assert calls.counts[name] == 0, name


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_forward_keeps_to_the_gpu(dtype: torch.dtype) -> None:
    system, batch = codis().to(dtype).train(), tiny_batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (system, *system.momentum.teacher.modules.values()):
            _fake_parameters(module)
        system.place(torch.device("cuda"))
        on_gpu = Batch(
            *(torch.empty_like(t, device="cuda") for t in (batch.images, batch.input_ids, batch.attention_mask)),
            torch.empty_like(batch.image_ids, device="cuda"),
        )
        output = system(on_gpu, progress())
        assert {value.device.type for value in (*output.losses.values(), *output.metrics.values())} == {"cuda"}
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
        system.after_step(progress(), Writer())


@pytest.mark.parametrize("ids", [[0, 0, 0, 0], [0]])
def test_batches_without_negatives(ids: list[int]) -> None:
    batch = tiny_batch(len(ids))
    batch.image_ids = torch.tensor(ids)
    output = codis().train()(batch, progress())
    assert all(loss.isfinite() for loss in output.losses.values())
