"""VQA, NLVR2 and SNLI-VE of a system that was tuned for it: answers to every example, and how right they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from vlscale import distributed
from vlscale.config import Recipe
from vlscale.data.answers import load_answers
from vlscale.data.corpus import Corpus
from vlscale.data.examples import ENTAILMENT, TRUTH, examples_of
from vlscale.data.open import read_data, read_pairs, split_to_read
from vlscale.data.sample import Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.interop import layout
from vlscale.interop.run import Run, data_to_read, load_run
from vlscale.systems.protocol import offers
from vlscale.tasks.card import first_images, max_tokens, origin, resolution, split_hash
from vlscale.tasks.features import OnProgress, Precision
from vlscale.tasks.predicting import Predicts, Scored, score_examples
from vlscale.tasks.results import check_result_path, write_result
from vlscale.tasks.submission import all_questions, check_submission_path, write_submission
from vlscale.tasks.verdicts import JUDGES, Verdict, true_answer

TITLES = {"vqa": "Visual question answering", "nlvr2": "NLVR2", "snli-ve": "Visual entailment"}
"""Of the tasks that are answered by a class."""
RULES = {
    "score": "softmax of the system's scores over all classes",
    "ties": "of equal scores the first class",
    "unreadable": "an example whose image can't be read counts as wrong",
}
SOFT = "VQA v2's official soft accuracy and normalisation of answers"


class Classified(NamedTuple):
    """What was written, and what of."""

    path: Path
    """The result file."""
    predictions: Path
    """A line of JSON per example."""
    examples: list[Sample]
    """A prediction's `example` is the number of one of these."""


@dataclass(slots=True)
class ClassifiedResult:
    """Accuracies in per cent and everything that a reader needs to compare them; the same on every rank."""

    verdict: Verdict
    predictions: list[dict[str, Any]]
    """One per example, in their order."""
    examples: list[Sample]
    """Those that were judged: of several with one id the first."""
    protocol: dict[str, Any]


