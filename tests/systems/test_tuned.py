"""Fine-tuning any system: what moves and what rests, what heads start from, distillation, one GPU, no sync."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.systems.albef_fixtures import DirectWriter
from tests.systems.fake_gpu import put_on_fake_gpu
from tests.systems.test_albef import Calls
from tests.systems.tuned_fixtures import ANSWERS, PAIRS, TASKS, batch_for, progress, tuned
from vlscale.config import Train
from vlscale.config.tasks import Distill, EntailmentTask, GroundingTask, Nlvr2Task, VqaTask
from vlscale.data.sample import Batch
from vlscale.engine.optim import build_optimizer
from vlscale.nn.heads import WordAnswerHead
from vlscale.objectives import answers
from vlscale.objectives.classification import classification_loss
from vlscale.systems.answer_heads import AnswerWordsHead
from vlscale.systems.task_heads import PairedHead
from vlscale.systems.tuned import Tuned

WRITER = DirectWriter()


def loss_of(system: Tuned, batch: Batch, step: int = 20) -> Tensor:
    output = system(batch, progress(step))
    assert list(output.losses) == [system.task.name]
    assert all(not value.requires_grad for value in output.metrics.values())
    return output.losses[system.task.name]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_what_the_task_reads_moves_and_all_else_stays(name: str, task: str) -> None:
    """Weight decay reaches nothing that has no gradient, and no optimizer pays for it."""
    system, batch = tuned(name, task), batch_for(name)
    optimizer = build_optimizer(system, Train(warmup_lr=1e-2, weight_decay=0.1), system.task)
    before = {key: value.detach().clone() for key, value in system.named_parameters()}
    for step in range(20, 23):
        loss_of(system, batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        system.after_step(progress(step), WRITER)
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key, parameter in system.named_parameters():
        assert (id(parameter) in owned) == parameter.requires_grad, key
        if not key.endswith(".key.bias"):  # a softmax does not feel it
            assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    resting = {key.split(".")[1] for key, parameter in system.named_parameters() if not parameter.requires_grad}
    heads = {"itm_head", "mlm_head", "codebook", "mvm_head", "word_head", "tag_head", "phrase_head", "vision_proj"}
    assert resting >= heads & dict(system.system.named_children()).keys()
    assert not any(key.startswith("head.") for key in before if not dict(system.named_parameters())[key].requires_grad)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_step_never_asks_the_device(name: str, task: str) -> None:
    chosen = TASKS[task]
    if hasattr(chosen, "distill") and task not in ("classify", "words"):
        chosen = chosen.model_copy(update={"distill": Distill(ramp=False)})
    system, batch = tuned(name, chosen), batch_for(name)
    with Calls() as calls:
        loss_of(system, batch).backward()
        system.after_step(progress(), WRITER)
    assert calls.counts["addmm"] > 0
    for operator in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
        assert calls.counts[operator] == 0, operator


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_forward_keeps_to_the_gpu(name: str, task: str) -> None:
    system, batch = tuned(name, task), batch_for(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(system)
        output = system(on_gpu(batch), progress())
        values = [*output.losses.values(), *output.metrics.values()]
        if task != "grounding":
            values.append(system.eval().predict(on_gpu(batch)))
        assert {value.device.type for value in values} == {"cuda"}
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}


def on_gpu(batch: Batch) -> Batch:
    """The same shapes on a GPU that is not there; ids stay what they are where they select."""

    def fake(value: Tensor) -> Tensor:
        return torch.empty_like(value, device="cuda")

    tensors: dict[str, Any] = {
        f.name: fake(value) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)
    }
    tensors["targets"] = {key: fake(value) for key, value in batch.targets.items()}
    tensors["right"] = None if batch.right is None else on_gpu(batch.right)
    return replace(batch, **tensors)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_native_half_precision_leaves_loss_and_teacher_in_full(name: str, task: str) -> None:
    """As the engine runs it: parameters in bfloat16, the forward under autocast; the teacher is not cast."""
    chosen = TASKS[task]
    if task in ("generate", "paired", "snli-ve", "passes"):
        chosen = chosen.model_copy(update={"distill": Distill(ramp=False)})
    system, batch = tuned(name, chosen).to(torch.bfloat16), batch_for(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(system, batch)
        assert loss.dtype == torch.float32
        if task != "grounding":
            scores = system.eval().predict(batch)
            assert (scores.dtype, bool(scores.isnan().any())) == (torch.float32, False)
    loss.backward()
    system.after_step(progress(), WRITER)
    assert loss.isfinite()
    floats = {value.dtype for value in system.carried_state().values() if value.is_floating_point()}
    assert floats <= {torch.float32}


# --- the losses -------------------------------------------------------------------------------------------------------


def test_two_images_are_read_in_their_order() -> None:
    """Both ways of NLVR2: another right image changes the verdict, and so does an exchange of the two."""
    for task in ("passes", "paired"):
        system, batch = tuned("albef", task).eval(), batch_for("albef")
        assert batch.right is not None
        swapped = replace(batch, images=batch.right.images, right=replace(batch.right, images=batch.images))
        other = replace(batch, right=replace(batch.right, images=batch.right.images.flip(0)))
        for changed in (swapped, other):
            assert not torch.allclose(system.predict(batch), system.predict(changed), atol=1e-6), task
        rows = system.predict(batch)
        assert torch.allclose(rows, torch.cat([system.predict(row(batch, i)) for i in range(len(batch))]), atol=1e-5)


def row(batch: Batch, number: int) -> Batch:
    kept = slice(number, number + 1)
    assert batch.right is not None
    right = replace(batch.right, images=batch.right.images[kept])
    return replace(
        batch,
        images=batch.images[kept],
        input_ids=batch.input_ids[kept],
        attention_mask=batch.attention_mask[kept],
        image_ids=batch.image_ids[kept],
        right=right,
    )


def test_generated_answers_are_weighted_sums_over_each_questions_answers() -> None:
    system, batch = tuned("cb_vila", "generate").eval(), batch_for("cb_vila")
    head, targets = system.head, batch.targets
    assert isinstance(head, AnswerWordsHead)
    total = torch.zeros(())
    for place, question in enumerate(targets["answer_of"].tolist()):
        one = row(batch, question)
        states = system.fuse(system.encode_text(one), system.encode_image(one))
        context, mask = head.decoder.project_context(states), one.attention_mask
        ids = targets["answer_ids"][place : place + 1][:, : int(targets["answer_mask"][place].sum())]
        words = head.decoder.word_logits(head.decoder(ids, torch.ones_like(ids), context, mask))
        total = total + targets["answer_weights"][place] * F.cross_entropy(words[0, :-1], ids[0, 1:], reduction="sum")
    torch.testing.assert_close(loss_of(system, batch), total / len(batch), atol=1e-4, rtol=1e-5)


def test_answers_that_are_no_candidates_have_no_chance() -> None:
    system, batch = tuned("albef", "generate").eval(), batch_for("albef")
    scores = system.predict(batch)
    assert scores.shape == (len(batch), len(ANSWERS))
    assert ((scores > -torch.inf).sum(1) == 3).all()
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(batch)))
    whole = tuned("albef", VqaTask(decoder_layers=2, candidates=128, max_answer=5)).eval()
    assert whole.predict(batch).isfinite().all()
    assert torch.equal(whole.predict(batch).argmax(1), scores.argmax(1))


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_phrases_learn_the_overlap_of_real_regions(kind: Any) -> None:
    system, batch = tuned("mvptr", GroundingTask(loss=kind)).eval(), batch_for("mvptr")
    scores = system.phrase_region_scores(batch, batch.targets["spans"])
    each = []
    assert batch.region_mask is not None
    for text, phrase in batch.targets["grounded"].nonzero().tolist():
        for region in batch.region_mask[text].nonzero()[:, 0].tolist():
            cosine, overlap = scores[text, phrase, region], batch.targets["overlaps"][text, phrase, region]
            chance = torch.sigmoid(10 * (cosine - 0.5))
            cross = -(overlap * chance.log() + (1 - overlap) * (1 - chance).log())
            each.append(cross if kind == "bce" else (cosine - overlap) ** 2)
    torch.testing.assert_close(loss_of(system, batch), torch.stack(each).mean())


def test_a_tuned_layer_is_the_one_that_is_asked() -> None:
    system, batch = tuned("mvptr", GroundingTask(layer=0)), batch_for("mvptr")
    assert (system.grounding_layer, system.system.grounding_layer) == (0, 2)
    resting = {key for key, parameter in system.named_parameters() if not parameter.requires_grad}
    assert any(key.startswith("system.encoder.multimodal.layer.1.") for key in resting)
    loss_of(system, batch).backward()
    assert all(parameter.grad is not None for parameter in system.parameters() if parameter.requires_grad)
    with pytest.raises(TypeError, match="phrase_region_scores"):
        system.predict(batch)
    assert not hasattr(tuned("albef", "snli-ve"), "grounding_layer")


def test_text_assignment_comes_first() -> None:
    """The teacher follows at once while it lasts, and distillation ramps up from its end."""
    task = Nlvr2Task(mode="paired", assignment_steps=5, distill=Distill())
    system, batch = tuned("albef", task), batch_for("albef")
    output = system(batch, progress(4))
    assert set(output.losses) == {"nlvr2"}
    assert set(output.metrics) == {"assignment_accuracy"}
    output.losses["nlvr2"].backward()
    assert isinstance(system.head, PairedHead)
    assert system.head.assignment.weight.grad is not None
    assert system.head.encoder.layer[0].crossattention.self.key.weight.grad is not None  # type: ignore[union-attr]
    with torch.no_grad():
        system.head.encoder.layer[0].output.dense.weight.add_(1.0)  # type: ignore[union-attr, operator]
    system.after_step(progress(4), WRITER)
    assert system.teacher is not None
    taught, own = system.teacher["head"].encoder.layer[0], system.head.encoder.layer[0]
    assert torch.equal(taught.output.dense.weight, own.output.dense.weight)  # type: ignore[union-attr]
    assert set(system(batch, progress(5)).metrics) == {"accuracy"}
    assert [system._alpha(progress(step)) for step in (5, 10, 15, 40)] == [0.0, 0.2, 0.4, 0.4]
    assert not hasattr(tuned("albef", "paired").head, "assignment")


# --- what heads start from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvptr", "soho", "albef"])
def test_answers_start_from_their_words(name: str) -> None:
    system = tuned(name, "words")
    decoder, bias = system.word_decoder()
    head = system.head.classifier
    assert isinstance(head, WordAnswerHead)
    for place, pieces in enumerate(ANSWERS):
        torch.testing.assert_close(head.weight[place], decoder[list(pieces)].mean(0))
        torch.testing.assert_close(head.bias[place], bias[list(pieces)].mean())


def test_both_layers_of_a_pair_start_from_the_fusion_layer() -> None:
    system = tuned("codis", "paired")
    assert isinstance(system.head, PairedHead)
    for number, layer in enumerate(system.head.encoder.layer):
        theirs = system.fusion_encoder.layer[number // 2].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in layer.state_dict().items())


def test_a_decoder_of_another_depth_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    system = tuned("cb_vila", "generate")
    assert isinstance(system.head, AnswerWordsHead)
    words = system.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(system.head.decoder.embeddings.word_embeddings.weight, words)
    with caplog.at_level(logging.WARNING):
        deeper = tuned("cb_vila", VqaTask(decoder_layers=3))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("task.decoder_layers: 3 layers, but 2 with cross-attention to start from")
    assert isinstance(deeper.head, AnswerWordsHead)
    assert not torch.equal(deeper.head.decoder.embeddings.word_embeddings.weight, words)


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [("albef", "generate"), ("albef", "paired"), ("codis", "snli-ve"), ("soho", "passes"), ("mvptr", "snli-ve")],
)
def test_the_teacher_is_the_tuned_model_of_a_while_ago(name: str, task: str) -> None:
    """Asked as a whole copy with averaged weights would be; its state is carried and comes back."""
    chosen: Any = TASKS[task].model_copy(update={"distill": Distill(momentum=0.9, alpha=0.4, ramp=False)})
    system, batch = tuned(name, chosen), batch_for(name)
    twin = copy.deepcopy(system)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.mul_(1.5)
        for mine, theirs in zip(twin.parameters(), system.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)
    system.after_step(progress(), WRITER)
    expected = twin.eval().head.logits(twin.system, batch).detach()  # type: ignore[arg-type]
    torch.testing.assert_close(system._teach(batch), expected, atol=1e-5, rtol=1e-4)

    system.eval()  # the two agree on statistics of BatchNorm then
    logits = system.head.logits(system.system, batch)  # type: ignore[arg-type]
    if task == "generate":
        targets = batch.targets
        each = answers.answer_losses(logits, targets["answer_ids"], targets["answer_mask"], expected, 0.4)
        loss = answers.question_loss(each, targets["answer_weights"], len(batch))
    else:
        loss = classification_loss(logits, batch.targets["labels"], expected, 0.4)
    torch.testing.assert_close(loss_of(system, batch), loss, atol=1e-4, rtol=1e-4)

    fresh = tuned(name, chosen, seed=1)
    fresh.load_carried_state({key: value.clone() for key, value in system.carried_state().items()})
    fresh.place(torch.device("cpu"))
    assert all(torch.equal(value, system.carried_state()[key]) for key, value in fresh.carried_state().items())


def test_only_the_task_has_a_teacher() -> None:
    """Neither the teacher of pre-training nor its queues are kept; what the task doesn't read has no copy."""
    plain = tuned("albef", "snli-ve")
    assert plain.carried_state() == {}
    assert plain.system.carried_state() == {}
    with pytest.raises(KeyError, match="teacher"):
        plain.load_carried_state({"teacher.vision": torch.zeros(1)})
    taught = tuned("albef", EntailmentTask(distill=Distill()))
    parts = {".".join(key.split(".")[1:3]) for key in taught.carried_state() if key.startswith("teacher.system.")}
    assert parts == {"system.vision", "system.text_encoder", "system.fusion_encoder"}
    assert any(key.startswith("teacher.head.") for key in taught.carried_state())
    assert [taught._alpha(progress(step)) for step in (0, 5, 10, 30)] == [0.0, 0.2, 0.4, 0.4]
    steady = tuned("albef", EntailmentTask(distill=Distill(ramp=False)))
    assert steady._alpha(progress(0)) == 0.4


