"""MVPTR's encoders and objectives against recordings of the public release, with its switches set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from vlscale.config.mvptr import MvptrSystem, Stacks
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError
from vlscale.interop.mvptr import Kind, as_ours, our_name, our_weights
from vlscale.nn.heads import MlmHead
from vlscale.nn.regional import ConceptHead, Fused, MvpEncoder, SharedSpace
from vlscale.objectives import concepts, contrastive, grounding, masking, matching

FOLDER = REFERENCE / "mvptr"
KINDS: dict[str, Kind] = {"retrieval": "retrieval", "retrieval_phrase": "retrieval"}
"""Of the recorded models; pre-training ones start with `pretrain`, the others are tasks."""


class Parts(nn.Module):
    """What a system is made of, under the names that the importer gives."""

    def __init__(self, config: MvptrSystem, region_width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.text.width
        self.encoder = MvpEncoder(config, region_width, vocabulary)
        self.text_space, self.image_space = (SharedSpace(width, config.vsc.proj) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.word_head, self.tag_head = (ConceptHead(width, vocabulary.size) for _ in range(2))
        self.phrase_head = MlmHead(width, vocabulary.phrases)
        self.itm_head = nn.Linear(width, 2)


def recorded_parts(sizes: dict[str, Any], **options: Any) -> Parts:
    text = Stacks(
        width=sizes["hidden"],
        heads=sizes["heads"],
        intermediate=sizes["intermediate"],
        max_positions=sizes["max_position"],
        dropout=sizes["hidden_dropout"],
        layers=sizes["encoder_layers_each"],
    )
    region_width, norm = sizes["img_feature_dim"] - 6, bool(sizes["use_img_layernorm"])
    config = MvptrSystem(text=text, region_norm=norm, **options)
    phrases = ((0,),) * sizes["phrase_vocab"]
    return Parts(
        config, region_width, Vocabulary(sizes["only_word_size"], **sizes["special_ids"], phrase_pieces=phrases)
    )


class Replay:
    """A recorded call, run again by our parts."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.case = case = Case(path)
        self.sizes = config_of(path.parent)
        self.weights = load(case)
        model = case.metadata["kind"].removesuffix("2")
        self.kind: Kind = KINDS.get(model, "pretrain" if model == "pretrain" else "task")
        self.parts = parts = recorded_parts(self.sizes, **options)
        found = our_weights(self.weights, self.kind)
        absent = parts.load_state_dict(found, strict=False)
        assert not absent.unexpected_keys
        assert not [name for name in absent.missing_keys if name.startswith("encoder.")]
        self.ids, self.text_mask = case["in.input_ids_a"], case["in.attention_mask_a"]
        self.tags, mask = case["in.input_ids_b"], case["in.attention_mask_b"]
        count, length = self.ids.shape
        assert not case["in.token_type_ids_a"].any()
        self.text = parts.encoder.encode_text(self.ids, self.text_mask)
        segment = case["in.token_type_ids_b"]
        self.image = parts.encoder.encode_image(self.tags, case["in.img_feats"], mask, segment)
        tags = self.tags.shape[1]
        self.regions = parts.encoder.for_fusion(self.image, tags)
        self.seen_mask = parts.encoder.for_fusion(mask, tags)  # of what the multimodal encoder sees
        self.region_mask = mask[:, tags:]
        self.fused = self.fuse(torch.arange(count), torch.arange(count))
        self.pooled = parts.encoder.pool(self.fused.states)
        self.own, self.length = torch.arange(count), length

    def fuse(self, texts: Tensor, images: Tensor) -> Fused:
        """Pairs of the batch, [n] and [n]."""
        mask, seen = self.text_mask[texts], self.seen_mask[images]
        return self.parts.encoder.fuse(self.text[texts], self.regions[images], mask, seen, return_layers=True)

    def contrast(self) -> contrastive.InBatchItc:
        image, text = self.parts.image_space(self.image), self.parts.text_space(self.text)
        self.case.check("sim_mat", text @ image.T)
        return contrastive.vsc(image, text, self.parts.logit_scale, self.own)

    def hardest(self, vsc: contrastive.InBatchItc) -> matching.HalfNegatives:
        """The release's negatives, in its order."""
        chosen = matching.hardest_negatives(vsc.sim_t2i, vsc.sim_i2t, self.own)
        half = matching.half_and_half(chosen, self.case["choice.randperm"][0])
        self.case.check("hard_txt_index", half.texts)
        self.case.check("hard_img_index", half.images)
        return half

    def check_states(self) -> None:
        """Embeddings and every encoder, as far as recorded."""
        case, encoder = self.case, self.parts.encoder
        known = {
            "text_embedding": encoder.embeddings(self.ids, 0),
            "tag_embedding": encoder.embeddings(self.tags, case["in.token_type_ids_b"]),
            "img_embedding_linear": encoder.regions.dense(case["in.img_feats"]),
            "txt_encoder": self.text,
            "vis_encoder": self.image,
            "multimodal": self.fused.states,
            "pooled": self.pooled,
        }
        if "out.mid_multimodal" in case.tensors:
            known["mid_multimodal"] = self.layer(self.fused)
        checked = [name for name in known if f"out.{name}" in case.tensors]
        assert {"txt_encoder", "vis_encoder", "multimodal", "pooled"} <= set(checked)
        for name in checked:
            case.check(name, known[name])

    def layer(self, fused: Fused) -> Tensor:
        """States that the recorded case grounds."""
        layer = self.case.metadata.get("phrase_layer", "None")
        return fused.states if layer == "None" else fused.layers[int(layer)]

    def matched(self, half: matching.HalfNegatives) -> tuple[Tensor, Fused]:
        """ITM logits [2B, 2], class 1 = match, and the negatives' states."""
        hard = self.fuse(half.texts, half.images)
        pooled = self.parts.encoder.pool(hard.states)
        self.case.check("hard_multimodal", hard.states)
        self.case.check("hard_pooled", pooled)
        return self.parts.itm_head(torch.cat([self.pooled, pooled])), hard

    def phrases(self) -> Tensor:
        """[B, P, L] bool."""
        start, end = self.case["in.phrase_index"].split(1, dim=1)
        places = torch.arange(self.length)
        inside = (places >= start) & (places < end)
        return grounding.phrase_masks(inside, self.case["out.wpg_rand_pos"].shape[1])

    def wpg(self, hard: Fused, half: matching.HalfNegatives) -> Tensor:
        """Loss of the recorded kind: `hard` rows of ITM's negatives, or `sample`, another image's regions."""
        case, phrases, positive = self.case, self.phrases(), self.layer(self.fused)
        if "out.mid_hard_multimodal" in case.tensors:
            case.check("mid_hard_multimodal", self.layer(hard))
        if case.metadata.get("phrase_mod", "hard") == "hard":
            texts, images, states = half.texts, half.images, self.layer(hard)
        else:
            texts, images = self.own, case[self.sampled()]
            states = torch.cat([positive[:, : self.length], positive[images, self.length :]], dim=1)
        sims = []
        for name, seen, text, image in (("pos", positive, self.own, self.own), ("neg", states, texts, images)):
            cosine = grounding.phrase_region_similarity(seen, phrases[text], self.region_mask[image])
            sims.append(grounding.ground(cosine, phrases[text].any(2), case[f"out.wpg_rand_{name}"]))
            case.check(f"wpg_{name}_sims", sims[-1].similarity)
        return grounding.wpg_loss(*sims, margin=self.sizes["wpg_margin"])

    def sampled(self) -> str:
        return "out.wpg_neg_image_idx" if "out.wpg_neg_image_idx" in self.case.tensors else "choice.py_choice"

    def check_gradients(self, total: Tensor, extra: dict[str, nn.Parameter] | None = None) -> None:
        """Recorded gradients, and the norms of all, in the order of their names there."""
        total.backward()
        parameters = dict(self.parts.named_parameters()) | (extra or {})

        def gradient(key: str) -> Tensor | None:
            name = key if extra and key in extra else our_name(key, self.kind)
            return None if name not in parameters else parameters[name].grad

        for name in self.case.names("grad."):
            key = name.removeprefix("grad.")
            value = gradient(key)
            assert value is not None, key
            self.case.check(name, as_ours(key, value))  # both layouts turn into one another
        order = self.sizes["grad_norms_all_order"].get(self.case.path.stem.removeprefix("case_"))
        keys = order or [key for key in sorted(self.weights) if gradient(key) is not None]
        found = [gradient(key) for key in keys]
        norms = [value.double().norm() for value in found if value is not None]
        assert len(norms) == len(keys)
        self.case.check("grad_norms_all", torch.stack(norms))


