"""ALBEF (Li et al. 2021): align by contrast, then fuse; a momentum teacher softens the targets.

Losses: ITC against the teacher's features and queues, ITM with hard negatives, MLM with distillation. The result is
the public release's; the work is less: keys and values of an image are computed once for every pass that reads it,
clean and masked texts share one pass of the text encoder, the vocabulary projection sees the masked positions only,
and the last layer of ITM the CLS row only.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.config import AlbefSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.bert import FusionEncoder, KeyValue, TextEncoder, concat_context, load_bert, select_context
from vlscale.nn.heads import MlmHead
from vlscale.nn.queue import FeatureQueue
from vlscale.nn.teacher import Teacher
from vlscale.nn.vision import VisionEncoder
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import contrastive, masking, matching
from vlscale.systems.protocol import Choices, Codebook, ImageStates, Progress, StepOutput, TextStates

TEMPERATURE_RANGE = (0.001, 0.5)
_TAUGHT = ("vision", "vision_proj", "text_encoder", "text_proj", "fusion_encoder", "mlm_head")


class MaskedTexts(NamedTuple):
    """Texts with words to predict."""

    input_ids: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64, −100 where not masked."""
    capacity: int
    """Rows C that hold the masked positions."""


class Taught(NamedTuple):
    """What the teacher says of a batch; no gradient."""

    image_feat: Tensor
    """[B, d] fp32, unit length."""
    text_feat: Tensor
    """[B, d] fp32, unit length."""
    mlm_logits: Tensor | None
    """[C, V], rows as `masking.gather_masked` orders them; None where α is 0."""


class Contrast(NamedTuple):
    """Contrastive loss and what it was made of."""

    loss: Tensor
    sim_i2t: Tensor
    """[B, B + Q], this batch first, then the queue."""
    sim_t2i: Tensor
    hard: Tensor
    """[B, B + Q], the right answers in equal shares."""
    targets_i2t: Tensor
    targets_t2i: Tensor


