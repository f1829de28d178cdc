"""MVPTR's classification tasks against recordings of the public release: VQA, also with tags kept, and entailment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.parity.recordings import Case, cases
from tests.parity.test_mvptr import Replay
from vlscale.interop.mvptr import our_weights
from vlscale.nn.heads import ClassHead, WordAnswerHead
from vlscale.objectives import answers, classification


def head_of(replay: Replay) -> nn.Module:
    """The head that the model was recorded with, loaded as from a published checkpoint."""
    found = our_weights(replay.weights, "classification")
    given = {name.removeprefix("head."): value for name, value in found.items() if name.startswith("head.")}
    head: nn.Module
    width = replay.sizes["hidden"]
    if replay.case["in.labels"].is_floating_point():
        head = WordAnswerHead(width, replay.sizes["vqa_labels"])
    else:
        sizes = replay.sizes["classifier"][replay.case.metadata["kind"]]
        head = ClassHead(width, sizes["num_labels"], hidden=sizes["cls_hidden_scale"] * width)
    head.load_state_dict(given)
    return head


@pytest.mark.parametrize("path", cases("mvptr", "case_v*.safetensors"))
def test_classification(path: Path) -> None:
    replay = Replay(path, tags_in_fusion=Case(path).metadata.get("use_b") == "True")
    case, labels, head = replay.case, replay.case["in.labels"], head_of(replay)
    replay.check_states()
    logits = head(replay.pooled)
    case.check("logits", logits)
    if labels.is_floating_point():
        loss = answers.soft_score_loss(logits, labels)
    else:
        loss = classification.classification_loss(logits, labels)
    case.check("loss", loss)
    own, theirs = head.state_dict(keep_vars=True), {}
    for key in replay.weights:
        if key.startswith("classifier."):
            (name,) = our_weights({key: replay.weights[key]}, "classification")
            theirs[key] = own[name.removeprefix("head.")]
    replay.check_gradients(loss, theirs)


@pytest.mark.parametrize("path", cases("mvptr", "weights_pretrain.safetensors"))
def test_answers_start_from_the_masked_word_head(path: Path) -> None:
    """Each answer's weight and bias are the mean of its word pieces'."""
    weights = our_weights(Case(path).tensors)
    decoder = weights["word_head.decoder.weight"]
    bias = weights["word_head.head.bias"] + torch.arange(len(decoder))
    pieces = torch.tensor([[5, 0, 0], [7, 9, 0], [9, 9, 4]])
    head = WordAnswerHead(decoder.shape[1], 3)
    head.start_from(decoder, bias, pieces, pad=0)
    for row, answer in enumerate([[5], [7, 9], [9, 9, 4]]):
        torch.testing.assert_close(head.weight[row], decoder[answer].mean(0))
        torch.testing.assert_close(head.bias[row], bias[answer].mean())
