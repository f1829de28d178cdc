"""MVPTR (Li et al. 2022): words, phrases, object tags and regions, aligned at several levels in two stages.

Losses: MCR of tags and of phrases (`mcr_v`, `mcr_s`, eq. 1 to 3), VSC (eq. 4, 5), and in stage 2 also WPG (eq. 6, 7),
ITM and MLM. One forward a step: VSC, ITM and WPG see the masked inputs too, as in the release, unless `clean_pass` is
set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale.config.mvptr import MvptrSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.heads import MlmHead
from vlscale.nn.regional import ConceptHead, Fused, MvpEncoder, SharedSpace, load_regional
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import concepts, contrastive, grounding, masking, matching
from vlscale.systems.concept_encoding import ConceptEncoding
from vlscale.systems.concept_inputs import MaskedInputs, given, image_mask, mask_inputs, own, phrase_masks, phrase_slots
from vlscale.systems.encoding import TEMPERATURE_RANGE
from vlscale.systems.protocol import Choices, Codebook, Progress, StepOutput

Scalars = dict[str, Tensor]
Head = Callable[[Tensor], Tensor]


class _Encoded(NamedTuple):
    """Uni-modal states, and of the image what the multimodal encoder sees."""

    text: Tensor
    """[B, L, D]."""
    image: Tensor
    """[B, Lt + R, D]."""
    seen: Tensor
    """[B, R, D], or [B, Lt − 1 + R, D] where tags are kept."""
    seen_mask: Tensor
    """[B, …] int64, of `seen`."""


class _Paired(NamedTuple):
    """The batch's own pairs, then their negatives, through the multimodal encoder."""

    states: Tensor
    """[2B, T, D]."""
    grounded: Tensor
    """[2B, T, D], of the layer that WPG reads."""
    half: matching.HalfNegatives
    negatives: matching.Negatives


def _without(config: MvptrSystem, left_out: frozenset[str]) -> MvptrSystem:
    """The section for a system that some losses don't train: their masks hide nothing."""
    mcr = config.mcr.model_copy(
        update={name: 0.0 for name, loss in (("tags", "mcr_v"), ("phrases", "mcr_s")) if loss in left_out}
    )
    words = 0.0 if "mlm" in left_out else config.mlm_probability
    return config.model_copy(update={"mcr": mcr, "mlm_probability": words})