class Albef(nn.Module):
    """The student's modules are registered; teacher and queues are carried beside (see `carried_state`)."""

    def __init__(self, config: AlbefSystem, image_size: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        checkpointing = config.checkpoint_activations
        self.vision = VisionEncoder(config.vision, image_size, checkpointing)
        self.text_encoder = TextEncoder(config.text, vocabulary, checkpointing)
        self.fusion_encoder = FusionEncoder(config.text, self.vision.width, checkpointing)
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.mlm_head = MlmHead(config.text.width, vocabulary.size)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        if config.text.init != "random":
            load_bert(config.text.init, self.text_encoder, self.fusion_encoder, self.mlm_head)
        self.teacher = Teacher({name: getattr(self, name) for name in _TAUGHT}, config.teacher.momentum)
        self.image_queue = FeatureQueue(config.embed_dim, config.teacher.queue_size, seed=0)
        self.text_queue = FeatureQueue(config.embed_dim, config.teacher.queue_size, seed=1)
        self._kept: list[Tensor] = []
        self._kept_step = -1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.vision.grid

    # --- the step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses `itc`, `itm`, `mlm` of one micro-batch; keeps the teacher's features for `after_step`."""
        choices = choices or Choices()
        alpha = self.alpha(progress)
        masked = self._masked_texts(batch, progress, choices)

        images = self.vision(batch.images)  # [B, 1 + N, D_v]
        texts, masked_texts = self._encode_clean_and_masked(self.text_encoder, batch, masked)  # [B, L, D] each
        image_feat, text_feat = self._image_feature(images), self._text_feature(texts)  # [B, d]
        taught = self._teach(batch, masked, alpha)
        contrast = self.contrast(image_feat, text_feat, taught, batch.image_ids, alpha)

        context = self.fusion_encoder.project_context(images)
        negatives = self._negatives(contrast, batch, progress, choices)
        valid = matching.valid_rows(negatives)  # [3B]
        itm_logits = self._match(texts, batch.attention_mask, context, negatives)  # [3B, 2]

        fused = self.fusion_encoder(masked_texts, batch.attention_mask, context)  # [B, L, D]
        rows = masking.gather_masked(fused, masked.labels, masked.capacity)
        mlm_logits = self.mlm_head(rows.states, self._word_table(self.text_encoder))  # [C, V]

        if self.training:
            self._keep(taught, progress)
        losses = {
            "itc": contrast.loss,
            "itm": matching.itm_loss(itm_logits, valid),
            "mlm": masking.mlm_loss(mlm_logits, rows.labels, taught.mlm_logits, alpha),
        }
        metrics = {
            "itc_accuracy": self._itc_accuracy(contrast),
            "itm_accuracy": matching.itm_accuracy(itm_logits, valid),
            "mlm_accuracy": masking.masked_accuracy(mlm_logits, rows.labels),
            "temperature": self._temperature().detach(),
            "itm_skipped": (~valid).sum().float(),
            "nonfinite_similarities": contrastive.count_nonfinite(contrast.sim_i2t, contrast.sim_t2i),
        }
        return StepOutput(losses, metrics)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Clamp the temperature, move the teacher, push the step's features of all ranks and micro-batches."""
        writer.write(self.temperature, writer.read(self.temperature).clamp(*TEMPERATURE_RANGE))
        self.teacher.update()
        if self._kept:
            gathered = distributed.gather(torch.cat(self._kept))  # [G, 2d]
            images, texts = gathered.chunk(2, dim=1)
            self.image_queue.push(images)
            self.text_queue.push(texts)
            self._kept.clear()

    def alpha(self, progress: Progress) -> float:
        """Weight of the teacher's targets: linear from 0 over epoch 0, then constant."""
        return self.config.teacher.alpha * min(1.0, progress.epoch)

    def contrast(
        self, image_feat: Tensor, text_feat: Tensor, taught: Taught, image_ids: Tensor, alpha: float
    ) -> Contrast:
        """ITC of ALBEF, eq. 1 and 6: student's features [B, d] against the teacher's of this batch and the queues.

        The release's hard targets are the identity; equal image ids within the batch share their row here.
        """
        temperature = self._temperature()
        images, texts = self.image_queue.features, self.text_queue.features  # [d, Q]
        sim_i2t = contrastive.queue_similarities(image_feat, taught.text_feat, texts, temperature)
        sim_t2i = contrastive.queue_similarities(text_feat, taught.image_feat, images, temperature)
        hard = F.pad(contrastive.hard_targets(image_ids, image_ids), (0, self.image_queue.size))  # [B, B + Q]
        targets_i2t = targets_t2i = hard
        if alpha:
            with torch.no_grad():
                soft_i2t = contrastive.queue_similarities(taught.image_feat, taught.text_feat, texts, temperature)
                soft_t2i = contrastive.queue_similarities(taught.text_feat, taught.image_feat, images, temperature)
            targets_i2t = contrastive.smoothed_targets(soft_i2t, hard, alpha)
            targets_t2i = contrastive.smoothed_targets(soft_t2i, hard, alpha)
        loss = contrastive.soft_cross_entropy(sim_i2t, targets_i2t) + contrastive.soft_cross_entropy(
            sim_t2i, targets_t2i
        )
        return Contrast(loss / 2, sim_i2t, sim_t2i, hard, targets_i2t, targets_t2i)

    # --- carried state ----------------------------------------------------------------------------------------------

    def carried_state(self) -> dict[str, Tensor]:
        """Teacher (fp32), queues (fp32) and their pointers (int64), equal on every rank; not copies."""
        state = {f"teacher.{name}": value for name, value in self.teacher.state().items()}
        for name, queue in self._queues().items():
            state |= {f"{name}.{key}": value for key, value in queue.state().items()}
        return state

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `carried_state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError, RuntimeError: a shape differs.
        """
        own = self.carried_state()
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise KeyError(f"carried state: missing {missing}, unknown {unknown}")
        prefix = "teacher."
        self.teacher.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        for name, queue in self._queues().items():
            queue.load_state(state[f"{name}.features"], state[f"{name}.pointer"])

    def place(self, device: torch.device) -> None:
        """Move teacher and queues to `device`."""
        self.teacher.place(device)
        for queue in self._queues().values():
            queue.place(device)

    def no_weight_decay(self) -> set[str]:
        """Position tables and the temperature."""
        return {"vision.vit.pos_embed", "text_encoder.embeddings.position_embeddings.weight", "temperature"}

    # --- encoding, for tasks and inspection -------------------------------------------------------------------------

    def encode_image(self, batch: Batch) -> ImageStates:
        """Student's image states; `batch.images` is float and normalised."""
        tokens = self.vision(batch.images)
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return ImageStates(tokens, mask, self._image_feature(tokens))

    def encode_text(self, batch: Batch) -> TextStates:
        """Student's text states."""
        tokens = self.text_encoder(batch.input_ids, batch.attention_mask)
        return TextStates(tokens, batch.attention_mask, self._text_feature(tokens))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        """Text queries over image tokens; [B, L, D]."""
        context = self.fusion_encoder.project_context(image.tokens)
        return self.fusion_encoder(text.tokens, text.mask, context, image.mask)

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor:
        """Cosines over the temperature, [B_image, B_text] fp32."""
        return contrastive.similarities(image.pooled, text.pooled, self._temperature())

    def match_logits(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, 2]; class 1 = match."""
        return self.itm_head(states[:, 0]).float()

    def codebooks(self) -> dict[str, Codebook]:
        """ALBEF has none."""
        return {}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """ALBEF has none."""
        return {}

    # --- parts of the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _teach(self, batch: Batch, masked: MaskedTexts, alpha: float) -> Taught:
        teacher, student_dtype = self.teacher, self.vision_proj.weight.dtype
        half = student_dtype != torch.float32  # native half precision has no autocast; the fp32 teacher takes its own
        with torch.autocast(batch.images.device.type, student_dtype) if half else nullcontext():
            images = teacher["vision"](batch.images)
            if alpha:
                texts, masked_texts = self._encode_clean_and_masked(teacher["text_encoder"], batch, masked)
            else:
                texts = teacher["text_encoder"](batch.input_ids, batch.attention_mask)
            image_feat = _unit(teacher["vision_proj"](images[:, 0]))
            text_feat = _unit(teacher["text_proj"](texts[:, 0]))
            if not alpha:
                return Taught(image_feat, text_feat, None)
            fusion = teacher["fusion_encoder"]
            fused = fusion(masked_texts, batch.attention_mask, fusion.project_context(images))
            rows = masking.gather_masked(fused, masked.labels, masked.capacity)
            logits = teacher["mlm_head"](rows.states, self._word_table(teacher["text_encoder"]))
        return Taught(image_feat, text_feat, logits)

    def _match(self, texts: Tensor, mask: Tensor, context: list[KeyValue], negatives: matching.Negatives) -> Tensor:
        """ITM logits [3B, 2] of: the pairs, every text with its wrong image, every image with its wrong text."""
        queries = torch.cat([texts, texts, texts[negatives.texts]])  # [3B, L, D]
        query_mask = torch.cat([mask, mask, mask[negatives.texts]])
        images = concat_context(context, select_context(context, negatives.images), context)
        return self.match_logits(self.fusion_encoder(queries, query_mask, images, cls_only=True))

    def _negatives(self, contrast: Contrast, batch: Batch, progress: Progress, choices: Choices) -> matching.Negatives:
        size = len(batch)
        if choices.negative_images is not None and choices.negative_texts is not None:
            return matching.chosen_negatives(choices.negative_images, choices.negative_texts, batch.image_ids)
        return matching.draw_negatives(
            contrast.sim_t2i[:, :size], contrast.sim_i2t[:, :size], batch.image_ids, progress.generator
        )

    def _masked_texts(self, batch: Batch, progress: Progress, choices: Choices) -> MaskedTexts:
        probability = self.config.mlm_probability
        if choices.masked_input_ids is not None and choices.mlm_labels is not None:
            return MaskedTexts(choices.masked_input_ids, choices.mlm_labels, batch.input_ids.numel())
        ids, labels = masking.mask_tokens(batch.input_ids, self.vocabulary, probability, progress.generator)
        return MaskedTexts(ids, labels, masking.masking_capacity(len(ids), ids.shape[1], probability))

    def _encode_clean_and_masked(
        self, encoder: TextEncoder, batch: Batch, masked: MaskedTexts
    ) -> tuple[Tensor, Tensor]:
        states = encoder(torch.cat([batch.input_ids, masked.input_ids]), batch.attention_mask.repeat(2, 1))
        clean, hidden = states.chunk(2)
        return clean, hidden

    def _keep(self, taught: Taught, progress: Progress) -> None:
        if progress.step != self._kept_step:  # a step that was skipped leaves features that must not be pushed
            self._kept.clear()
            self._kept_step = progress.step
        self._kept.append(torch.cat([taught.image_feat, taught.text_feat], dim=1))  # [B, 2d]

    def _itc_accuracy(self, contrast: Contrast) -> Tensor:
        i2t = contrastive.retrieval_accuracy(contrast.sim_i2t, contrast.hard)
        return (i2t + contrastive.retrieval_accuracy(contrast.sim_t2i, contrast.hard)) / 2

    def _image_feature(self, tokens: Tensor) -> Tensor:
        return _unit(self.vision_proj(tokens[:, 0]))

    def _text_feature(self, tokens: Tensor) -> Tensor:
        return _unit(self.text_proj(tokens[:, 0]))

    def _temperature(self) -> Tensor:
        return contrastive.clamped_temperature(self.temperature, *TEMPERATURE_RANGE)

    @staticmethod
    def _word_table(encoder: TextEncoder) -> Tensor:
        return encoder.embeddings.word_embeddings.weight

    def _queues(self) -> dict[str, FeatureQueue]:
        return {"image_queue": self.image_queue, "text_queue": self.text_queue}


def _unit(features: Tensor) -> Tensor:
    """[B, d] → fp32, unit length."""
    return F.normalize(features.float(), dim=-1)
