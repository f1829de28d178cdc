"""CB-ViLA: vision-language pre-training with a learned visual codebook (Guo, Duan et al., `cb-vila`).

One step, as in Fig. 1: the ViT encodes the image; its patch tokens are quantised (eq. 1); masked cells of the
quantised image are predicted from the visible ones and the text, as codes (MIM, eq. 4) and as pixels (eq. 3, first
term); texts ask the unquantised image for ITM (eq. 5) and MLM (eq. 6). One fusion encoder serves both directions.
The paper draws hard negatives from a contrastive similarity that its total (eq. 7) does not train, hence ITC.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale.codebooks.quantizer import Quantizer
from vlscale.config import CbVilaSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.errors import UserError
from vlscale.nn.bert import INIT_STD, FusionEncoder, KeyValue, TextEncoder, concat_context, load_bert, select_context
from vlscale.nn.heads import MlmHead
from vlscale.nn.vision import VisionEncoder
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import patches
from vlscale.objectives.codebook import codebook_loss
from vlscale.objectives.contrastive import in_batch_itc
from vlscale.objectives.masking import gather_masked, mask_tokens, masked_accuracy, masking_capacity, mlm_loss
from vlscale.objectives.matching import draw_negatives, itm_accuracy, itm_loss, valid_rows
from vlscale.objectives.reconstruction import code_accuracy, gumbel_noise, mim_loss, normalize_patches, pixel_loss
from vlscale.systems.encoding import TEMPERATURE_RANGE, PairEncoding
from vlscale.systems.protocol import Choices, Codebook, ImageStates, Progress, Reconstruction, StepOutput, TextStates


class _Pairs(NamedTuple):
    """What the objectives with text queries share."""

    context: list[KeyValue]
    """Keys and values of the image tokens, per fusion layer, [B, h, 1 + N, d]."""
    clean: Tensor
    """[B, L, D], encoded texts."""
    masked: Tensor | None
    """[B, L, D], encoded masked texts; None during warm-up."""
    labels: Tensor | None
    """[B, L] MLM labels."""
    mask: Tensor
    """[B, L]."""


class _Cells(NamedTuple):
    """The quantised image."""

    features: Tensor
    """v [B, N, D], fp32."""
    indices: Tensor
    """[B, N] int64, nearest codes."""
    nearest: Tensor
    """c [B, N, D], with gradient to the codebook."""
    visible: Tensor
    """[B, N − M] int64."""
    masked: Tensor
    """[B, M] int64."""


class CbVila(PairEncoding, nn.Module):
    """Encoders, codebook and heads; see the module's docstring."""

    def __init__(
        self,
        config: CbVilaSystem,
        image_size: int,
        vocabulary: Vocabulary,
        left_out: frozenset[str] = frozenset(),
        *,
        contrast: bool = True,
    ) -> None:
        """
        Args:
            left_out: losses that are not computed; ITC is in any case. Without `mim`, `pixel` and `codebook` nothing is
                quantised, and the codes stay as they are.
            contrast: whether the recipe trains ITC: without it negatives are drawn uniformly.
        """
        super().__init__()
        self.config, self.vocabulary, self.left_out, self.trains_contrast = config, vocabulary, left_out, contrast
        self.quantises = not left_out.issuperset({"mim", "pixel", "codebook"})
        recompute = config.checkpoint_activations
        self.vision = VisionEncoder(config.vision, image_size, recompute)
        width = config.text.width
        if self.vision.width != width:
            raise UserError(
                f"system.text.width: CB-ViLA's codes are read by both modalities, so it must equal the vision width "
                f"{self.vision.width}, got {width}"
            )
        self.text_encoder = TextEncoder(config.text, vocabulary, recompute)
        self.fusion_encoder = FusionEncoder(config.text, width, recompute)
        self.vision_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = nn.Linear(width, 2)
        self.mlm_head = MlmHead(width, vocabulary.size)
        self.codebook = Quantizer(config.codebook, width)
        cells = self.grid[0] * self.grid[1]
        self.masked_cells = patches.masked_cells(self.grid, config.mim.ratio, config.mim.block)
        self.mask_embedding = nn.Parameter(torch.randn(width) * INIT_STD)
        self.query_positions = nn.Parameter(torch.randn(cells + config.mim.cls, width) * INIT_STD)
        self.query_norm = nn.LayerNorm(width)
        self.mim_head = nn.Linear(width, config.codebook.size)
        self.pixel_head = nn.Linear(width, 3 * self.vision.patch**2)
        if config.text.init != "random":
            load_bert(config.text.init, self.text_encoder, self.fusion_encoder, self.mlm_head)

    # -- training ------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses itc, itm, codebook, pixel and, after warm-up, mim and mlm (eq. 7); metrics beside them."""
        choices = choices or Choices()
        warm = progress.step < self.config.warmup_steps
        tokens = self.vision(batch.images)  # [B, 1 + N, D]
        pairs = self._encode_pairs(batch, tokens, warm, progress, choices)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {"temperature": self.temperature.detach()}

        sims = self._contrast(batch, tokens, pairs, losses)
        self._match(batch, pairs, sims, progress, choices, losses, metrics)
        if pairs.masked is not None:
            self._predict_words(pairs, choices, losses, metrics)
        if self.quantises:
            cells = self._quantise(tokens, progress, choices, losses)
            self._predict_cells(batch, tokens, cells, pairs, warm, progress, choices, losses, metrics)
            if self.training:
                self.codebook.observe(cells.features.flatten(0, 1), cells.indices.flatten())
            metrics |= self.codebook.tracker.metrics(progress.step)
        return StepOutput(losses, metrics)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Keep the temperature in range, move the codebook's statistics, start and revive codes."""
        writer.write(self.temperature, writer.read(self.temperature).clamp(*TEMPERATURE_RANGE))
        self.codebook.after_step(progress.step + 1, progress.fraction, writer)

    def _encode_pairs(self, batch: Batch, tokens: Tensor, warm: bool, progress: Progress, choices: Choices) -> _Pairs:
        """Clean and masked texts in one pass; the image's keys and values once for all that read them."""
        context = self.fusion_encoder.project_context(tokens)
        ids, mask = batch.input_ids, batch.attention_mask
        masked_ids, labels = choices.masked_input_ids, choices.mlm_labels
        if not warm and (masked_ids is None or labels is None):
            # Drawn without MLM too: the draws that follow don't depend on what is left out.
            masked_ids, labels = mask_tokens(ids, self.vocabulary, self.config.mlm_probability, progress.generator)
        if warm or "mlm" in self.left_out or masked_ids is None:
            return _Pairs(context, self.text_encoder(ids, mask), None, None, mask)
        clean, masked = self.text_encoder(torch.cat([ids, masked_ids]), torch.cat([mask, mask])).chunk(2)
        return _Pairs(context, clean, masked, labels, mask)

    def _contrast(
        self, batch: Batch, tokens: Tensor, pairs: _Pairs, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """ITC over the global batch; returns the local similarities that draw the negatives."""
        image_feat, text_feat = self.image_feature(tokens), self.text_feature(pairs.clean)
        itc = in_batch_itc(image_feat, text_feat, self.divisor(), batch.image_ids)
        losses["itc"] = itc.loss
        return itc.sim_t2i, itc.sim_i2t

    def _match(
        self,
        batch: Batch,
        pairs: _Pairs,
        sims: tuple[Tensor, Tensor],
        progress: Progress,
        choices: Choices,
        losses: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> None:
        """ITM, eq. 5: every pair, a negative image for every text and a negative text for every image."""
        t2i, i2t = sims
        if not self.trains_contrast:
            t2i, i2t = torch.zeros_like(t2i), torch.zeros_like(i2t)
        drawn = draw_negatives(t2i, i2t, batch.image_ids, progress.generator)
        if "itm" in self.left_out:
            return
        images = drawn.images if choices.negative_images is None else choices.negative_images
        texts = drawn.texts if choices.negative_texts is None else choices.negative_texts
        queries = torch.cat([pairs.clean, pairs.clean, pairs.clean[texts]])  # [3B, L, D]
        mask = torch.cat([pairs.mask, pairs.mask, pairs.mask[texts]])
        context = concat_context(pairs.context, select_context(pairs.context, images), pairs.context)
        fused = self.fusion_encoder(queries, mask, context, cls_only=True)
        logits = self.match_logits(fused)
        valid = valid_rows(drawn)
        losses["itm"] = itm_loss(logits, valid)
        metrics["itm_accuracy"] = itm_accuracy(logits, valid)
        metrics["itm_skipped"] = (~valid).sum().float()

    def _predict_words(
        self, pairs: _Pairs, choices: Choices, losses: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> None:
        """MLM, eq. 6: masked texts ask the unquantised image."""
        assert pairs.masked is not None
        assert pairs.labels is not None
        fused = self.fusion_encoder(pairs.masked, pairs.mask, pairs.context)
        everything = choices.mlm_labels is not None
        probability = 1.0 if everything else self.config.mlm_probability
        batch, length = pairs.labels.shape
        capacity = masking_capacity(batch, length, probability)
        states, labels = gather_masked(fused, pairs.labels, capacity)
        logits = self.mlm_head(states, self.text_encoder.embeddings.word_embeddings.weight)
        losses["mlm"] = mlm_loss(logits, labels)
        metrics["mlm_accuracy"] = masked_accuracy(logits, labels)

    def _quantise(
        self,
        tokens: Tensor,
        progress: Progress,
        choices: Choices,
        losses: dict[str, Tensor],
    ) -> _Cells:
        """Nearest codes (eq. 1), the vector-quantisation terms (eq. 3) and the mask."""
        features = tokens[:, 1:].float()  # [B, N, D]
        indices = self.codebook.assign(features)
        nearest = self.codebook.lookup(indices)
        options = self.config.codebook
        if "codebook" not in self.left_out:
            losses["codebook"] = codebook_loss(
                features.flatten(0, 1), nearest.flatten(0, 1), options.beta, options.reduction
            )
        mask = choices.patch_mask
        if mask is None:
            mim = self.config.mim
            mask = patches.draw_patch_mask(len(features), self.grid, mim.ratio, mim.block, progress.generator)
            mask = mask.to(features.device, non_blocking=True)
        visible, masked = patches.split_cells(mask, self.masked_cells)
        return _Cells(features, indices, nearest, visible, masked)

    def _predict_cells(
        self,
        batch: Batch,
        tokens: Tensor,
        cells: _Cells,
        pairs: _Pairs,
        warm: bool,
        progress: Progress,
        choices: Choices,
        losses: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> None:
        """MIM (eq. 4) on z_q and the pixel term (eq. 3) on sampled codes, as the two halves of one fusion call."""
        predicts, paints = not warm and "mim" not in self.left_out, "pixel" not in self.left_out
        if not (predicts or paints):
            return
        features = patches.take_cells(cells.features, cells.visible)  # [B, N − M, D]
        # Straight through: the value of the code, the gradient of the feature (none to C, as the paper asks for MIM).
        z_q = features + (patches.take_cells(cells.nearest, cells.visible) - features).detach()
        share = self.config.mim.share_pass
        inputs = [z_q] if predicts or share else []
        if paints and not share:
            inputs.append(self._sample(features, cells, progress, choices, metrics))
        queries = torch.cat([self._queries(values, cells, tokens) for values in inputs])
        context = self.fusion_encoder.project_context(pairs.clean)
        context = concat_context(*[context] * len(inputs)) if len(inputs) > 1 else context
        context_mask = pairs.mask.repeat(len(inputs), 1)
        fused = self.fusion_encoder(queries, None, context, context_mask)[:, int(self.config.mim.cls) :]
        halves = fused.split(len(features))
        if paints:
            self._pixel(batch, patches.take_cells(halves[-1], cells.masked), cells, losses)
        if predicts:
            logits = self.mim_head(patches.take_cells(halves[0], cells.masked))
            targets = cells.indices.gather(1, cells.masked)
            losses["mim"] = mim_loss(logits, targets)
            metrics["mim_accuracy"] = code_accuracy(logits, targets)

    def _sample(
        self, features: Tensor, cells: _Cells, progress: Progress, choices: Choices, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Codes of the visible cells for the pixel pass: Gumbel samples in training, the nearest in evaluation."""
        if not self.training:
            return patches.take_cells(cells.nearest, cells.visible)
        flat = features.flatten(0, 1)
        noise = choices.gumbel_noise
        if noise is None:
            noise = gumbel_noise(len(flat), self.config.codebook.size, progress.generator)
        tau = self.codebook.tau(progress.fraction)
        sampled = self.codebook.sample(flat, tau, noise.to(flat.device, non_blocking=True))
        nearest = cells.indices.gather(1, cells.visible).flatten()
        metrics["gumbel_agreement"] = (sampled.indices == nearest).float().mean()
        return sampled.codes.view_as(features)

    def _queries(self, values: Tensor, cells: _Cells, tokens: Tensor) -> Tensor:
        """Visible values [B, N − M, D] in their cells, the mask embedding in the others, positions, LayerNorm."""
        batch, count = cells.indices.shape
        canvas = self.mask_embedding.float().expand(batch, count, -1)
        canvas = patches.put_cells(canvas, cells.visible, values.float())
        if self.config.mim.cls:
            canvas = torch.cat([tokens[:, :1].float(), canvas], dim=1)
        return self.query_norm((canvas + self.query_positions.float()).to(self.query_norm.weight.dtype))

    def _pixel(self, batch: Batch, fused: Tensor, cells: _Cells, losses: dict[str, Tensor]) -> None:
        target = patches.take_cells(patches.patchify(batch.images.float(), self.vision.patch), cells.masked)
        if self.config.mim.norm_pix:
            target = normalize_patches(target).values
        losses["pixel"] = pixel_loss(self.pixel_head(fused), target)

    # -- what every system offers ----------------------------------------------------------------------------------

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        """None where ITC was not trained: then retrieval scores every pair with ITM."""
        return super().similarity(image, text) if self.trains_contrast else None

    def codebooks(self) -> dict[str, Codebook]:
        return {"visual": self.codebook}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        return {"visual": self.vision(batch.images)[:, 1:].float()}

    def carried_state(self) -> dict[str, Tensor]:
        return {f"codebook.{name}": value for name, value in self.codebook.tracker.state().items()}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        self.codebook.tracker.load_state({name.removeprefix("codebook."): value for name, value in state.items()})

    def place(self, device: torch.device) -> None:
        self.codebook.tracker.place(device)

    def no_weight_decay(self) -> set[str]:
        return {"temperature", "codebook.codes", "mask_embedding", "query_positions"}

    # -- pictures and probes -----------------------------------------------------------------------------------------

    def predict_masked(self, batch: Batch, text: TextStates, patch_mask: Tensor) -> dict[str, Tensor]:
        """Both predictions of the masked cells in evaluation: no sampling, nearest codes.

        Args:
            text: the texts that condition the prediction.
            patch_mask: [B, N] bool with exactly `masked_cells` true in every row.

        Returns:
            cells [B, M] int64 (which), codes [B, M] int64 (their true codes), logits [B, M, K], pixels [B, M, 3·p²].
        """
        tokens = self.vision(batch.images)
        indices = self.codebook.assign(tokens[:, 1:].float())
        visible, masked = patches.split_cells(patch_mask, self.masked_cells)
        cells = _Cells(tokens[:, 1:].float(), indices, self.codebook.lookup(indices), visible, masked)
        queries = self._queries(patches.take_cells(cells.nearest, visible), cells, tokens)
        context = self.fusion_encoder.project_context(text.tokens)
        fused = self.fusion_encoder(queries, None, context, text.mask)[:, int(self.config.mim.cls) :]
        fused = patches.take_cells(fused, masked)
        logits, pixels = self.mim_head(fused).float(), self.pixel_head(fused).float()
        return {"cells": masked, "codes": indices.gather(1, masked), "logits": logits, "pixels": pixels}

    def reconstruct(self, batch: Batch, patch_mask: Tensor) -> Reconstruction:
        """Original, masked and predicted pictures (Fig. 2); norm_pix is undone with the true patch's mean and std."""
        size = self.vision.patch
        true = patches.patchify(batch.images.float(), size)
        found = self.predict_masked(batch, self.encode_text(batch), patch_mask)
        pixels = found["pixels"]
        if self.config.mim.norm_pix:
            _, mean, deviation = normalize_patches(patches.take_cells(true, found["cells"]))
            pixels = pixels * deviation + mean
        hidden = true.masked_fill(patch_mask[:, :, None], 0.0)
        predicted = patches.put_cells(true, found["cells"], pixels)
        return Reconstruction(*(patches.unpatchify(rows, self.grid, size) for rows in (true, hidden, predicted)))

    # -- parts ---------------------------------------------------------------------------------------------------------
