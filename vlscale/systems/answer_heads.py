"""Visual question answering on a system: answers as words, or as classes (systems.md, section 6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlscale.config.tasks import VqaTask
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.bert import select_context
from vlscale.nn.decoder import AnswerDecoder
from vlscale.nn.heads import AnswerHead, WordAnswerHead
from vlscale.objectives import answers
from vlscale.systems.encoding import PairEncoding
from vlscale.systems.protocol import System
from vlscale.systems.task_heads import Scalars, TaskHead, pair_feature

_log = logging.getLogger(__name__)


class AnswerClassesHead(TaskHead):
    """A classifier over the answers of the vocabulary: `targets["scores"]` [B, answers] (SOHO, MVPTR)."""

    def __init__(self, task: VqaTask, text: Any, vocabulary: Vocabulary) -> None:
        """`text` is the section of the recipe that gives the width."""
        super().__init__()
        self.pieces, self.pad = vocabulary.answer_pieces, vocabulary.pad
        count = len(self.pieces)
        self.classifier: nn.Module = AnswerHead(text.width, count, task.dropout)
        if task.head == "words":
            self.classifier = WordAnswerHead(text.width, count)

    def start(self, system: System) -> None:
        """Of `head: words` every answer starts as the mean of its word pieces (MVPTR, appendix A.3.2)."""
        if isinstance(self.classifier, WordAnswerHead):
            decoder, bias = system.word_decoder()
            pieces = _padded(self.pieces, self.pad).to(decoder.device)
            self.classifier.start_from(decoder, bias, pieces, self.pad)

    def logits(self, system: System, batch: Batch) -> Tensor:
        return self.classifier(pair_feature(system, batch))

    def loss(self, logits: Tensor, batch: Batch, taught: Tensor | None, alpha: float) -> tuple[Tensor, Scalars]:
        scores = batch.targets["scores"]
        accuracy = answers.soft_scores_won(logits, scores).mean()
        return answers.soft_score_loss(logits, scores), {"accuracy": accuracy}


class AnswerWordsHead(TaskHead):
    """A decoder over the question's fused states (ALBEF, section 3.4); see `data.targets.AnswerWords`.

    It learns whatever people answered; to answer it ranks the vocabulary's answers.
    """

    answer_ids: Tensor
    answer_mask: Tensor

    def __init__(self, task: VqaTask, text: Any, vocabulary: Vocabulary) -> None:
        """`text` is the section of the recipe that gives the sizes."""
        super().__init__()
        self.decoder = AnswerDecoder(text, vocabulary, task.decoder_layers)
        self.candidates = task.candidates
        cut = (pieces[: task.max_answer - 2] for pieces in vocabulary.answer_pieces)
        ids = _padded([(vocabulary.cls, *pieces, vocabulary.sep) for pieces in cut], vocabulary.pad)
        self.register_buffer("answer_ids", ids, persistent=False)  # [answers, L] int64
        self.register_buffer("answer_mask", (ids != vocabulary.pad).long(), persistent=False)

    def reads(self, system: System) -> tuple[str, ...]:
        return system.joint_parts(pooled=False)

    def start(self, system: System) -> None:
        """From the fusion layers, the text's embeddings and the masked-word head, where there are as many layers."""
        layers = len(self.decoder.layer)
        found = len(system.fusion_encoder.layer) if isinstance(system, PairEncoding) else 0
        if not isinstance(system, PairEncoding) or found != layers:
            _log.warning(
                "task.decoder_layers: %d layers, but %d with cross-attention to start from: the decoder starts from "
                "random weights",
                layers,
                found,
            )
            return
        fresh = self.decoder.start_from(system.fusion_encoder, system.text_encoder.embeddings, system.mlm_head)
        if fresh:
            _log.warning("the decoder's %d keys and values start from random weights: images are wider", len(fresh))

    def logits(self, system: System, batch: Batch) -> Tensor:
        """[n, L − 1, V]: row p predicts word p + 1 of each answer."""
        states, mask = self._question(system, batch)
        asked, ids = batch.targets["answer_of"], batch.targets["answer_ids"]
        context = select_context(self.decoder.project_context(states), asked)
        words = self.decoder(ids, batch.targets["answer_mask"], context, mask[asked])
        return self.decoder.word_logits(words[:, :-1])

    def loss(self, logits: Tensor, batch: Batch, taught: Tensor | None, alpha: float) -> tuple[Tensor, Scalars]:
        ids, mask = batch.targets["answer_ids"], batch.targets["answer_mask"]
        each = answers.answer_losses(logits, ids, mask, taught, alpha)
        loss = answers.question_loss(each, batch.targets["answer_weights"], len(batch))
        counted = mask[:, 1:] == 1
        right = (logits.detach().argmax(-1) == ids[:, 1:]) & counted
        return loss, {"word_accuracy": right.sum() / counted.sum().clamp(min=1)}

    def predict(self, system: System, batch: Batch) -> Tensor:
        """Log-probability among the candidates, −inf for answers that were none; [B, answers] fp32."""
        states, mask = self._question(system, batch)
        context = self.decoder.project_context(states)
        k = min(self.candidates, len(self.answer_ids))
        ranked = answers.rank_answers(self.decoder, context, mask, self.answer_ids, self.answer_mask, k)
        scores = torch.full((len(batch), len(self.answer_ids)), -torch.inf, device=mask.device)
        return scores.scatter(1, ranked.indices, ranked.probabilities.float().log())

    def _question(self, system: System, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fused states [B, M, D] of the questions and their mask [B, M]."""
        text = system.encode_text(batch)
        return system.fuse(text, system.encode_image(batch)), text.mask


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """[n, L] int64, filled up."""
    length = max(map(len, rows), default=0)
    filled = [[*row, *[pad] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), length)