class Mvptr(ConceptEncoding, nn.Module):
    """Nothing is carried beside the parameters: no teacher, no queue, no codebook."""

    def __init__(
        self, config: MvptrSystem, region_width: int, vocabulary: Vocabulary, left_out: frozenset[str] = frozenset()
    ) -> None:
        """A vocabulary without phrases leaves out what reads them.

        Args:
            region_width: numbers of a region's feature, without the six of its box.
            left_out: losses that are not computed; what they would ask for is not hidden either.
        """
        super().__init__()
        self.config, self.vocabulary, self.phrases = _without(config, left_out), vocabulary, vocabulary.phrases
        self.left_out = left_out if self.phrases else left_out | {"mcr_s", "wpg"}
        width = config.text.width
        self.encoder = MvpEncoder(config, region_width, vocabulary)
        self.tag_head = ConceptHead(width, vocabulary.size)
        self.word_head = ConceptHead(width, vocabulary.size)
        self.phrase_head = MlmHead(width, vocabulary.phrases)
        self.itm_head = nn.Linear(width, 2)
        self.contrasts = config.fusion == "split" and "vsc" not in left_out
        if self.contrasts:
            self.text_space, self.image_space = (SharedSpace(width, config.vsc.proj) for _ in range(2))
            self.logit_scale = nn.Parameter(-torch.tensor(config.vsc.temperature).log())
        if config.text.init != "random":
            load_regional(config.text.init, self.encoder, (self.tag_head, self.word_head))
        self.encoder.embeddings.start_phrases(vocabulary.phrase_pieces)
        if config.stage == 1:
            self._leave_out_fusion()

    def _leave_out_fusion(self) -> None:
        """Stage 1 trains the uni-modal encoders: what is without gradient now, no optimizer owns or decays."""
        for part in (self.encoder.multimodal, self.encoder.pooler, self.word_head, self.itm_head):
            part.requires_grad_(False)

    # --- the step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses `mcr_v`, `mcr_s`, `vsc` and, in stage 2, `itm`, `mlm`, `wpg`; see the module's docstring."""
        choices = choices or Choices()
        inputs = mask_inputs(batch, self.config, self.vocabulary, self.phrases, progress.generator)
        masked = self._encode(batch, inputs.text_ids, inputs.tag_ids)
        seen = masked
        if self.config.clean_pass:
            seen = self._encode(batch, batch.input_ids, given(batch.tag_ids))
            inputs = inputs._replace(grounded=phrase_slots(batch))
        losses: Scalars = {}
        metrics: Scalars = {}
        sims = self._contrast(seen, batch, losses, metrics)
        if self.config.stage == 2:
            paired = self._pair(seen, batch, sims, progress, choices)
            self._match(paired, losses, metrics)
            if "wpg" not in self.left_out:
                self._ground(paired, seen, inputs, batch, progress, losses, metrics)
            fused = paired.states[: len(batch)]
            if self.config.clean_pass:
                fused = self._fuse(masked, batch, own(batch), own(batch)).states
            if "mlm" not in self.left_out:
                self._predict_words(fused, inputs, losses, metrics)
        else:
            fused = masked.text
        self._recover(fused, masked, inputs, losses, metrics)
        return StepOutput(losses, metrics)

    def _encode(self, batch: Batch, text_ids: Tensor, tag_ids: Tensor) -> _Encoded:
        mask = image_mask(batch)
        text = self.encoder.encode_text(text_ids, batch.attention_mask)
        image = self.encoder.encode_image(tag_ids, given(batch.regions), mask)
        tags = tag_ids.shape[1]
        return _Encoded(text, image, self.encoder.for_fusion(image, tags), self.encoder.for_fusion(mask, tags))

    def _contrast(self, seen: _Encoded, batch: Batch, losses: Scalars, metrics: Scalars) -> tuple[Tensor, Tensor]:
        """VSC, and its similarities of this rank [B, B]; without it nothing is known: zeros."""
        if not self.contrasts:
            zeros = seen.text.new_zeros(len(batch), len(batch))
            return zeros, zeros
        images, texts = self.image_space(seen.image), self.text_space(seen.text)
        result = contrastive.vsc(images, texts, self.logit_scale, batch.image_ids, self.config.vsc.gather)
        losses["vsc"] = result.loss
        metrics["temperature"] = self.divisor().detach()
        return result.sim_t2i, result.sim_i2t

    def _pair(
        self, seen: _Encoded, batch: Batch, sims: tuple[Tensor, Tensor], progress: Progress, choices: Choices
    ) -> _Paired:
        """The B pairs and B negatives in one pass."""
        ids, rows = batch.image_ids, own(batch)
        if choices.negative_images is not None and choices.negative_texts is not None:
            negatives = matching.chosen_negatives(choices.negative_images, choices.negative_texts, ids)
        elif self.config.itm.negatives == "hardest" and self.contrasts:
            negatives = matching.hardest_negatives(*sims, ids)
        else:
            negatives = matching.draw_negatives(*sims, ids, progress.generator)
        half = matching.half_and_half(negatives, matching.draw_order(len(batch), ids.device, progress.generator))
        fused = self._fuse(seen, batch, torch.cat([rows, half.texts]), torch.cat([rows, half.images]))
        return _Paired(fused.states, fused.layers[self.config.wpg.layer], half, negatives)

    def _fuse(self, seen: _Encoded, batch: Batch, texts: Tensor, images: Tensor, depth: int | None = None) -> Fused:
        """Texts [n] with images [n] of the batch; `depth` runs the first so many layers only."""
        masks = batch.attention_mask[texts], seen.seen_mask[images]
        return self.encoder.fuse(seen.text[texts], seen.seen[images], *masks, return_layers=True, depth=depth)

    def _match(self, paired: _Paired, losses: Scalars, metrics: Scalars) -> None:
        logits, valid = self.match_logits(paired.states), matching.half_valid_rows(paired.half)
        losses["itm"] = matching.half_loss(logits, valid)
        metrics["itm_accuracy"] = matching.half_accuracy(logits, valid)

    def _ground(
        self,
        paired: _Paired,
        seen: _Encoded,
        inputs: MaskedInputs,
        batch: Batch,
        progress: Progress,
        losses: Scalars,
        metrics: Scalars,
    ) -> None:
        """WPG: phrases find a region of their own image sooner than one of another (eq. 7)."""
        options, size = self.config.wpg, len(batch)
        masks = phrase_masks(batch)  # [B, P, L]
        rows = own(batch)
        positive = self._grounded(paired.grounded[:size], rows, rows, masks, inputs.grounded, batch, progress)
        if options.negatives == "hard":
            half = paired.half
            states, texts, images, valid = paired.grounded[size:], half.texts, half.images, half.valid
        else:
            states, texts, images = self._other_images(paired, seen, batch), rows, paired.negatives.images
            valid = paired.negatives.images_valid
        negative = self._grounded(states, texts, images, masks, inputs.grounded, batch, progress)
        losses["wpg"] = grounding.wpg_loss(positive, negative, options.margin, valid)
        counted = positive.valid & negative.valid & valid
        metrics["wpg_texts"] = counted.float().mean()
        ahead = (positive.similarity > negative.similarity) & counted
        metrics["wpg_accuracy"] = ahead.sum() / counted.sum().clamp(min=1)

    def _grounded(
        self,
        states: Tensor,
        texts: Tensor,
        images: Tensor,
        masks: Tensor,
        readable: Tensor,
        batch: Batch,
        progress: Progress,
    ) -> grounding.Grounded:
        """Phrases of the texts [n] in the images [n], by joint states [n, T, D]."""
        similarity = grounding.phrase_region_similarity(states, masks[texts], given(batch.region_mask)[images])
        picks = grounding.draw_picks(similarity, progress.generator) if self.config.wpg.pool == "top3" else None
        return grounding.ground(similarity, readable[texts], picks)

    def _other_images(self, paired: _Paired, seen: _Encoded, batch: Batch) -> Tensor:
        """[B, T, D] of every text with its wrong image V'; ITM has computed the first half of them already."""
        half, size = paired.half, len(batch)
        count = half.with_wrong_image
        rest = half.order[count:]
        depth = self.config.wpg.layer + 1
        fresh = self._fuse(seen, batch, rest, paired.negatives.images[rest], depth).layers[-1]
        states = torch.cat([paired.grounded[size : size + count], fresh])
        return torch.empty_like(states).index_copy(0, half.order, states)

    def _predict_words(self, fused: Tensor, inputs: MaskedInputs, losses: Scalars, metrics: Scalars) -> None:
        """MLM over the multimodal states [B, T, D]."""
        batch, length = inputs.word_labels.shape
        capacity = masking.masking_capacity(batch, length, self.config.mlm_probability)
        rows = masking.gather_masked(fused[:, :length], inputs.word_labels, capacity)
        logits = self.word_head(rows.states)
        losses["mlm"] = masking.mlm_loss(logits, rows.labels)
        metrics["mlm_accuracy"] = masking.masked_accuracy(logits, rows.labels)

    def _recover(
        self, fused: Tensor, masked: _Encoded, inputs: MaskedInputs, losses: Scalars, metrics: Scalars
    ) -> None:
        """MCR of tags and phrases: their labels share the step's one copy to the host."""
        length, tags = inputs.text_ids.shape[1], inputs.tag_ids.shape[1]
        if self.config.fusion == "split":
            text, image, tag_labels = masked.text, masked.image[:, :tags], inputs.tag_labels
        else:  # one encoder: what it made of both; the tags' [CLS] is left out of its input
            text, image, tag_labels = fused[:, :length], fused[:, length : length + tags - 1], inputs.tag_labels[:, 1:]
        mcr = self.config.mcr
        kinds: dict[str, concepts.Slots] = {}
        if "mcr_v" not in self.left_out:
            kinds["mcr_v"] = self._slots(image, tag_labels, mcr.tags, self.tag_head)
        if "mcr_s" not in self.left_out:
            kinds["mcr_s"] = self._slots(text, inputs.phrase_labels, mcr.phrases, self._phrase_logits)
        if not kinds:
            return
        found = concepts.recover(list(kinds.values()), mcr.order, mcr.cost)
        for (name, kind), result in zip(kinds.items(), found, strict=True):
            losses[name] = result.loss
            metrics[f"{name}_accuracy"] = masking.masked_accuracy(kind.logits, result.labels)

    def _phrase_logits(self, states: Tensor) -> Tensor:
        return self.phrase_head(states, self.encoder.embeddings.phrase_rows())

    def _slots(
        self, states: Tensor, labels: Tensor, probability: float, head: Callable[[Tensor], Tensor]
    ) -> concepts.Slots:
        batch, length = labels.shape
        rows = concepts.gather_concepts(states, labels, masking.masking_capacity(batch, length, probability))
        return concepts.Slots(head(rows.states), rows.labels, rows.groups, length)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Keep the temperature in its range."""
        if self.contrasts:
            low, high = (-torch.tensor(bound).log() for bound in reversed(TEMPERATURE_RANGE))
            value = writer.read(self.logit_scale)
            writer.write(self.logit_scale, value.clamp(low.to(value.device), high.to(value.device)))

    # --- carried state and codebook ---------------------------------------------------------------------------------

    def carried_state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back nothing.

        Raises:
            KeyError: there is something.
        """
        if state:
            raise KeyError(f"carried state: expected nothing, found {sorted(state)}")

    def place(self, device: torch.device) -> None:
        """There is nothing to move."""

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"encoder.embeddings.position_embeddings.weight"}

    def codebooks(self) -> dict[str, Codebook]:
        """None: concepts are the rows of the embedding table."""
        return {}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """None."""
        return {}
