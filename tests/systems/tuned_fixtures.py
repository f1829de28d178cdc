"""Every system, tiny, under a task's head, and batches with the task's targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.systems import albef_fixtures, test_cb_vila, test_mvptr, test_soho
from vlscale.config import CodisSystem
from vlscale.config.tasks import EntailmentTask, GroundingTask, Nlvr2Task, TaskConfig, VqaTask
from vlscale.data.sample import Batch, Vocabulary
from vlscale.systems.albef import Albef
from vlscale.systems.cb_vila import CbVila
from vlscale.systems.codis import Codis
from vlscale.systems.mvptr import Mvptr
from vlscale.systems.protocol import Progress
from vlscale.systems.soho import Soho
from vlscale.systems.tuned import Tuned

ANSWERS = ((5,), (6, 7), (8, 9, 10), (11,))
SIZE = 4


def albef(vocabulary: Vocabulary) -> nn.Module:
    return Albef(albef_fixtures.tiny_config(), albef_fixtures.IMAGE_SIZE, vocabulary, taught=False)


def codis(vocabulary: Vocabulary) -> nn.Module:
    config = CodisSystem(**albef_fixtures.tiny_config().model_dump(exclude={"name"}))
    return Codis(config, albef_fixtures.IMAGE_SIZE, vocabulary, taught=False)


def cb_vila(vocabulary: Vocabulary) -> nn.Module:
    return CbVila(test_cb_vila.config(), test_cb_vila.IMAGE_SIZE, vocabulary)


def soho(vocabulary: Vocabulary) -> nn.Module:
    config = test_soho.soho().config
    return Soho(config, test_soho.SIDE, vocabulary, quantise=False)


def mvptr(vocabulary: Vocabulary) -> nn.Module:
    return Mvptr(test_mvptr.mvptr().config, test_mvptr.WIDTH, vocabulary)


BUILD: dict[str, Callable[[Vocabulary], nn.Module]] = {
    "albef": albef,
    "codis": codis,
    "cb_vila": cb_vila,
    "soho": soho,
    "mvptr": mvptr,
}
TASKS: dict[str, TaskConfig] = {
    "generate": VqaTask(decoder_layers=2, candidates=3, max_answer=5),
    "classify": VqaTask(mode="classify", dropout=0.0),
    "words": VqaTask(mode="classify", head="words"),
    "snli-ve": EntailmentTask(hidden=2.0),
    "paired": Nlvr2Task(mode="paired"),
    "passes": Nlvr2Task(mode="passes"),
    "grounding": GroundingTask(),
}
PAIRS = [
    *((name, task) for name in ("albef", "codis", "cb_vila") for task in ("generate", "snli-ve", "paired", "passes")),
    *(("soho", task) for task in ("classify", "words", "snli-ve", "passes", "generate")),
    *(("mvptr", task) for task in ("classify", "words", "snli-ve", "grounding", "generate")),
    ("albef", "words"),
]
"""System and task."""


def tuned(name: str, task: str | TaskConfig, seed: int = 0) -> Tuned:
    """In training mode, its head started, its parts of random weights."""
    torch.manual_seed(seed)
    base = test_mvptr.VOCABULARY if name == "mvptr" else albef_fixtures.VOCABULARY
    vocabulary = replace(base, answer_pieces=ANSWERS)
    system = Tuned(BUILD[name](vocabulary), TASKS[task] if isinstance(task, str) else task, vocabulary)
    for parameter in system.system.parameters():  # zero biases would hide what starts from what
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn_like(parameter))
    system.start_head()
    return system.train()


def batch_for(name: str, size: int = SIZE, seed: int = 0) -> Batch:
    """With the targets of every task."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mvptr":
        batch = test_mvptr.batch_of(size, seed)
    elif name == "soho":
        whole = test_soho.batch_of(size, seed)
        every = slice(None, None, test_soho.TEXTS)
        batch = replace(
            whole, input_ids=whole.input_ids[every], attention_mask=whole.attention_mask[every], matched=None
        )
    else:
        batch = albef_fixtures.tiny_batch(size, seed=seed)
    return replace(batch, right=_right(batch, generator), targets=_targets(batch, generator))


def _right(batch: Batch, generator: torch.Generator) -> Batch:
    nothing = torch.empty(len(batch), 0, dtype=torch.int64)
    return Batch(torch.randn(batch.images.shape, generator=generator), nothing, nothing, batch.image_ids)


def _targets(batch: Batch, generator: torch.Generator) -> dict[str, Any]:
    size, length = batch.input_ids.shape
    scores = torch.rand(size, len(ANSWERS), generator=generator)
    ids = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2], [1, 11, 2, 0], [1, 5, 2, 0], [1, 8, 2, 0]])
    spans = torch.zeros(size, 3, length, dtype=torch.bool)
    spans[:, 0, 1:3], spans[:, 1, 4] = True, True
    overlaps = torch.rand(size, 3, test_mvptr.REGIONS, generator=generator)
    return {
        "labels": torch.arange(size) % 2,
        "scores": scores,
        "answer_ids": ids,
        "answer_mask": (ids != 0).long(),
        "answer_weights": torch.tensor([1.0, 0.6, 0.4, 1.0, 1.0]),
        "answer_of": torch.tensor([0, 1, 1, 2, 3]),
        "spans": spans,
        "overlaps": overlaps,
        "grounded": spans.any(2),
    }


def progress(step: int = 20, seed: int = 0) -> Progress:
    """Ten steps an epoch; SOHO's backbone of the tests rests for two."""
    return Progress(step, 100, 10.0, torch.Generator().manual_seed(seed))
