"""ALBEF (Li et al. 2021): align by contrast, then fuse; a momentum teacher softens the targets.

Losses: ITC against the teacher's features and queues, ITM with hard negatives, MLM with distillation. The result is
the public release's; the work is less: keys and values of an image are computed once for every pass that reads it,
clean and masked texts share one pass of the text encoder, the vocabulary projection sees the masked positions only,
and the last layer of ITM the CLS row only. Fine-tuning for retrieval leaves MLM out and knows which image each column
of the queues is of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlscale.config import AlbefSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.bert import FusionEncoder, KeyValue, TextEncoder, load_bert
from vlscale.nn.heads import MlmHead
from vlscale.nn.vision import VisionEncoder
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import contrastive, masking, matching
from vlscale.systems.encoding import TEMPERATURE_RANGE, PairEncoding
from vlscale.systems.momentum import (
    MaskedTexts,
    Momentum,
    Taught,
    choose_negatives,
    encode_clean_and_masked,
    mask_texts,
    match_states,
    word_table,
)
from vlscale.systems.protocol import Choices, Codebook, Progress, StepOutput

Scalars = dict[str, Tensor]


class Albef(PairEncoding, nn.Module):
    """The student's modules are registered; teacher and queues are carried beside (see `carried_state`)."""

    def __init__(
        self,
        config: AlbefSystem,
        image_size: int,
        vocabulary: Vocabulary,
        left_out: frozenset[str] = frozenset(),
        *,
        queue_ids: bool = False,
        taught: bool = True,
    ) -> None:
        """
        Args:
            left_out: losses that are not computed; ITC is in any case, since negatives are drawn by its similarities.
            queue_ids: the queues know their columns' images, so that those of the same image are right answers too.
            taught: false for a task, which has a teacher of its own or none: there is no teacher and no queue.
        """
        super().__init__()
        self.config, self.vocabulary, self.left_out = config, vocabulary, left_out
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
        self.momentum = Momentum(self if taught else None, config.teacher, config.embed_dim, queue_ids)

    # --- the step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses `itc`, `itm`, `mlm` of one micro-batch; keeps the teacher's features for `after_step`."""
        choices = choices or Choices()
        alpha = self.momentum.alpha(progress)
        # Drawn in any case: the draws that follow don't depend on what is left out.
        drawn = mask_texts(batch, self.vocabulary, self.config.mlm_probability, progress, choices)
        masked = None if "mlm" in self.left_out else drawn

        images = self.vision(batch.images)  # [B, 1 + N, D_v]
        texts, masked_texts = encode_clean_and_masked(self.text_encoder, batch, masked)  # [B, L, D] each
        image_feat, text_feat = self.image_feature(images), self.text_feature(texts)  # [B, d]
        taught = self.momentum.teach(batch, masked, alpha, self.vision_proj.weight.dtype)
        contrast = self.contrast(image_feat, text_feat, taught, batch.image_ids, alpha)
        losses: Scalars = {"itc": (contrast.i2t + contrast.t2i) / 2}
        metrics: Scalars = {
            "itc_accuracy": contrast.accuracy(),
            "temperature": self.divisor().detach(),
            "nonfinite_similarities": contrastive.count_nonfinite(contrast.sim_i2t, contrast.sim_t2i),
        }

        context = self.fusion_encoder.project_context(images)  # once, for both that read it
        if "itm" not in self.left_out:
            size = len(batch)
            sims = contrast.sim_t2i[:, :size], contrast.sim_i2t[:, :size]
            negatives = choose_negatives(*sims, batch, progress, choices)
            self._learn_matching(texts, batch.attention_mask, context, negatives, losses, metrics)
        if masked is not None and masked_texts is not None:
            fused = self.fusion_encoder(masked_texts, batch.attention_mask, context)  # [B, L, D]
            self._predict_words(fused, masked, taught, alpha, losses, metrics)
        if self.training:
            self.momentum.keep(taught, batch.image_ids, progress)
        return StepOutput(losses, metrics)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Clamp the temperature, move the teacher, push the step's features of all ranks and micro-batches."""
        writer.write(self.temperature, writer.read(self.temperature).clamp(*TEMPERATURE_RANGE))
        self.momentum.after_step()

    def contrast(
        self, image_feat: Tensor, text_feat: Tensor, taught: Taught, image_ids: Tensor, alpha: float
    ) -> contrastive.CrossAlignment:
        """ITC of ALBEF, eq. 1 and 6: student's features [B, d] against the teacher's of this batch and the queues."""
        queues = self.momentum.image_queue.features, self.momentum.text_queue.features  # [d, Q]
        return contrastive.cross_alignment(
            image_feat,
            text_feat,
            taught.image_feat,
            taught.text_feat,
            *queues,
            self.divisor(),
            image_ids,
            alpha,
            self.momentum.queue_ids,
        )

    # --- carried state ----------------------------------------------------------------------------------------------

    def carried_state(self) -> dict[str, Tensor]:
        """Teacher (fp32), queues (fp32) and their pointers (int64), equal on every rank; not copies."""
        return self.momentum.state()

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `carried_state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError, RuntimeError: a shape differs.
        """
        self.momentum.load_state(state)

    def start_carried(self, state: Mapping[str, Tensor]) -> None:
        """Begin a fine-tuning with another run's teacher and queues, see `Momentum.start`."""
        self.momentum.start(state)

    def place(self, device: torch.device) -> None:
        """Move teacher and queues to `device`."""
        self.momentum.place(device)

    def no_weight_decay(self) -> set[str]:
        """Position tables and the temperature."""
        return {"vision.vit.pos_embed", "text_encoder.embeddings.position_embeddings.weight", "temperature"}

    def codebooks(self) -> dict[str, Codebook]:
        """ALBEF has none."""
        return {}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """ALBEF has none."""
        return {}

    # --- parts of the step ------------------------------------------------------------------------------------------

    def _match(self, texts: Tensor, mask: Tensor, context: list[KeyValue], negatives: matching.Negatives) -> Tensor:
        """ITM logits [3B, 2], see `match_states`."""
        return self.match_logits(match_states(self.fusion_encoder, texts, mask, context, negatives))

    def _learn_matching(
        self,
        texts: Tensor,
        mask: Tensor,
        context: list[KeyValue],
        negatives: matching.Negatives,
        losses: Scalars,
        metrics: Scalars,
    ) -> None:
        logits, valid = self._match(texts, mask, context, negatives), matching.valid_rows(negatives)  # [3B, 2], [3B]
        losses["itm"] = matching.itm_loss(logits, valid)
        metrics |= {"itm_accuracy": matching.itm_accuracy(logits, valid), "itm_skipped": (~valid).sum().float()}

    def _predict_words(
        self, fused: Tensor, masked: MaskedTexts, taught: Taught, alpha: float, losses: Scalars, metrics: Scalars
    ) -> None:
        """MLM with distillation."""
        rows = masking.gather_masked(fused, masked.labels, masked.capacity)
        logits = self.mlm_head(rows.states, word_table(self.text_encoder))  # [C, V]
        losses["mlm"] = masking.mlm_loss(logits, rows.labels, taught.mlm_logits, alpha)
        metrics["mlm_accuracy"] = masking.masked_accuracy(logits, rows.labels)
