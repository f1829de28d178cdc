"""ALBEF's downstream tasks against recordings of the public release: logits, losses, gradients, teachers, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from tests.parity.test_albef import build
from vlscale.interop.albef_tasks import Kind, load_task_weights, our_names
from vlscale.nn.bert import TextEncoder, select_context
from vlscale.nn.decoder import AnswerDecoder
from vlscale.nn.heads import ClassHead
from vlscale.nn.paired import PairedFusionEncoder
from vlscale.nn.queue import FeatureQueue, IdQueue
from vlscale.nn.teacher import Teacher
from vlscale.nn.vision import VisionEncoder
from vlscale.objectives import answers, assignment, classification, contrastive, matching
from vlscale.systems.albef import Albef
from vlscale.systems.momentum import match_states, unit

FOLDER = REFERENCE / "albef"
TEACHERS: dict[Kind, tuple[str, ...]] = {
    "ve": ("vision", "text_encoder", "fusion_encoder", "class_head"),
    "nlvr": ("vision", "text_encoder", "paired_encoder", "class_head"),
    "vqa": ("vision", "text_encoder", "fusion_encoder", "decoder"),
    "retrieval": ("vision", "vision_proj", "text_encoder", "text_proj", "fusion_encoder"),
}
"""Parts that have a momentum copy."""
CLASSES: dict[Kind, int] = {"ve": 3, "nlvr": 2}


class Parts(nn.Module):
    """What a fine-tuned model is made of, under the names that the importer gives."""

    vision: VisionEncoder
    text_encoder: TextEncoder

    def __init__(self, base: Albef, kind: Kind, decoder_layers: int | None = None) -> None:
        super().__init__()
        config, width, context = base.config.text, base.config.text.width, base.vision.width
        shared = ["vision", "text_encoder"]
        if kind == "retrieval":
            shared += ["fusion_encoder", "vision_proj", "text_proj", "itm_head"]
            self.temperature = base.temperature
        elif kind in ("nlvr", "nlvr_pretrain"):
            self.paired_encoder = PairedFusionEncoder(config, context)
        else:
            shared.append("fusion_encoder")
        if kind == "nlvr_pretrain":
            shared += ["vision_proj", "text_proj"]
            self.temperature = base.temperature
            self.assignment_head = nn.Linear(width, 3)
        if kind in CLASSES:
            self.class_head = ClassHead(width, CLASSES[kind], hidden=width)
        if kind == "vqa":
            self.decoder = AnswerDecoder(config, base.vocabulary, decoder_layers)
        for name in shared:
            setattr(self, name, getattr(base, name))


class Replay:
    """A recorded call of a fine-tuned model, run again by our parts."""

    def __init__(self, path: Path) -> None:
        self.case = case = Case(path)
        self.kind: Kind = case.metadata["kind"]  # type: ignore[assignment]
        self.sizes = config_of(path.parent)
        self.alpha = float(case.metadata.get("alpha", "0"))
        self.distill = case.metadata.get("distill") == "True"
        base = build(self.sizes, self.alpha)
        self.parts: Any = Parts(base, self.kind, self.sizes["vqa_decoder"]["layers"])
        self.layers = self.sizes["fusion_layer"]
        self.carried = load_task_weights(self.parts, case.weights(), self.kind, self.layers, base.grid)
        self.images, self.ids, self.mask = case["in.image"], case["in.input_ids"], case["in.attention_mask"]

    def teacher(self) -> Teacher:
        """Loaded, then moved once: the release moves it at the start of a forward."""
        momentum = self.sizes["momentum" if self.kind == "retrieval" else "finetune_momentum"]
        teacher = Teacher({name: getattr(self.parts, name) for name in TEACHERS[self.kind]}, momentum)
        prefix = "teacher."
        given = {k.removeprefix(prefix): value for k, value in self.carried.items() if k.startswith(prefix)}
        assert given.keys() == teacher.state().keys()
        teacher.load_state(given)
        teacher.update()
        return teacher

    def fused(self, parts: Any) -> Tensor:
        """[B, L, D] of texts over their images; `parts` are a student's or a teacher's."""
        context = parts["fusion_encoder"].project_context(parts["vision"](self.images))
        return parts["fusion_encoder"](parts["text_encoder"](self.ids, self.mask), self.mask, context)

    def paired(self, parts: Any, cls_only: bool = False) -> Tensor:
        """[B, L, D] of texts over two images each."""
        first, second = torch.arange(2 * len(self.ids)).chunk(2)
        context = parts["paired_encoder"].project_context(parts["vision"](self.images))
        images = select_context(context, first), select_context(context, second)
        texts = parts["text_encoder"](self.ids, self.mask)
        return parts["paired_encoder"](texts, self.mask, *images, cls_only=cls_only)

    def check_gradients(self, loss: Tensor) -> None:
        loss.backward()
        parameters = dict(self.parts.named_parameters())
        recorded = self.case.names("grad.")
        assert recorded
        for name in recorded:
            (ours,) = our_names(name.removeprefix("grad."), self.kind, self.layers)
            self.case.check(name, parameters[ours].grad)


class Student:
    """Parts by name, as a teacher gives them."""

    def __init__(self, parts: nn.Module) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Any:
        return getattr(self.parts, name)


@pytest.mark.parametrize("path", cases("albef", "case_ve_*.safetensors"))
def test_visual_entailment(path: Path) -> None:
    replay = Replay(path)
    case, student = replay.case, Student(replay.parts)
    hidden = replay.fused(student)
    logits = student["class_head"](hidden[:, 0])
    case.check("hidden", hidden)
    case.check("logits", logits)
    case.check("prediction_eval", logits)
    taught = None
    if replay.distill:
        teacher = replay.teacher()
        with torch.no_grad():
            taught = teacher["class_head"](replay.fused(teacher)[:, 0])
        case.check("logits_m", taught)
    loss = classification.classification_loss(logits, case["in.targets"], taught, replay.alpha)
    case.check("loss", loss)
    replay.check_gradients(loss)


@pytest.mark.parametrize("path", cases("albef", "case_nlvr_alpha*.safetensors"))
def test_two_images(path: Path) -> None:
    replay = Replay(path)
    case, student = replay.case, Student(replay.parts)
    layers = [*replay.parts.text_encoder.layer, *replay.parts.paired_encoder.layer]
    assert len(layers) == replay.sizes["nlvr_layers"] == len(case.names("text_layer"))
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=f"text_layer{index}": seen.__setitem__(name, output))
        for index, layer in enumerate(layers)
    ]
    hidden = replay.paired(student)
    for hook in hooks:
        hook.remove()
    for name in case.names("text_layer"):
        case.check(name, seen[name])
    case.check("hidden", hidden)
    case.check("logits", student["class_head"](hidden[:, 0]))
    logits = student["class_head"](replay.paired(student, cls_only=True)[:, 0])
    case.check("logits", logits)  # CLS only through the last layer changes nothing
    case.check("prediction_eval", logits)
    teacher = replay.teacher()
    with torch.no_grad():
        taught = teacher["class_head"](replay.paired(teacher)[:, 0])
    case.check("logits_m", taught)
    loss = classification.classification_loss(logits, case["in.targets"], taught, replay.alpha)
    case.check("loss", loss)
    replay.check_gradients(loss)


def recorded_draws(case: Case, size: int) -> assignment.Draws:
    """The release draws text by text: ⅓, then the image or images, then for one image its side."""
    rand = iter(case["choice.rand"].flatten().tolist())
    several = iter(case[name] for name in sorted(case.tensors) if name.startswith("choice.multinomial"))
    neither, second, others = [], [], []
    for _ in range(size):
        neither.append(next(rand) <= 1 / 3)
        drawn = next(several).tolist()
        others.append((drawn * 2)[:2])
        second.append(False if neither[-1] else next(rand) <= 0.5)
    assert next(rand, None) is None
    assert next(several, None) is None
    return assignment.Draws(torch.tensor(neither), torch.tensor(second), torch.tensor(others))


@pytest.mark.parametrize("path", cases("albef", "case_nlvr_pretrain.safetensors"))
def test_text_assignment(path: Path) -> None:
    replay = Replay(path)
    case, parts = replay.case, replay.parts
    ids = torch.arange(len(replay.ids))
    images = parts.vision(replay.images)
    case.check("image_embeds", images)
    with torch.no_grad():
        features = unit(parts.vision_proj(images[:, 0]))
        sim = contrastive.similarities(features, features, torch.tensor(assignment.TEMPERATURE))
    case.check("neg_weights", matching.negative_weights(sim, ids), lambda w: w / w.sum(1, keepdim=True))
    pairs = assignment.assign(recorded_draws(case, len(ids)), ids)
    case.check("slot0_idx", pairs.first)
    case.check("slot1_idx", pairs.second)
    case.check("labels", pairs.labels)
    assert pairs.valid.all()

    context = parts.paired_encoder.project_context(images)
    shown = select_context(context, pairs.first), select_context(context, pairs.second)
    hidden = parts.paired_encoder(parts.text_encoder(replay.ids, replay.mask), replay.mask, *shown)
    logits = parts.assignment_head(hidden[:, 0])
    case.check("hidden", hidden)
    case.check("logits", logits)
    loss = assignment.assignment_loss(logits, pairs)
    case.check("loss", loss)
    replay.check_gradients(loss)


@pytest.mark.parametrize("path", cases("albef", "case_vqa_alpha*.safetensors"))
def test_generated_answers(path: Path) -> None:
    replay = Replay(path)
    case, student = replay.case, Student(replay.parts)
    ids, mask, counts = case["in.answer_ids"], case["in.answer_mask"], case["in.k"]
    asked = torch.arange(len(counts)).repeat_interleave(counts)

    def logits(parts: Any, questions: Tensor) -> Tensor:
        decoder = parts["decoder"]
        context = select_context(decoder.project_context(questions), asked)
        return decoder.word_logits(decoder(ids, mask, context, replay.mask[asked]))

    questions = replay.fused(student)
    case.check("question_states", questions)
    words = logits(student, questions)
    case.check("decoder_logits", words)
    taught = None
    if replay.distill:
        teacher = replay.teacher()
        with torch.no_grad():
            taught_questions = replay.fused(teacher)
            taught = logits(teacher, taught_questions)
        case.check("question_states_m", taught_questions)
        case.check("decoder_logits_m", taught)
    each = answers.answer_losses(words, ids, mask, taught, replay.alpha)
    case.check("per_answer_loss", each)
    loss = answers.question_loss(each, case["in.weights"], len(counts))
    case.check("loss", loss)
    replay.check_gradients(loss)


@pytest.mark.parametrize("rows_at_once", [1, 7, 10_000])
@pytest.mark.parametrize("path", cases("albef", "case_vqa_rank_*.safetensors"))
@torch.no_grad()
def test_ranked_answers(path: Path, rows_at_once: int) -> None:
    replay = Replay(path)
    case, decoder = replay.case, replay.parts.decoder
    questions = replay.fused(Student(replay.parts))
    case.check("question_states", questions)
    listed = case["in.answer_ids"], case["in.answer_mask"]
    k, context = int(case.metadata["k"]), decoder.project_context(questions)
    ranked = answers.rank_answers(decoder, context, replay.mask, *listed, k, rows_at_once=rows_at_once)
    case.check("topk_ids", ranked.indices)
    case.check("topk_probs", ranked.probabilities)


@pytest.mark.parametrize("path", cases("albef", "case_retrieval_alpha*.safetensors"))
def test_retrieval_step(path: Path) -> None:
    """ITC with image ids in batch and queue, hard negatives, ITM, gradients, and the queues afterwards."""
    replay = Replay(path)
    case, parts = replay.case, replay.parts
    ids, student, teacher = case["in.idx"], Student(parts), replay.teacher()
    names = ("image_queue", "text_queue")
    queues = {name: FeatureQueue(*replay.carried[f"{name}.features"].shape, seed=0) for name in names}
    for name, queue in queues.items():
        queue.load_state(replay.carried[f"{name}.features"], replay.carried[f"{name}.pointer"])
    id_queue = IdQueue(queues["image_queue"].size)
    id_queue.load_state(replay.carried["id_queue.ids"], replay.carried["id_queue.pointer"])

    images, texts = parts.vision(replay.images), parts.text_encoder(replay.ids, replay.mask)
    features = encoded(student, images, texts)
    with torch.no_grad():
        taught = encoded(teacher, teacher["vision"](replay.images), teacher["text_encoder"](replay.ids, replay.mask))
    for name, value in {"image_embeds": images, "text_embeds": texts}.items():
        case.check(name, value)
    for name, (image, text) in {"": features, "_m": taught}.items():
        case.check(f"image_feat{name}", image)
        case.check(f"text_feat{name}", text)

    past = queues["image_queue"].features, queues["text_queue"].features
    alpha = replay.alpha if replay.distill else 0.0
    contrast = contrastive.cross_alignment(*features, *taught, *past, parts.temperature, ids, alpha, id_queue.ids)
    case.check("sim_i2t", contrast.sim_i2t)
    case.check("sim_t2i", contrast.sim_t2i)
    case.check("sim_targets_hard", contrast.hard)
    for name, sim in (("i2t", contrast.sim_i2t), ("t2i", contrast.sim_t2i)):
        drawn_from = matching.negative_weights(sim[:, : len(ids)], ids)
        case.check(f"neg_weights_{name}", drawn_from, lambda w: w / w.sum(1, keepdim=True))
    itc = (contrast.i2t + contrast.t2i) / 2
    case.check("loss_ita", itc)

    negatives = matching.chosen_negatives(case["out.neg_image_idx"], case["out.neg_text_idx"], ids)
    assert torch.equal(torch.cat([negatives.images, negatives.texts]), case["choice.multinomial"].flatten())
    context = parts.fusion_encoder.project_context(images)
    states = match_states(parts.fusion_encoder, texts, replay.mask, context, negatives)
    logits = parts.itm_head(states[:, 0])
    case.check("itm_logits", logits)
    itm = matching.itm_loss(logits, matching.valid_rows(negatives))
    case.check("loss_itm", itm)
    case.check("loss_total", itc + itm)
    replay.check_gradients(itc + itm)

    for queue, feature in zip(queues.values(), taught, strict=True):
        queue.push(feature)
    id_queue.push(ids)
    case.check("image_queue_after", queues["image_queue"].features)
    case.check("text_queue_after", queues["text_queue"].features)
    case.check("idx_queue_after", id_queue.ids[None])
    case.check("queue_ptr_after", id_queue.state()["pointer"])


def encoded(parts: Any, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of both [CLS]."""
    return unit(parts["vision_proj"](images[:, 0])), unit(parts["text_proj"](texts[:, 0]))
