"""ALBEF as the engine uses it: one step, what is carried, what survives bad batches, what never asks the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.systems.albef_fixtures import VOCABULARY, DirectWriter, progress, tiny_albef, tiny_batch
from vlscale import distributed
from vlscale.config import LOSSES, Teacher
from vlscale.data.sample import Batch
from vlscale.objectives.masking import masking_capacity
from vlscale.systems.albef import Albef
from vlscale.systems.momentum import mask_texts
from vlscale.systems.protocol import Choices, Progress, StepOutput


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def state_of(system: Albef) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in system.carried_state().items()}


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.images[rows], batch.input_ids[rows], batch.attention_mask[rows], batch.image_ids[rows])


def test_losses_are_those_that_weights_may_name_and_reach_every_parameter() -> None:
    system = tiny_albef().train()
    output = system(tiny_batch(), progress())
    assert tuple(output.losses) == LOSSES["albef"]
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in output.losses.values())
    assert not any(metric.requires_grad for metric in output.metrics.values())
    total(output).backward()
    assert [name for name, parameter in system.named_parameters() if parameter.grad is None] == []
    assert system.no_weight_decay() <= dict(system.named_parameters()).keys()


def test_alpha_rises_over_epoch_0() -> None:
    system = tiny_albef()
    rising = [system.momentum.alpha(Progress(step, 100, steps_per_epoch=4.0)) for step in range(6)]
    assert rising == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_generator_decides() -> None:
    system = tiny_albef().train()
    first, again, other = (system(tiny_batch(8), progress(seed=seed)).losses for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mlm"], other["mlm"])


def test_choices_fix_the_draws() -> None:
    system, batch = tiny_albef().train(), tiny_batch()
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:3] = batch.input_ids[:, 1:3]
    choices = Choices(
        negative_images=torch.tensor([1, 2, 3, 0]),
        negative_texts=torch.tensor([3, 0, 1, 2]),
        masked_input_ids=batch.input_ids.masked_fill(labels != -100, VOCABULARY.mask),
        mlm_labels=labels,
    )
    first, again = (system(batch, progress(seed=seed), choices).losses for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_after_step_moves_teacher_and_queues_once() -> None:
    """Two micro-batches push what one batch does, in order; the teacher follows the formula."""
    batch, whole, parts = tiny_batch(), tiny_albef().train(), tiny_albef().train()
    before = state_of(parts)
    whole(batch, progress())
    for rows in (slice(0, 2), slice(2, 4)):
        parts(part(batch, rows), progress())
        assert all(torch.equal(value, before[name]) for name, value in parts.carried_state().items())
    for system in (whole, parts):
        with torch.no_grad():
            for parameter in system.parameters():
                parameter += 0.5
        system.after_step(progress(), DirectWriter())
    after = state_of(parts)
    assert after["image_queue.pointer"].tolist() == [4]
    for name, value in whole.carried_state().items():
        assert torch.allclose(after[name], value, atol=1e-6), name
    for name in ("image_queue.features", "text_queue.features"):
        assert not torch.equal(after[name][:, :4], before[name][:, :4])
        assert torch.equal(after[name][:, 4:], before[name][:, 4:])
    momentum = parts.config.teacher.momentum
    students = parts.state_dict()
    for name, value in after.items():
        if name.startswith("teacher."):
            expected = momentum * before[name] + (1 - momentum) * students[name.removeprefix("teacher.")]
            assert torch.allclose(value, expected, atol=1e-6), name
    parts.after_step(progress(2), DirectWriter())  # nothing new was seen
    assert parts.momentum.image_queue.pointer == 4


def test_features_of_a_skipped_step_are_not_pushed() -> None:
    batch, clean = tiny_batch(), tiny_albef().train()
    system = tiny_albef().train()
    bad = tiny_batch(seed=1)
    bad.images[:] = torch.nan
    system(bad, progress(1))  # after_step is not called: the engine skipped the step
    for one in (system, clean):
        one(batch, progress(2))
        one.after_step(progress(2), DirectWriter())
    assert all(torch.equal(value, clean.carried_state()[name]) for name, value in system.carried_state().items())


def test_evaluation_leaves_nothing_behind() -> None:
    system = tiny_albef().eval()
    before = state_of(system)
    with torch.no_grad():
        system(tiny_batch(), progress())
    system.after_step(progress(), DirectWriter())
    assert torch.equal(system.momentum.image_queue.features, before["image_queue.features"])


def test_temperature_is_written_back_into_its_range() -> None:
    system = tiny_albef()
    with torch.no_grad():
        system.temperature.fill_(0.9)
    assert float(system(tiny_batch(), progress()).metrics["temperature"]) == pytest.approx(0.5)
    system.after_step(progress(), DirectWriter())
    assert float(system.temperature.detach()) == 0.5


def test_teacher_and_queues_are_not_registered() -> None:
    system = tiny_albef()
    assert not any("teacher" in name or "queue" in name for name in system.state_dict())
    states = system.carried_state()
    assert {value.dtype for value in states.values()} == {torch.float32, torch.int64}
    system.bfloat16()
    assert all(value.dtype != torch.bfloat16 for value in system.carried_state().values())


def test_going_on_from_carried_state_is_exact() -> None:
    system = tiny_albef().train()
    system(tiny_batch(), progress())
    with torch.no_grad():
        system.vision_proj.weight += 0.1
    system.after_step(progress(), DirectWriter())
    restored = tiny_albef(seed=9).train()
    restored.load_state_dict(system.state_dict())
    restored.load_carried_state(state_of(system))
    first, again = (one(tiny_batch(seed=2), progress(2)).losses for one in (system, restored))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(KeyError, match=r"text_queue\.pointer"):
        restored.load_carried_state({k: v for k, v in state_of(system).items() if k != "text_queue.pointer"})


@pytest.mark.parametrize("ids", [[0], [5, 5, 5]])
def test_batches_without_negatives_train_on(ids: list[int]) -> None:
    system = tiny_albef().train()
    batch = tiny_batch(len(ids))
    batch.image_ids = torch.tensor(ids)
    output = system(batch, progress())
    assert float(output.losses["itm"].detach()) == 0
    assert float(output.metrics["itm_skipped"]) == 3 * len(ids)
    total(output).backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)


def test_non_finite_similarities_are_counted_not_raised() -> None:
    batch = tiny_batch()
    batch.images[1] = torch.inf
    output = tiny_albef().train()(batch, progress())
    assert float(output.metrics["nonfinite_similarities"]) > 0
    assert not torch.isfinite(output.losses["itc"])


def test_equal_image_ids_share_the_target() -> None:
    system, batch = tiny_albef(teacher=Teacher(queue_size=10, alpha=0.0)).train(), tiny_batch()
    batch.image_ids = torch.tensor([0, 1, 0, 2])
    image, text = system.encode_image(batch), system.encode_text(batch)
    masked = mask_texts(batch, VOCABULARY, 0.15, progress(), Choices())
    taught = system.momentum.teach(batch, masked, 0.0, torch.float32)
    targets = system.contrast(image.pooled, text.pooled, taught, batch.image_ids, 0.0).targets_i2t
    assert targets[0].tolist() == [0.5, 0, 0.5, 0] + [0] * 10


def test_vocabulary_projection_sees_the_masked_rows_only() -> None:
    system, batch = tiny_albef(), tiny_batch(16)
    seen: list[int] = []
    system.mlm_head.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    system(batch, progress())
    assert seen == [masking_capacity(*batch.input_ids.shape, system.config.mlm_probability)]
    assert seen[0] < batch.input_ids.numel() / 2


def test_what_tasks_see() -> None:
    system, batch = tiny_albef().eval(), tiny_batch()
    image, text = system.encode_image(batch), system.encode_text(batch)
    assert system.grid == (4, 4)
    assert image.tokens.shape == (4, 17, 24)
    assert image.mask.shape == (4, 17)
    assert torch.allclose(image.pooled.norm(dim=1), torch.ones(4))
    similarity = system.similarity(image, text)
    assert torch.allclose(similarity, image.pooled @ text.pooled.T / 0.07, atol=1e-5)
    fused = system.fuse(text, image)
    assert fused.shape == (4, 9, 16)
    assert system.match_logits(fused).shape == (4, 2)
    assert system.codebooks() == {}
    assert system.codebook_features(batch) == {}


class Calls(TorchDispatchMode):
    """Counts the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_never_asks_the_device() -> None:
    system, batch = tiny_albef().train(), tiny_batch()
    with Calls() as calls:
        total(system(batch, progress())).backward()
        system.after_step(progress(), DirectWriter())
    assert calls.counts["addmm"] > 0
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
        assert calls.counts[name] == 0, name


