"""Whole fine-tuning steps against recordings of the public releases: the loss, and gradients through the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.recordings import REFERENCE, Case, cases, config_of
from tests.parity.test_albef import build
from tests.parity.test_albef_downstream import Parts
from tests.parity.test_soho import batch_of, recorded_system
from vlscale.config.tasks import Distill, EntailmentTask, Nlvr2Task, TaskConfig, VqaTask
from vlscale.data.sample import Batch, Vocabulary
from vlscale.interop.albef_tasks import Kind, load_task_weights, our_names
from vlscale.interop.soho import load_soho_vqa
from vlscale.nn.heads import AnswerHead
from vlscale.systems.protocol import Progress
from vlscale.systems.tuned import Tuned

FOLDER = REFERENCE / "albef"
HEADS = {"class_head.": "head.classifier.", "decoder.": "head.decoder.", "paired_encoder.": "head.encoder."}
"""Names of the importer's parts that are heads here; all others are the system's."""
RECORDED = [path for kind in ("ve", "nlvr", "vqa") for path in cases("albef", f"case_{kind}_alpha*.safetensors")]


def place_of(part: str) -> str:
    return next(
        (ours + part.removeprefix(given) for given, ours in HEADS.items() if part.startswith(given)), f"system.{part}"
    )


def albef(case: Case, sizes: dict[str, Any]) -> tuple[Tuned, Kind]:
    """The recorded model as it was tuned, its teacher moved once: the release moves it at the start of a forward."""
    kind, alpha = case.metadata["kind"], float(case.metadata["alpha"])
    distill = None
    if case.metadata.get("distill") == "True":
        distill = Distill(momentum=sizes["finetune_momentum"], alpha=alpha, ramp=False)
    tasks: dict[str, TaskConfig] = {
        "ve": EntailmentTask(distill=distill),
        "nlvr": Nlvr2Task(mode="paired", distill=distill),
        "vqa": VqaTask(decoder_layers=sizes["vqa_decoder"]["layers"], distill=distill),
    }
    base = build(sizes, alpha)
    parts = Parts(base, kind, sizes["vqa_decoder"]["layers"])  # type: ignore[arg-type]
    carried = load_task_weights(parts, case.weights(), kind, sizes["fusion_layer"], base.grid)  # type: ignore[arg-type]
    system = Tuned(base, tasks[kind], base.vocabulary)
    own = system.state_dict()
    system.load_state_dict(own | {place_of(name): value for name, value in parts.state_dict().items()})
    if system.teacher is not None:
        state = {f"teacher.{place_of(name.removeprefix('teacher.'))}": value for name, value in carried.items()}
        system.load_carried_state({name: state[name] for name in system.carried_state()})
        system.teacher.update()
    return system.train(), kind  # type: ignore[return-value]


@pytest.mark.parametrize("path", RECORDED)
def test_albefs_tasks(path: Path) -> None:
    case, sizes = Case(path), config_of(path.parent)
    system, kind = albef(case, sizes)
    images, ids, mask = case["in.image"], case["in.input_ids"], case["in.attention_mask"]
    first, *second = images.split(len(ids))
    nothing = torch.empty(len(ids), 0, dtype=torch.int64)
    right = Batch(second[0], nothing, nothing, torch.arange(len(ids))) if second else None
    batch = Batch(first, ids, mask, torch.arange(len(ids)), right=right)
    if kind == "vqa":
        counts = case["in.k"]
        batch.targets = {
            "answer_ids": case["in.answer_ids"],
            "answer_mask": case["in.answer_mask"],
            "answer_weights": case["in.weights"],
            "answer_of": torch.arange(len(counts)).repeat_interleave(counts),
        }
    else:
        batch.targets = {"labels": case["in.targets"]}
    (loss,) = system(batch, Progress(5, 10, 1.0)).losses.values()
    case.check("loss", loss)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in system.named_parameters()}
    recorded = case.names("grad.")
    assert recorded
    for name in recorded:
        (ours,) = our_names(name.removeprefix("grad."), kind, sizes["fusion_layer"])
        case.check(name, gradients[place_of(ours)])


@pytest.mark.parametrize("path", cases("soho", "case_vqa.safetensors"))
def test_sohos_answers(path: Path) -> None:
    case, sizes = Case(path), config_of(path.parent)
    weights = case.weights()
    base = recorded_system(sizes, weights, use_dictionary=False)
    vocabulary = Vocabulary(
        base.vocabulary.size, *range(4), answer_pieces=tuple((5,) for _ in range(sizes["num_answers"]))
    )
    system = Tuned(base, VqaTask(mode="classify", dropout=0.0), vocabulary).train()
    assert isinstance(system.head.classifier, AnswerHead)
    load_soho_vqa(base, system.head.classifier, weights)
    batch = batch_of(case)
    batch.targets = {"scores": case["in.vqa_labels"]}
    output = system(batch, Progress(5, 10, 1.0))
    case.check("loss", output.losses["vqa"])
    torch.testing.assert_close(output.metrics["accuracy"], case["out.score"].mean())