# --- a system with a head is still that system ------------------------------------------------------------------------


def test_it_answers_as_the_system_inside() -> None:
    system, batch = tuned("cb_vila", "snli-ve").eval(), batch_for("cb_vila")
    image, text = system.encode_image(batch), system.encode_text(batch)
    states = system.fuse(text, image)
    inside: Any = system.system
    assert torch.equal(system.match_logits(states), inside.match_logits(states))
    assert torch.equal(system.similarity(image, text), inside.similarity(image, text))
    assert (system.grid, system.config, system.codebooks().keys()) == (inside.grid, inside.config, {"visual"})
    assert system.no_weight_decay() == {f"system.{name}" for name in inside.no_weight_decay()}
    with pytest.raises(AttributeError, match="momentum"):
        _ = system.momentum
    names = {name.partition(".")[0] for name in system.state_dict()}
    assert names == {"system", "head"}


def test_features_go_past_the_dictionary() -> None:
    """Section 4.2 of SOHO: its input, not its codes, which fine-tuning leaves alone."""
    system, batch = tuned("soho", "classify"), batch_for("soho")
    codes = system.neck.dictionary.codes.clone()
    loss_of(system, batch).backward()
    system.after_step(progress(), WRITER)
    assert torch.equal(system.neck.dictionary.codes, codes)
    system.eval()
    before = system.predict(batch)
    system.neck.dictionary.codes.normal_()
    assert torch.equal(system.predict(batch), before)


def test_a_backbone_may_rest_in_a_task_too() -> None:
    system = tuned("soho", "snli-ve")
    backbone = [p for name, p in system.named_parameters() if name.startswith("system.backbone.")]
    assert system.rest(progress(0))
    assert not any(parameter.requires_grad for parameter in backbone)
    assert not system.rest(progress(20))
    assert all(parameter.requires_grad for parameter in backbone)
    assert not system.system.get_submodule("itm_head").weight.requires_grad  # type: ignore[union-attr]


def test_modules_are_shared_not_copied() -> None:
    from vlscale.systems.tuned import with_parts

    system = tuned("albef", "snli-ve").system
    other = with_parts(system, {"vision": nn.Identity()})
    assert isinstance(other.vision, nn.Identity)
    assert not isinstance(system.vision, nn.Identity)
    assert other.text_encoder is system.text_encoder