def load(case: Case) -> dict[str, Tensor]:
    """The case's weights; `retrieval_phrase` is recorded with those of `retrieval`."""
    kind = case.metadata["kind"].removesuffix("_phrase")
    return Case(case.path.with_name(f"weights_{kind}.safetensors")).tensors


def linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    """A task's head as recorded."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


@pytest.mark.parametrize("path", cases("mvptr", "case_pretrain*.safetensors"))
def test_pretraining_step(path: Path) -> None:
    replay = Replay(path)
    case = replay.case
    replay.check_states()
    vsc = replay.contrast()
    half = replay.hardest(vsc)
    logits, hard = replay.matched(half)
    case.check("itm_logits", logits.flip(1))
    losses = {
        "vsc": vsc.loss,
        "itm": matching.half_loss(logits, matching.half_valid_rows(half)),
        "vis_mlm": recovered_tags(replay),
        "mlm": masked_words(replay),
    }
    if "out.loss_wpg" in case.tensors:
        losses["wpg"] = replay.wpg(hard, half)
    extra: dict[str, nn.Parameter] = {}
    if "out.loss_qa" in case.tensors:
        name = "qa_head" if "qa_head.weight" in replay.weights else "qa_seq_relation"
        (labels,) = (case[key] for key in case.tensors if key.startswith("in.qa"))
        head = linear(replay.weights, name)
        losses["qa"] = F.cross_entropy(head(replay.pooled), labels, ignore_index=-1)
        extra = {f"{name}.{key}": value for key, value in head.named_parameters()}
    assert {f"loss_{name}" for name in losses} | {"loss_total"} == set(case.names("loss_"))
    for name, loss in losses.items():
        case.check(f"loss_{name}", loss)
    total = torch.stack(list(losses.values())).sum()
    case.check("loss_total", total)
    replay.check_gradients(total, extra)


def house_labels(labels: Tensor) -> Tensor:
    """−1 there, −100 here."""
    return labels.masked_fill(labels < 0, masking.IGNORED)


def recovered_tags(replay: Replay) -> Tensor:
    """MCR on tags without a new order, and with: equal where no image has two masked tags."""
    labels = house_labels(replay.case["in.masked_lm_labels_b"])[:, : replay.tags.shape[1]]
    rows = concepts.gather_concepts(replay.image[:, : labels.shape[1]], labels, labels.numel())
    logits = replay.parts.tag_head(rows.states)
    replay.case.check("tag_mlm_logits_masked", logits[rows.labels >= 0])
    slots = (logits, rows.labels, rows.groups, labels.shape[1])
    loss = concepts.recover_loss(*slots, order="ordered")
    reordered = concepts.recover_loss(*slots, order="hungarian", cost="nll")
    assert reordered <= loss + 1e-6
    return loss


def masked_words(replay: Replay) -> Tensor:
    labels = house_labels(replay.case["in.masked_lm_labels_a"])
    rows = masking.gather_masked(replay.fused.states[:, : replay.length], labels, labels.numel())
    logits = replay.parts.word_head(rows.states)
    replay.case.check("mlm_logits_masked", logits[rows.labels != masking.IGNORED])
    return masking.mlm_loss(logits, rows.labels)


@pytest.mark.parametrize("path", cases("mvptr", "case_retrieval*.safetensors"))
def test_retrieval_step(path: Path) -> None:
    replay = Replay(path)
    case = replay.case
    replay.check_states()
    vsc = replay.contrast()
    half = replay.hardest(vsc)
    logits, hard = replay.matched(half)
    case.check("itm_logits", logits)
    case.check("itm_labels", matching.half_labels(len(logits), logits.device))
    losses = {"vsc": vsc.loss, "itm": matching.half_loss(logits, matching.half_valid_rows(half))}
    if "out.loss_wpg" in case.tensors:
        losses["wpg"] = replay.wpg(hard, half)
    for name, loss in losses.items():
        case.check(f"loss_{name}", loss)
    total = torch.stack(list(losses.values())).sum()
    case.check("loss_total", total)
    replay.check_gradients(total)


@pytest.mark.parametrize("path", cases("mvptr", "case_retrieval.safetensors"))
@torch.no_grad()
def test_retrieval_scores(path: Path) -> None:
    """Both stages; of the last layer only [CLS] is computed."""
    replay = Replay(path)
    case, parts, count = replay.case, replay.parts, len(replay.own)
    image, text = parts.image_space(replay.image), parts.text_space(replay.text)
    case.check("coarse_img", image)
    case.check("coarse_txt", text)
    case.check("coarse_sims_i2t", image @ text.T)
    images, texts = replay.own.repeat_interleave(count), replay.own.repeat(count)
    masks = replay.text_mask[texts], replay.seen_mask[images]
    fused = parts.encoder.fuse(replay.text[texts], replay.regions[images], *masks, cls_only=True)
    logits = parts.itm_head(parts.encoder.pool(fused.states)).view(count, count, 2)
    case.check("fine_logits", logits)
    case.check("fine_scores_i2t", logits.softmax(2)[:, :, 1])


@pytest.mark.parametrize("path", cases("mvptr", "case_v*.safetensors"))
def test_classification(path: Path) -> None:
    """VQA, also with the tags left in the multimodal input, and visual entailment."""
    replay = Replay(path, tags_in_fusion=Case(path).metadata.get("use_b") == "True")
    case, labels = replay.case, replay.case["in.labels"]
    replay.check_states()
    names = sorted({key.rpartition(".")[0] for key in replay.weights if key.startswith("classifier.")})
    layers = [linear(replay.weights, name) for name in names]
    hidden = replay.pooled
    for layer in layers[:-1]:
        hidden = layer(hidden).relu()
    logits = layers[-1](hidden)
    case.check("logits", logits)
    if labels.is_floating_point():
        loss = F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
    else:
        loss = F.cross_entropy(logits, labels)
    case.check("loss", loss)
    extra = {
        f"{name}.{key}": value
        for name, layer in zip(names, layers, strict=True)
        for key, value in layer.named_parameters()
    }
    replay.check_gradients(loss, extra)


@pytest.mark.parametrize("path", cases("mvptr", "case_re_*.safetensors"))
def test_referring_expression(path: Path) -> None:
    """The text's [CLS] against the regions: mod 1 is the cosine that grounding evaluates."""
    replay = Replay(path)
    case, labels = replay.case, replay.case["in.labels"]
    replay.check_states()
    states = replay.layer(replay.fused)
    cls = torch.zeros(len(states), 1, replay.length)
    cls[:, :, 0] = 1
    real = labels >= 0
    regions = states[:, replay.length :]
    extra: dict[str, nn.Parameter] = {}
    if case.metadata["mod"] == "1":
        scores = grounding.phrase_region_similarity(states, cls, torch.ones_like(labels))[:, 0]
        loss = (scores - labels)[real].square().mean()
    elif case.metadata["mod"] == "2":
        dots = (regions @ states[:, 0, :, None])[:, :, 0]
        loss = F.binary_cross_entropy_with_logits(dots[real], (labels[real] >= 0.5).float())
        scores = dots.sigmoid()
    else:
        head = linear(replay.weights, "classifier")
        scores = head(regions)[:, :, 0]
        loss = F.binary_cross_entropy_with_logits(scores[real], labels[real])
        extra = {f"classifier.{key}": value for key, value in head.named_parameters()}
    case.check("region_scores", scores)
    case.check("loss", loss)
    if "out.pred_region" in case.tensors:
        case.check("pred_region", scores.masked_fill(~real, -torch.inf).argmax(1))
    replay.check_gradients(loss, extra)


