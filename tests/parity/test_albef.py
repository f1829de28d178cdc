"""ALBEF against recordings of the public release: forward, losses, gradients, teacher and queue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from tests.systems.albef_fixtures import DirectWriter
from vlscale.config import AlbefSystem, Teacher, Text, Vision
from vlscale.data.sample import Batch, Vocabulary
from vlscale.errors import UserError
from vlscale.interop.albef import load_albef_weights, our_names
from vlscale.nn.vision import resize_positions
from vlscale.objectives import contrastive, matching
from vlscale.systems.albef import Albef
from vlscale.systems.momentum import Taught
from vlscale.systems.protocol import Choices, ImageStates, Progress, StepOutput, TextStates

FOLDER = REFERENCE / "albef"
AFTER_EPOCH_0 = Progress(step=1, total_steps=2, steps_per_epoch=1.0)


def build(sizes: dict[str, Any], alpha: float) -> Albef:
    """A system of the recorded sizes."""
    vision = {
        "embed_dim": sizes["vision_width"],
        "depth": sizes["vision_depth"],
        "num_heads": sizes["vision_heads"],
        "patch_size": sizes["patch"],
        "mlp_ratio": sizes["mlp_ratio"],
    }
    text = Text(
        width=sizes["hidden"],
        heads=sizes["heads"],
        intermediate=sizes["intermediate"],
        text_layers=sizes["fusion_layer"],
        fusion_layers=sizes["layers"] - sizes["fusion_layer"],
        max_positions=sizes["max_position"],
        dropout=sizes["hidden_dropout"],
    )
    teacher = Teacher(momentum=sizes["momentum"], queue_size=sizes["queue_size"], alpha=alpha)
    config = AlbefSystem(
        vision=Vision(overrides=vision),
        text=text,
        embed_dim=sizes["embed_dim"],
        temperature=sizes["temp"],
        mlm_probability=sizes["mlm_probability"],
        teacher=teacher,
    )
    return Albef(config, sizes["image_res"], Vocabulary(size=sizes["vocab"], **sizes["special_ids"]))


class Replay:
    """A recorded pre-training step, run again."""

    def __init__(self, path: Path) -> None:
        self.case = case = Case(path)
        self.alpha = float(case.metadata["alpha"])
        self.sizes = config_of(path.parent)
        self.system = system = build(self.sizes, self.alpha)
        load_albef_weights(system, case.weights())
        system.train()
        ids, mask = case["in.input_ids"], case["in.attention_mask"]
        self.batch = Batch(case["in.image"], ids, mask, torch.arange(len(ids)))
        self.masked = Batch(case["in.image"], case["out.masked_input_ids"], mask, self.batch.image_ids)
        self.choices = Choices(
            negative_images=case["out.neg_image_idx"],
            negative_texts=case["out.neg_text_idx"],
            masked_input_ids=case["out.masked_input_ids"],
            mlm_labels=case["out.mlm_labels"],
        )
        system.momentum.teacher.update()  # the release moves the teacher at the start of a forward
        self.ema = {name: value.clone() for name, value in system.carried_state().items()}
        self.seen: dict[str, Tensor] = {}
        self.image, self.text = self._watched(system)
        self.taught = self._taught(system)
        self.output: StepOutput = system(self.batch, AFTER_EPOCH_0, self.choices)
        self.total = sum(self.output.losses.values(), torch.zeros(()))
        self.total.backward()

    def _watched(self, system: Albef) -> tuple[ImageStates, TextStates]:
        """Encode and fuse the clean pairs, keeping what the layers give."""
        text_layers = len(system.text_encoder.layer)
        layers = [*system.text_encoder.layer, *system.fusion_encoder.layer]
        watched = {"patch_embed": system.vision.vit.patch_embed, "text_embedding_layer": system.text_encoder.embeddings}
        watched |= {f"vit_block{index}": block for index, block in enumerate(system.vision.vit.blocks)}
        watched |= {f"text_layer{index}_first_call": layer for index, layer in enumerate(layers)}
        assert text_layers == self.sizes["fusion_layer"]
        hooks = [module.register_forward_hook(self._keep(name)) for name, module in watched.items()]
        with torch.no_grad():
            image, text = system.encode_image(self.batch), system.encode_text(self.batch)
            self.seen["fusion_pos"] = system.fuse(text, image)
        for hook in hooks:
            hook.remove()
        return image, text

    def _keep(self, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.seen[name] = output

        return hook

    @torch.no_grad()
    def _taught(self, system: Albef) -> Taught:
        """The teacher's states, with the vocabulary logits of every position."""
        teacher = system.momentum.teacher
        images = teacher["vision"](self.batch.images)
        texts = teacher["text_encoder"](self.batch.input_ids, self.batch.attention_mask)
        masked = teacher["text_encoder"](self.masked.input_ids, self.masked.attention_mask)
        fusion = teacher["fusion_encoder"]
        fused = fusion(masked, self.batch.attention_mask, fusion.project_context(images))
        self.seen |= {"image_embeds_m": images, "text_embeds_m": texts}
        unit = torch.nn.functional.normalize
        image_feat = unit(teacher["vision_proj"](images[:, 0]), dim=1)
        text_feat = unit(teacher["text_proj"](texts[:, 0]), dim=1)
        logits = teacher["mlm_head"](fused, teacher["text_encoder"].embeddings.word_embeddings.weight)
        return Taught(image_feat, text_feat, logits)