def run_classified(
    source: str,
    task: str,
    *,
    data: str | None = None,
    split: str | None = None,
    first: int | None = None,
    out: Path | None = None,
    image_root: str | None = None,
    submission: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Classified:
    """Evaluate a run that was tuned for the task; rank 0 writes its result file and the predictions beside it.

    Args:
        source: run folder (best checkpoint) or checkpoint folder.
        task: a key of `TITLES`.
        data: annotations, shards, …; default the run's own.
        first: only so many examples, from the start of the split; default all.
        out: result file; default `eval/<task>.json` in the run folder.
        submission: of VQA, a file for the evaluation server: questions without known answers are asked too.

    Raises:
        UserError: no such run, or one of another task; no such data, split or number of examples; no example with a
            known answer; or a checkpoint that gives scores that are not finite.
    """
    check_result_path(out)
    if submission is not None:
        check_submission_path(submission)
    run = load_run(source)
    _require_tuned(run, task, source)
    section = data_to_read(run.recipe.data, data, image_root)
    with distributed.main_process_first():
        corpus = read_pairs(section) if task == "nlvr2" else read_data(section)
    split, names = split_to_read(corpus, split)
    asked, examples = first_images(split_examples(corpus, run.recipe, names, submission is None), first, "examples")
    result = evaluate_classified(
        run.system,
        examples,
        run.recipe,
        run.tokenizer,
        classes=class_names(task, run.folder),
        batch_size=run.recipe.eval.batch_size,
        device=run.device,
        on_progress=on_progress,
    )
    card = origin(run, data, split) | asked | result.protocol
    path = out or run.folder / "eval" / f"{task}.json"
    predictions = path.with_suffix(".predictions.jsonl")
    if distributed.rank() == 0:
        if submission is not None:
            questions = all_questions(section, names) if first is None else []
            card["submission"] = _submit(submission, questions, result, class_names(task, run.folder)[0])
        write_result(path, _content(task, result, card), result.predictions)
    return Classified(path, predictions, result.examples)


def split_examples(corpus: Corpus, recipe: Recipe, names: Sequence[str], labelled: bool = True) -> list[Sample]:
    """The examples of the recipe's task in these splits, as `examples_of`."""
    assert recipe.task is not None
    return list(examples_of(corpus, recipe.task, names, labelled).readable())


def class_names(task: str, run: Path) -> Sequence[str]:
    """What the task's system chooses from, in the order of its scores.

    Raises:
        UserError: the run has lost its answers.
    """
    if task != "vqa":
        return ENTAILMENT if task == "snli-ve" else TRUTH
    answers = layout.answers_of(run)
    if answers is None:
        raise UserError(f"{run}: the run has lost its answers; expected {layout.ANSWERS} in it")
    return load_answers(answers)


def evaluate_classified(
    system: nn.Module,
    examples: Sequence[Sample],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    *,
    classes: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    on_progress: OnProgress | None = None,
) -> ClassifiedResult:
    """Answer and judge all examples; collective, every rank gives the same examples and gets the same result.

    Args:
        system: in evaluation mode, on `device`; it has `predict`.
        classes: as `class_names`.

    Raises:
        UserError: the system chooses among no classes, or gives scores that are not finite.
    """
    assert recipe.task is not None
    if not offers(system, Predicts):
        raise UserError(f"{recipe.name}: its system has no head that chooses among classes")
    by_id: dict[str, Sample] = {}
    for example in examples:
        by_id.setdefault(example.id, example)
    once = list(by_id.values())
    numbers = {name: number for number, name in enumerate(classes)}
    wanted = [true_answer(example) for example in once]
    true = torch.tensor([numbers.get(name, -1) for name in wanted], dtype=torch.int64)
    precision = Precision.of(torch.device(device), system)
    scored = score_examples(
        cast(Predicts, system),
        once,
        true,
        len(classes),
        recipe.data,
        tokenizer,
        precision,
        batch_size,
        on_progress or (lambda stage, done, total: None),
    )
    rows = _rows(once, wanted, scored, classes)
    verdict = JUDGES[recipe.task.name](once, [row["predicted"] for row in rows], classes)
    for row, points in zip(rows, verdict.points, strict=True):
        row["points"] = points
    card = {
        "examples": len(once),
        "examples_with_known_answer": sum(points is not None for points in verdict.points),
        "examples_with_an_id_of_another": len(examples) - len(once),
        "unreadable_examples": int((~scored.read).sum()),
        "unreadable_images": scored.unreadable,
        "classes": len(classes),
        "chance": verdict.baselines,
        "rules": RULES | ({"accuracy": SOFT} if recipe.task.name == "vqa" else {}),
        "resolution": resolution(recipe.data),
        "split_hash": split_hash(once),
        "precision": str(precision),
        "max_tokens": max_tokens(recipe.data),
        "seed": recipe.train.seed,
    }
    return ClassifiedResult(verdict, rows, once, card)


def classified_table(path: Path) -> Table:
    """The result file as a table for the terminal: what was reached beside the baselines, by type or class, and which
    class was taken for which."""
    result = json.loads(path.read_text(encoding="utf-8"))
    card, names = result["protocol"], list(result["metrics"])
    first = f" (the first {card['first']:,} of {card['split_examples']:,})" if "first" in card else ""
    caption = f"{card['examples']:,} examples{first}, split {escape(card['split'])}, {card['classes']:,} classes"
    confused = list(next(iter(result["confusion"].values()), {}))
    table = Table(title=f"{TITLES[result['task']]}, in %", caption=caption)
    for name in ("", "examples", *names, *(f"taken for\n{name}" for name in confused)):
        table.add_column(escape(name), justify="right" if name else "left")
    blank = [""] * len(confused)
    if names:
        known = f"{card['examples_with_known_answer']:,}"
        table.add_row("this run", known, *(f"{result['metrics'][name]:.1f}" for name in names), *blank)
    for name, values in card["chance"].items():
        table.add_row(name, "", *(f"{values[one]:.1f}" if one in values else "" for one in names), *blank, style="dim")
    table.add_section()
    for kind, values in result["kinds"].items():
        taken = [f"{count:,}" for count in result["confusion"].get(kind, {}).values()]
        own = [f"{values['accuracy']:.1f}", *[""] * (len(names) - 1)]
        table.add_row(escape(kind), f"{values['examples']:,}", *own, *(taken or blank))
    return table


def _require_tuned(run: Run, task: str, source: str) -> None:
    tuned = None if run.recipe.task is None else run.recipe.task.name
    if tuned != task:
        raise UserError(
            f"{source}: {'was pre-trained only' if tuned is None else f'was tuned for {tuned}'}; {task} needs a run "
            f"that was tuned for it: vlscale finetune {task} --from {source}"
        )


def _rows(
    examples: Sequence[Sample], wanted: Sequence[str], scored: Scored, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Predictions as they are written, but for their points."""
    read, best, shares = scored.read.tolist(), scored.best.tolist(), scored.shares.tolist()
    rows = []
    for number, (example, true, share) in enumerate(zip(examples, wanted, scored.true_share.tolist(), strict=True)):
        top = [[classes[one], round(own, 6)] for one, own in zip(best[number], shares[number], strict=True)]
        top = top if read[number] else []
        row = {
            "id": example.id,
            "example": number,
            "text": example.captions[0],
            "predicted": top[0][0] if top else None,
            "score": top[0][1] if top else None,
            "true": true,
            "true_score": None if share != share else round(share, 6),
            "top": top,
        }
        if example.questions:
            row |= {"kind": example.questions[0].kind, "answers": Counter(example.questions[0].answers)}
        rows.append(row)
    return rows


def _content(task: str, result: ClassifiedResult, card: dict[str, Any]) -> dict[str, Any]:
    verdict = result.verdict
    found = {"metrics": verdict.metrics, "kinds": verdict.kinds, "confusion": verdict.confusion}
    return {"task": task, **found, "protocol": card}


def _submit(path: Path, questions: Sequence[str], result: ClassifiedResult, common: str) -> dict[str, Any]:
    """Write the submission; returns what the card says of it."""
    asked = [*questions, *(row["id"] for row in result.predictions)]
    predicted = {row["id"]: row["predicted"] for row in result.predictions if row["predicted"] is not None}
    guessed = write_submission(path, asked, predicted, common)
    return {"file": str(path), "questions": len(set(asked)), f"without an image, answered {common!r}": guessed}