@pytest.mark.parametrize("path", cases("mvptr", "extra_hungarian*.safetensors"))
def test_labels_dealt_out(path: Path) -> None:
    """One problem per image, padded rows in between; the recording is of −log p."""
    extra = Case(path)
    counts, labels = extra["num_masked"], extra["labels"]
    images, most = labels.shape
    real = torch.arange(most) < counts[:, None]
    labels = torch.where(real, labels, masking.IGNORED)
    groups = torch.arange(images)[:, None].expand_as(labels).flatten()
    slots = concepts.Slots(extra["logits"].flatten(0, 1), labels.flatten(), groups, most)
    (recovered,) = concepts.recover([slots], cost="nll")
    assert torch.equal(recovered.labels.view(images, most)[real], extra["reordered_labels"][real])
    torch.testing.assert_close(recovered.loss.double(), extra["loss_reordered"], rtol=1e-5, atol=1e-6)
    (ordered,) = concepts.recover([slots], order="ordered")
    torch.testing.assert_close(ordered.loss.double(), extra["loss_in_order"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", cases("mvptr", "keys_full.json"))
def test_full_size_checkpoint_has_a_place_for_every_key(path: Path) -> None:
    """Names and shapes of the published models against the default configuration, without their weights."""
    words = 30522
    for model, published in json.loads(path.read_text(encoding="utf-8")).items():
        kind: Kind = KINDS.get(model, "pretrain" if model.startswith("pretrain") else "task")
        phrases = published["bert.embeddings.word_embeddings.weight"][0] - words
        with torch.device("meta"):
            parts = Parts(MvptrSystem(), 2048, Vocabulary(words, 0, 101, 102, 103, ((0,),) * phrases))
        ours = {name: list(value.shape) for name, value in parts.state_dict().items()}
        found = {name: shape for key, shape in published.items() if (name := our_name(key, kind)) is not None}
        fresh = ours.keys() - found.keys()
        assert found == {name: shape for name, shape in ours.items() if name not in fresh}, model
        allowed = ("phrase_head.",) if kind == "pretrain" else ("phrase_head.", "word_head.", "tag_head.", "itm_head.")
        assert all(name.startswith(allowed) or name == "logit_scale" for name in fresh), model


def test_what_the_release_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"MVPTR checkpoint: bert\.encoder\.layer\.0 is no entry"):
        our_name("bert.encoder.layer.0")


def test_the_match_is_class_one_here() -> None:
    """Pre-training's ITM rows change places, a retrieval classifier's stay, projections turn."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ours = our_weights({"cls.seq_relationship.weight": rows, "bert.txt_proj": rows, "qa_head.bias": rows[0]})
    assert torch.equal(ours["itm_head.weight"], rows.flip(0))
    assert torch.equal(ours["text_space.proj.weight"], rows.T)
    assert set(ours) == {"itm_head.weight", "text_space.proj.weight"}
    kept = our_weights({"classifier.weight": rows}, "retrieval")
    assert torch.equal(kept["itm_head.weight"], rows)
