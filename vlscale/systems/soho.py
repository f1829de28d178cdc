"""SOHO (Huang et al. 2021, "Seeing Out of tHe bOx"): images as a network's own feature map, end to end from pixels.

The cells of the map are named by a visual dictionary that moves with them; one transformer reads words and cells.
Losses: MLM, MVM (section 3.3: the dictionary's index of masked cells) and ITM. There is no contrast and no teacher.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.codebooks.neck import NeckStates, VisualNeck, valid_cells
from vlscale.config import SohoSystem
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.cnn import CnnEncoder
from vlscale.nn.joint import JointEncoder, load_joint
from vlscale.nn.statistics import average_statistics
from vlscale.nn.writer import ParameterWriter
from vlscale.objectives import masking, matching, visual_masking
from vlscale.systems.protocol import Cells, Choices, Codebook, ImageStates, Progress, StepOutput, TextStates

_log = logging.getLogger(__name__)

Scalars = dict[str, Tensor]


class _Pairs(NamedTuple):
    """Visual tokens of every pair, masked for MVM, and what was masked."""

    tokens: Tensor
    """[B, N, D]."""
    valid: Tensor
    """[B, N] bool."""
    labels: Tensor | None
    """[B, N] int64, −100 where nothing is to be predicted; None without a dictionary."""


class Soho(nn.Module):
    """Every part is registered; the dictionary is a buffer, its usage is carried beside."""

    def __init__(
        self,
        config: SohoSystem,
        image_size: int,
        vocabulary: Vocabulary,
        left_out: frozenset[str] = frozenset(),
        *,
        quantise: bool = True,
    ) -> None:
        """
        Args:
            left_out: losses that are not computed; what they would ask for is not hidden either.
            quantise: false gives the transformer the dictionary's input in place of its codes, as fine-tuning does
                (section 4.2); then there is no MVM, and the dictionary stays as it is.
        """
        super().__init__()
        self.config, self.vocabulary, self.image_size = config, vocabulary, image_size
        self.left_out, self.quantises = left_out, quantise
        self.backbone = CnnEncoder(config.backbone)
        self.neck = VisualNeck(config.neck, config.dictionary, self.backbone.width, config.text.width)
        self.joint = JointEncoder(config.text, vocabulary, config.checkpoint_activations)
        self.itm_head = nn.Linear(config.text.width, 2, bias=False)
        if config.dictionary.use and config.mvm.head == "linear":
            self.mvm_head = nn.Linear(config.text.width, config.dictionary.size)
        if config.text.init != "random":
            load_joint(config.text.init, self.joint)

    # --- the step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses `itm`, `mlm` and, with a dictionary, `mvm` (eq. 6 to 9); `batch.matched` tells which pairs match."""
        choices = choices or Choices()
        if self.neck.dictionary is not None:
            self.neck.dictionary.begin(progress.step)
        matched = self._matched(batch)  # [B]
        words = self._masked_words(batch, progress, choices)
        pairs = self._visual_pairs(batch, progress, choices)
        states = torch.cat([self.joint.embed(words.input_ids), pairs.tokens], dim=1)  # [B, L + N, D]
        mask = torch.cat([batch.attention_mask, pairs.valid.long()], dim=1)
        fused = self.joint(states, mask)
        word_states, cell_states = fused.split([words.input_ids.shape[1], pairs.tokens.shape[1]], dim=1)

        losses: Scalars = {}
        metrics: Scalars = {"padding": 1 - pairs.valid.float().mean()}
        if "itm" not in self.left_out:
            itm_logits = self.match_logits(word_states)  # [B, 2]
            losses["itm"] = matching.pair_loss(itm_logits, matched)
            metrics["itm_accuracy"] = matching.pair_accuracy(itm_logits, matched)
        learns = matched.bool() | (self.config.mvm.pairs == "all")  # [B]
        if "mlm" not in self.left_out:
            labels = torch.where(learns[:, None], words.labels, masking.IGNORED)
            self._predict_words(word_states, labels, losses, metrics)
        if pairs.labels is not None:
            labels = torch.where(learns[:, None], pairs.labels, masking.IGNORED)
            self._predict_cells(cell_states, labels, progress, losses, metrics)
        return StepOutput(losses, metrics)

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Move the dictionary (`update: paper`), and let all ranks have the same BatchNorm statistics."""
        if self.neck.dictionary is not None:
            self.neck.dictionary.after_step(progress.step + 1, progress.fraction)
        average_statistics(self)

    def rest(self, progress: Progress) -> bool:
        """The backbone rests for `freeze_epochs` (section 3.2, cold start)."""
        resting = progress.epoch < self.config.backbone.freeze_epochs
        self.backbone.rest(resting)
        return resting

    def _matched(self, batch: Batch) -> Tensor:
        if batch.matched is None:
            return torch.ones(len(batch), dtype=torch.int64, device=batch.input_ids.device)
        return batch.matched

    def _masked_words(self, batch: Batch, progress: Progress, choices: Choices) -> masking.MaskedTokens:
        if choices.masked_input_ids is not None and choices.mlm_labels is not None:
            return masking.MaskedTokens(choices.masked_input_ids, choices.mlm_labels)
        # Drawn in any case: the draws that follow don't depend on what is left out.
        drawn = masking.mask_tokens(batch.input_ids, self.vocabulary, self.config.mlm_probability, progress.generator)
        if "mlm" not in self.left_out:
            return drawn
        return masking.MaskedTokens(batch.input_ids, torch.full_like(batch.input_ids, masking.IGNORED))

    def _visual_pairs(self, batch: Batch, progress: Progress, choices: Choices) -> _Pairs:
        """Cells are masked in every pair, matched or not: else a mask would tell ITM the answer."""
        texts = len(batch) // len(batch.images)
        neck, valid = self._neck(batch, texts if self.config.neck.repeat else 1)
        rest = 1 if self.config.neck.repeat else texts
        embeds, valid = neck.embeds.repeat_interleave(rest, 0), valid.repeat_interleave(rest, 0)  # [B, N, D], [B, h, w]
        if neck.indices is None or "mvm" in self.left_out:
            return _Pairs(self.neck.tokens(embeds, valid, None), valid.flatten(1), None)
        masked = self._masked_cells(neck.indices.repeat_interleave(rest, 0), valid.flatten(1), progress, choices)
        return _Pairs(self.neck.tokens(embeds, valid, masked.mask), valid.flatten(1), masked.labels)

    def _masked_cells(
        self, indices: Tensor, valid: Tensor, progress: Progress, choices: Choices
    ) -> visual_masking.MaskedCells:
        if self.config.mvm.masking == "index":
            return visual_masking.mask_index(indices, valid, progress.generator)
        position, coins = choices.extra.get("mvm_position"), choices.extra.get("mvm_coins")
        return visual_masking.mask_cell(
            indices, valid, self.config.mvm.probability, progress.generator, position, coins
        )

    def _neck(self, batch: Batch, repeats: int) -> tuple[NeckStates, Tensor]:
        """Neck states of every image, `repeats` times over, and which of their cells are no padding, [M, h, w]."""
        feature_map = self.backbone(batch.images)  # [I, C, h2, w2]
        valid = self._valid(batch, (feature_map.shape[2] // 2, feature_map.shape[3] // 2))
        feature_map, valid = feature_map.repeat_interleave(repeats, 0), valid.repeat_interleave(repeats, 0)
        return self.neck(feature_map, valid, self.quantises), valid

    def _valid(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """[I, h, w] bool; the release's canvas is square whatever the images are."""
        canvas = batch.images.shape[2], batch.images.shape[3]
        square = self.config.dictionary.update == "release"
        return valid_cells(batch.image_sizes, canvas, grid, square, len(batch.images), batch.images.device)

    def _predict_words(self, states: Tensor, labels: Tensor, losses: Scalars, metrics: Scalars) -> None:
        """MLM by the word table itself, without transform or bias, as in the release."""
        batch, length = labels.shape
        capacity = masking.masking_capacity(batch, length, self.config.mlm_probability)
        rows = masking.gather_masked(states, labels, capacity)
        logits = self.word_logits(rows.states)  # [C, V]
        losses["mlm"] = masking.mlm_loss(logits, rows.labels)
        metrics["mlm_accuracy"] = masking.masked_accuracy(logits, rows.labels)

    def _predict_cells(
        self, states: Tensor, labels: Tensor, progress: Progress, losses: Scalars, metrics: Scalars
    ) -> None:
        """MVM; states [B, N, D], labels [B, N]."""
        dictionary = self.neck.dictionary
        assert dictionary is not None
        flat, wanted = states.flatten(0, 1), labels.flatten()
        if self.config.mvm.head == "cosine":
            logits = visual_masking.cosine_logits(flat, dictionary.codes)  # [B · N, K]
        else:
            logits = self.mvm_head(flat)
        losses["mvm"] = visual_masking.mvm_loss(logits, wanted)
        metrics["mvm_accuracy"] = masking.masked_accuracy(logits, wanted)
        metrics["mvm_cells"] = (wanted >= 0).float().mean()
        metrics |= dictionary.metrics(progress.step)

    # --- what tasks and inspection ask ------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells of a square image."""
        side = self.image_size // self.backbone.reduction // 2
        return side, side

    def cells(self, batch: Batch) -> Cells:
        """Cells of this batch's canvas; padding is not valid."""
        stride = 2 * self.backbone.reduction
        rows, columns = batch.images.shape[2] // stride, batch.images.shape[3] // stride
        return Cells(rows, columns, self._valid(batch, (rows, columns)).flatten(1))

    def encode_image(self, batch: Batch) -> ImageStates:
        """Visual tokens [I, N, D] and their mask; there is no CLS and nothing pooled, [I, 0]."""
        states, valid = self._neck(batch, 1)
        tokens = self.neck.tokens(states.embeds, valid, None)
        return ImageStates(tokens, valid.flatten(1).long(), tokens.new_zeros(len(tokens), 0))

    def encode_text(self, batch: Batch) -> TextStates:
        """Word embeddings: text is read together with the image only."""
        states = self.joint.embed(batch.input_ids)
        return TextStates(states, batch.attention_mask, states.new_zeros(len(states), 0))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        """The joint transformer's states of the words, [B, L, D]; an image of one row serves all texts."""
        count, length = text.mask.shape
        cells = image.tokens.expand(count, -1, -1)
        mask = torch.cat([text.mask, image.mask.expand(count, -1)], dim=1)
        return self.joint(torch.cat([text.tokens.to(cells.dtype), cells], dim=1), mask)[:, :length]

    def joint_feature(self, states: Tensor) -> Tensor:
        """[CLS]; [B, L, D] → [B, D]."""
        return states[:, 0]

    def joint_parts(self, pooled: bool = True) -> tuple[str, ...]:
        """Of the neck what makes tokens: never the mask embedding, and without codes nothing that reads them."""
        codes = ("code_proj", "gate", "gate_norm") if self.quantises else ()
        names = (name for name in ("conv", "norm", "out_norm", *codes) if hasattr(self.neck, name))
        return "backbone", *(f"neck.{name}" for name in names), "joint"

    def word_attention(self) -> list[nn.Module]:
        """Self-attention of every joint layer: words first, cells last; see `vlscale.systems.gradcam`."""
        layers: list[Any] = list(self.joint.layer)
        return [layer.attention.self for layer in layers]

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        """There is no first stage."""
        return None

    def match_logits(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, 2] fp32; class 1 = match."""
        return self.itm_head(self.joint_feature(states)).float()

    def word_logits(self, states: Tensor) -> Tensor:
        """MLM logits [n, V] of fused states [n, D]."""
        return F.linear(states, self.word_decoder()[0]).float()

    def word_decoder(self) -> tuple[Tensor, Tensor]:
        """The word embeddings; there is no bias: zeros."""
        words = self.joint.embeddings.word_embeddings.weight
        return words, words.new_zeros(len(words))

    # --- carried state and codebook ---------------------------------------------------------------------------------

    def carried_state(self) -> dict[str, Tensor]:
        """The dictionary's usage; the dictionary itself is a buffer of the module."""
        dictionary = self.neck.dictionary
        if dictionary is None:
            return {}
        return {f"dictionary.{name}": value for name, value in dictionary.tracker.state().items()}

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `carried_state` gave.

        Raises:
            KeyError: a name is missing or unknown.
        """
        if state.keys() != self.carried_state().keys():
            raise KeyError(f"carried state: expected {sorted(self.carried_state())}, found {sorted(state)}")
        if self.neck.dictionary is not None:
            self.neck.dictionary.tracker.load_state({k.removeprefix("dictionary."): v for k, v in state.items()})

    def place(self, device: torch.device) -> None:
        """Move the carried state to `device`; over several GPUs the neck's BatchNorm takes all ranks' statistics."""
        if self.neck.dictionary is not None:
            self.neck.dictionary.tracker.place(device)
        if distributed.world_size() > 1 and self.config.neck.kind != "code":
            if device.type == "cuda":
                self.neck = nn.SyncBatchNorm.convert_sync_batchnorm(self.neck)
            else:
                _log.warning("system.neck: BatchNorm sees each rank's own images: torch synchronises it on GPUs only")

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"joint.embeddings.position_embeddings.weight"}

    def codebooks(self) -> dict[str, Codebook]:
        """The visual dictionary; none where it is not used."""
        return {} if self.neck.dictionary is None else {"dictionary": self.neck.dictionary}

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """What the dictionary names, [I, N, D]; `cells` tells which are padding."""
        return {} if self.neck.dictionary is None else {"dictionary": self._neck(batch, 1)[0].features}