def _fake_parameters(module: nn.Module) -> None:
    """Stand-ins on a GPU that is not there; called under FakeTensorMode."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="cuda"), parameter.requires_grad
                )
        assert not one._buffers


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_forward_keeps_to_the_gpu(dtype: torch.dtype) -> None:
    """Mixed devices and data-dependent shapes raise under fake tensors; native half precision takes float images."""
    system, batch = tiny_albef().to(dtype).train(), tiny_batch()
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
        system.after_step(progress(), DirectWriter())
        assert system.momentum.image_queue.features.device.type == "cuda"


def test_two_ranks_carry_the_same_state_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every rank pushes is what all of them saw, rank by rank."""
    batch, ranks, alone = tiny_batch(), [tiny_albef().train() for _ in range(2)], tiny_albef().train()
    for rank, system in enumerate(ranks):
        system(part(batch, slice(2 * rank, 2 * rank + 2)), progress())
    gathered = torch.cat([features for system in ranks for features in system.momentum.kept])
    alone(batch, progress())
    alone.after_step(progress(), DirectWriter())
    monkeypatch.setattr(distributed, "gather", lambda _local: gathered)
    for system in ranks:
        system.after_step(progress(), DirectWriter())
        for name, value in alone.carried_state().items():
            assert torch.allclose(system.carried_state()[name], value, atol=1e-6), name