@pytest.fixture(scope="module", params=cases("albef", "case_pretrain_*.safetensors"))
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(request.param)


def test_encoders(replay: Replay) -> None:
    case = replay.case
    for name in [*case.names("vit_block"), *case.names("text_layer"), "patch_embed", "text_embedding_layer"]:
        case.check(name, replay.seen[name])
    case.check("image_embeds", replay.image.tokens)
    case.check("text_embeds", replay.text.tokens)
    case.check("image_feat", replay.image.pooled)
    case.check("text_feat", replay.text.pooled)


def test_teacher(replay: Replay) -> None:
    case = replay.case
    averages = case.names("ema_after.")
    assert averages
    for name in averages:
        (ours,) = our_names(name.removeprefix("ema_after."), replay.sizes["fusion_layer"])
        case.check(name, replay.ema[ours])
    for name in ("image_embeds_m", "text_embeds_m"):
        case.check(name, replay.seen[name])
    case.check("image_feat_m", replay.taught.image_feat)
    case.check("text_feat_m", replay.taught.text_feat)


def test_contrast(replay: Replay) -> None:
    case, system, taught = replay.case, replay.system, replay.taught
    image, text = replay.image.pooled, replay.text.pooled
    contrast = system.contrast(image, text, taught, replay.batch.image_ids, replay.alpha)
    for name in ("sim_i2t", "sim_t2i", "targets_i2t", "targets_t2i"):
        case.check(name, getattr(contrast, name))
    queues, temperature = replay.ema, case.weights()["temp"].clamp(0.001, 0.5)
    similarities = contrastive.queue_similarities
    i2t_m = similarities(taught.image_feat, taught.text_feat, queues["text_queue.features"], temperature)
    t2i_m = similarities(taught.text_feat, taught.image_feat, queues["image_queue.features"], temperature)
    case.check("sim_i2t_m", i2t_m)
    case.check("sim_t2i_m", t2i_m)
    case.check("loss_ita", (contrast.i2t + contrast.t2i) / 2)
    case.check("loss_ita", replay.output.losses["itc"])


def test_matching(replay: Replay) -> None:
    case, system, image, text = replay.case, replay.system, replay.image, replay.text
    ids, size = replay.batch.image_ids, len(replay.batch)
    contrast = system.contrast(image.pooled, text.pooled, replay.taught, ids, replay.alpha)

    def normalised(weights: Tensor) -> Tensor:
        return weights / weights.sum(1, keepdim=True)

    case.check("neg_weights_i2t", matching.negative_weights(contrast.sim_i2t[:, :size], ids), normalised)
    case.check("neg_weights_t2i", matching.negative_weights(contrast.sim_t2i[:, :size], ids), normalised)

    images, texts = replay.choices.negative_images, replay.choices.negative_texts
    assert torch.equal(torch.cat([images, texts]), case["choice.multinomial"].flatten())
    own = torch.arange(size)
    image_rows, text_rows = torch.cat([images, own]), torch.cat([own, texts])
    wrong_images = ImageStates(*(field[image_rows] for field in image))
    wrong_texts = TextStates(*(field[text_rows] for field in text))
    negative = system.fuse(wrong_texts, wrong_images)
    case.check("fusion_pos", replay.seen["fusion_pos"])
    case.check("fusion_neg", negative)
    case.check("itm_logits", system.match_logits(torch.cat([replay.seen["fusion_pos"], negative])))
    negatives = matching.chosen_negatives(images, texts, ids)
    context = system.fusion_encoder.project_context(image.tokens)
    logits = system._match(text.tokens, text.mask, context, negatives)
    case.check("itm_logits", logits)  # CLS only through the last layer changes nothing
    case.check("itm_labels", matching.itm_labels(len(logits), logits.device))
    case.check("loss_itm", replay.output.losses["itm"])


def test_masked_words(replay: Replay) -> None:
    case, system = replay.case, replay.system
    fused = system.fuse(system.encode_text(replay.masked), replay.image)
    case.check("mlm_hidden", fused)
    case.check("mlm_logits", system.mlm_head(fused, system.text_encoder.embeddings.word_embeddings.weight))
    case.check("mlm_logits_m", replay.taught.mlm_logits)
    case.check("loss_mlm", replay.output.losses["mlm"])  # computed on masked rows only
    case.check("loss_total", replay.total)


