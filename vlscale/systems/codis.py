"""CODIS (Duan et al. 2022, "Multi-modal Alignment using Representation Codebook"): image and text are two views of one
thing, aligned through a momentum teacher of each and through a codebook that both are transported to.

Losses: `align` (slides, part 2: student against both teachers), `code` (part 1: transport to the shared codes), ITM and
MLM as ALBEF's (part 3). Teacher and student see the same crop, or with `data.second_view` each its own, as in TCL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlscale.codebooks.prototypes import Prototypes
from vlscale.config import CodisSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.bert import FusionEncoder, TextEncoder, load_bert
from vlscale.nn.heads import MlmHead
from vlscale.nn.vision import VisionEncoder
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import contrastive, masking, matching
from vlscale.objectives.transport import code_losses
from vlscale.systems.encoding import TEMPERATURE_RANGE, PairEncoding
from vlscale.systems.momentum import (
    MaskedTexts,
    Momentum,
    Taught,
    choose_negatives,
    encode_clean_and_masked,
    mask_texts,
    match_states,
    require_names,
    word_table,
)
from vlscale.systems.protocol import Choices, Codebook, Progress, StepOutput

Scalars = dict[str, Tensor]


class Codis(PairEncoding, nn.Module):
    """The student's modules and the codes are registered; teacher, queues and usage are carried beside."""

    def __init__(
        self,
        config: CodisSystem,
        image_size: int,
        vocabulary: Vocabulary,
        left_out: frozenset[str] = frozenset(),
        *,
        queue_ids: bool = False,
        taught: bool = True,
    ) -> None:
        """
        Args:
            left_out: losses that are not computed: without `code` nothing is transported. `align` is in any case, since
                negatives are drawn by its similarities.
            queue_ids: the queues know their columns' images, so that those of the same image are right answers too.
            taught: false for a task, which has a teacher of its own or none: there is no teacher and no queue.
        """
        super().__init__()
        self.config, self.vocabulary, self.left_out = config, vocabulary, left_out
        self.trains_code = "code" not in left_out
        recompute = config.checkpoint_activations
        self.vision = VisionEncoder(config.vision, image_size, recompute)
        self.text_encoder = TextEncoder(config.text, vocabulary, recompute)
        self.fusion_encoder = FusionEncoder(config.text, self.vision.width, recompute)
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.mlm_head = MlmHead(config.text.width, vocabulary.size)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.codebook = Prototypes(config.codebook, config.embed_dim)
        if config.text.init != "random":
            load_bert(config.text.init, self.text_encoder, self.fusion_encoder, self.mlm_head)
        self.momentum = Momentum(self if taught else None, config.teacher, config.embed_dim, queue_ids)

    # --- the step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses `align`, `itm`, `mlm` and `code` of one micro-batch; keeps the teacher's features for `after_step`."""
        choices = choices or Choices()
        alpha = self.momentum.alpha(progress)
        # Drawn in any case: the draws that follow don't depend on what is left out.
        drawn = mask_texts(batch, self.vocabulary, self.config.mlm_probability, progress, choices)
        masked = None if "mlm" in self.left_out else drawn
        images = self.vision(batch.images)  # [B, 1 + N, D_v]
        texts, masked_states = encode_clean_and_masked(self.text_encoder, batch, masked)  # [B, L, D] each
        image_feat, text_feat = self.image_feature(images), self.text_feature(texts)  # [B, d]
        taught = self.momentum.teach(batch, masked, alpha, self.vision_proj.weight.dtype)
        losses: Scalars = {}
        metrics: Scalars = {"temperature": self.divisor().detach()}

        cross = self._align(image_feat, text_feat, taught, batch, alpha, losses, metrics)
        context = self.fusion_encoder.project_context(images)  # once, for both that read it
        if "itm" not in self.left_out:
            size = len(batch)
            negatives = choose_negatives(cross.sim_t2i[:, :size], cross.sim_i2t[:, :size], batch, progress, choices)
            states = match_states(self.fusion_encoder, texts, batch.attention_mask, context, negatives)
            self._learn_matching(states, negatives, losses, metrics)
        if masked is not None and masked_states is not None:
            fused = self.fusion_encoder(masked_states, batch.attention_mask, context)  # [B, L, D]
            self._predict_words(fused, masked, taught, alpha, losses, metrics)
        if self.trains_code:
            self._transport(image_feat, text_feat, taught, losses, metrics)
            metrics |= self.codebook.tracker.metrics(progress.step)
        if self.training:
            self.momentum.keep(taught, batch.image_ids, progress)
        return StepOutput(losses, metrics)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Clamp the temperature, move teacher, queues and the codes' statistics."""
        writer.write(self.temperature, writer.read(self.temperature).clamp(*TEMPERATURE_RANGE))
        self.momentum.after_step()
        if self.trains_code:
            self.codebook.after_step(progress.step + 1, progress.fraction, writer)

    def _align(
        self,
        image_feat: Tensor,
        text_feat: Tensor,
        taught: Taught,
        batch: Batch,
        alpha: float,
        losses: Scalars,
        metrics: Scalars,
    ) -> contrastive.CrossAlignment:
        """L_align: the cross-modal terms with smoothed targets, the intra-modal ones with one-hot targets."""
        queues = self.momentum.image_queue.features, self.momentum.text_queue.features  # [d, Q]
        temperature, ids, past = self.divisor(), batch.image_ids, self.momentum.queue_ids
        cross = contrastive.cross_alignment(
            image_feat, text_feat, taught.image_feat, taught.text_feat, *queues, temperature, ids, alpha, past
        )
        terms = {"align_i2t": cross.i2t, "align_t2i": cross.t2i}
        if self.config.align.intra:
            intra = contrastive.intra_alignment
            terms["align_i2i"] = intra(image_feat, taught.image_feat, queues[0], temperature, ids, past)
            terms["align_t2t"] = intra(text_feat, taught.text_feat, queues[1], temperature, ids, past)
        total = torch.stack(list(terms.values())).sum()
        averaged = self.config.align.reduce == "mean" or not self.config.align.intra
        losses["align"] = total / len(terms) if averaged else total
        metrics |= {name: term.detach() for name, term in terms.items()}
        metrics["align_accuracy"] = cross.accuracy()
        metrics["nonfinite_similarities"] = contrastive.count_nonfinite(cross.sim_i2t, cross.sim_t2i)
        return cross

    def _learn_matching(self, states: Tensor, negatives: matching.Negatives, losses: Scalars, metrics: Scalars) -> None:
        """ITM of fused states [3B, 1, D], see `match_states`."""
        logits, valid = self.match_logits(states), matching.valid_rows(negatives)  # [3B, 2], [3B]
        losses["itm"] = matching.itm_loss(logits, valid)
        metrics |= {"itm_accuracy": matching.itm_accuracy(logits, valid), "itm_skipped": (~valid).sum().float()}

    def _predict_words(
        self, fused: Tensor, masked: MaskedTexts, taught: Taught, alpha: float, losses: Scalars, metrics: Scalars
    ) -> None:
        """MLM with ALBEF's distillation."""
        rows = masking.gather_masked(fused, masked.labels, masked.capacity)
        logits = self.mlm_head(rows.states, word_table(self.text_encoder))  # [C, V]
        losses["mlm"] = masking.mlm_loss(logits, rows.labels, taught.mlm_logits, alpha)
        metrics["mlm_accuracy"] = masking.masked_accuracy(logits, rows.labels)

    def _transport(
        self, image_feat: Tensor, text_feat: Tensor, taught: Taught, losses: Scalars, metrics: Scalars
    ) -> None:
        """L_code: P and D are the student's, the plans the teacher's (or, as an ablation, the student's)."""
        book, options = self.codebook, self.config.codebook
        image_sim, text_sim = book.similarities(image_feat), book.similarities(text_feat)  # [B, K]
        by_teacher = options.feature == "teacher"
        image_spread = book.transported(taught.image_feat if by_teacher else image_feat.detach())
        text_spread = book.transported(taught.text_feat if by_teacher else text_feat.detach())
        terms = code_losses(image_sim, text_sim, image_spread, text_spread, options.temperature)
        losses["code"] = terms.total()
        metrics |= {f"code_{name}": term.detach() for name, term in terms._asdict().items()}
        image_codes, text_codes = image_sim.argmax(1), text_sim.argmax(1)
        metrics["code_agreement"] = (image_codes == text_codes).float().mean()
        if self.training:
            features = torch.cat([image_feat, text_feat])
            self.codebook.observe(features, torch.cat([image_codes, text_codes]))

    # --- carried state and codebook ---------------------------------------------------------------------------------

    def carried_state(self) -> dict[str, Tensor]:
        """Teacher, queues and the codes' statistics, equal on every rank; not copies."""
        usage = {f"codebook.{name}": value for name, value in self.codebook.tracker.state().items()}
        return self.momentum.state() | usage

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `carried_state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError, RuntimeError: a shape differs.
        """
        require_names(self.carried_state(), state)
        prefix = "codebook."
        self.codebook.tracker.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.momentum.load_state({k: v for k, v in state.items() if not k.startswith(prefix)})

    def start_carried(self, state: Mapping[str, Tensor]) -> None:
        """Begin a fine-tuning with another run's teacher and queues, see `Momentum.start`; usage is counted anew."""
        self.momentum.start(state)

    def place(self, device: torch.device) -> None:
        """Move the carried state to `device`."""
        self.momentum.place(device)
        self.codebook.tracker.place(device)

    def no_weight_decay(self) -> set[str]:
        """Position tables, the temperature and the codes."""
        tables = {"vision.vit.pos_embed", "text_encoder.embeddings.position_embeddings.weight"}
        return tables | {"temperature", "codebook.codes"}

    def codebooks(self) -> dict[str, Codebook]:
        """The one that both modalities share; none where it is not trained."""
        return {"shared": self.codebook} if self.trains_code else {}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """None over patches: the codes stand for whole images and texts, see `codebook_pairs`."""
        return {}

    def codebook_pairs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Per codebook the features of images and of texts that it is shared by, [B, d] each, unit length."""
        if not self.trains_code:
            return {}
        return {"shared": (self.encode_image(batch).pooled, self.encode_text(batch).pooled)}