def test_gradients(replay: Replay) -> None:
    case, layers = replay.case, replay.sizes["fusion_layer"]
    parameters = dict(replay.system.named_parameters())

    def gradient(key: str) -> Tensor:
        (name,) = our_names(key, layers)
        value = parameters[name].grad
        assert value is not None, name
        return value

    recorded = case.names("grad.")
    assert recorded
    for name in recorded:
        case.check(name, gradient(name.removeprefix("grad.")))
    order = replay.sizes["grad_norms_all_order"]
    assert len(order) == len(parameters)
    case.check("grad_norms_all", torch.stack([gradient(key).double().norm() for key in order]))


def test_queue(replay: Replay) -> None:
    """Last, because it moves the teacher a second time."""
    case, system = replay.case, replay.system
    system.after_step(AFTER_EPOCH_0, DirectWriter())
    case.check("image_queue_after", system.momentum.image_queue.features)
    case.check("text_queue_after", system.momentum.text_queue.features)
    case.check("queue_ptr_after", system.carried_state()["text_queue.pointer"])


@pytest.mark.parametrize("path", cases("albef", "case_retrieval_alpha*.safetensors"))
def test_retrieval_losses(path: Path) -> None:
    """Equal image ids in batch and queue: the targets, the negatives' weights and both losses."""
    case = Case(path)
    weights, alpha = case.weights(), float(case.metadata["alpha"])
    ids, size = case["in.idx"], len(case["in.idx"])
    all_ids = torch.cat([ids, weights["idx_queue"].flatten()])
    hard = contrastive.hard_targets(ids, all_ids)
    case.check("sim_targets_hard", hard)
    losses = []
    for direction, (mine, other) in {"i2t": ("image", "text"), "t2i": ("text", "image")}.items():
        queue, current = weights[f"{other}_queue"], case[f"out.{other}_feat_m"]
        sim = contrastive.queue_similarities(case[f"out.{mine}_feat"], current, queue, weights["temp"])
        case.check(f"sim_{direction}", sim)
        targets = hard
        if case.metadata["distill"] == "True":
            teacher = contrastive.queue_similarities(case[f"out.{mine}_feat_m"], current, queue, weights["temp"])
            targets = contrastive.smoothed_targets(teacher, hard, alpha)
        losses.append(contrastive.soft_cross_entropy(sim, targets))
        drawn_from = matching.negative_weights(sim[:, :size], ids)
        case.check(f"neg_weights_{direction}", drawn_from, lambda w: w / w.sum(1, keepdim=True))
    case.check("loss_ita", (losses[0] + losses[1]) / 2)
    logits = case["out.itm_logits"]
    case.check("loss_itm", matching.itm_loss(logits, torch.ones(len(logits), dtype=torch.bool)))


@pytest.mark.parametrize("path", cases("albef", "case_pos_embed_interp*.safetensors"))
def test_position_tables(path: Path) -> None:
    case = Case(path)
    for name in case.names("pos_embed_"):
        rows, columns = (int(side) for side in name.removeprefix("pos_embed_").split("x"))
        case.check(name, resize_positions(case["in.pos_embed"], (rows, columns)))


@pytest.mark.parametrize("path", cases("albef", "keys_full.json"))
def test_full_size_checkpoint_has_a_place_for_every_key(path: Path) -> None:
    """The names and shapes of the published checkpoint against the default configuration, without its weights."""
    published = json.loads(path.read_text(encoding="utf-8"))["pretrain"]
    with torch.device("meta"):
        system = Albef(AlbefSystem(), 256, Vocabulary(30522, 0, 101, 102, 103))
    ours = {name: list(value.shape) for name, value in (system.state_dict() | system.carried_state()).items()}
    found = {name: shape for key, shape in published.items() for name in our_names(key, len(system.text_encoder.layer))}
    assert found == ours
    assert abs(sum(p.numel() for p in system.parameters()) / 210e6 - 1) < 0.01


@pytest.mark.parametrize("path", cases("albef", "weights_pretrain.safetensors"))
def test_loading_is_strict_both_ways(path: Path) -> None:
    sizes = config_of(path.parent)
    weights = Case(path).tensors
    system = build(sizes, alpha=0.4)
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != "text_proj_m.bias"}, "teacher.text_proj.bias"),
        (weights | {"cls_head.0.weight": torch.zeros(1)}, "cls_head.0.weight"),
        (weights | {"vision_proj.bias": torch.zeros(1)}, "vision_proj.bias: expected"),
        (weights | {"text_encoder.cls.predictions.decoder.bias": torch.ones(sizes["vocab"])}, "one parameter"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            load_albef_weights(system, wrong)
