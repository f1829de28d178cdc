"""A pre-trained system with a task's head: fine-tuning (systems.md, section 6), for any system and every task but
retrieval, which is learned by the system's own losses.

Momentum distillation (ALBEF, section 3.3): a moving average of what the task reads softens its targets.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlscale.config.tasks import Distill, EntailmentTask, GroundingTask, Nlvr2Task, TaskConfig, VqaTask
from vlscale.data.sample import Batch, Vocabulary
from vlscale.nn.statistics import average_statistics
from vlscale.nn.teacher import Teacher
from vlscale.nn.writer import ParameterWriter
from vlscale.systems.answer_heads import AnswerClassesHead, AnswerWordsHead
from vlscale.systems.encoding import PairEncoding
from vlscale.systems.protocol import Choices, Progress, StepOutput, System
from vlscale.systems.task_heads import EntailmentHead, GroundingHead, PairedHead, TaskHead, TwoPassesHead

_SYSTEM, _HEAD, _TEACHER = "system.", "head", "teacher."


class Tuned(nn.Module):
    """What the engine trains; asked anything else, it answers as the system inside.

    Of the system only what the task reads is trained; the rest, such as heads of pre-training, has no gradient, so that
    no optimizer owns or decays it. What the system itself would do after a step, or carry, is left out.
    """

    def __init__(self, system: nn.Module, task: TaskConfig, vocabulary: Vocabulary) -> None:
        """
        Args:
            system: without a momentum teacher of its own; it gets its weights later, see `start_head`.
            task: one that the recipe's checks let this system do; not retrieval.
        """
        super().__init__()
        self.system, self.task = system, task
        self.head = make_head(system, task, vocabulary)
        self._read = self.head.reads(self._asked)
        for name, parameter in system.named_parameters():
            if not name.startswith(tuple(f"{part}." for part in self._read)):
                parameter.requires_grad_(False)
        self.distill: Distill | None = getattr(task, "distill", None)
        self.teacher = None if self.distill is None else Teacher(self._students(), self.distill.momentum)

    # --- the step -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """The task's loss, under its name, and metrics of one micro-batch; nothing is drawn but for text assignment."""
        if self._assigns(progress):
            loss, metrics = cast(PairedHead, self.head).assign_texts(self._asked, batch, progress.generator)
            return StepOutput({self.task.name: loss}, metrics)
        alpha = self._alpha(progress)
        logits = self.head.logits(self._asked, batch)
        taught = self._teach(batch) if alpha else None
        loss, metrics = self.head.loss(logits, batch, taught, alpha)
        return StepOutput({self.task.name: loss}, metrics)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, C] fp32: of the classes in the order of `data.examples`, or of the vocabulary's answers.

        An answer that was no candidate has −inf. Grounding is asked through `phrase_region_scores`.
        """
        return self.head.predict(self._asked, batch)

    @torch.no_grad()
    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Let ranks agree on BatchNorm's statistics, move the teacher; through text assignment it follows at once."""
        average_statistics(self)
        if self.teacher is None:
            return
        if self._assigns(progress):
            self.teacher.copy_students()
        else:
            self.teacher.update()

    def rest(self, progress: Progress) -> bool:
        """As the system says; what the task doesn't read rests anyway."""
        return self._asked.rest(progress)

    def start_head(self) -> None:
        """Called once the system has its weights: the head starts from its parts, the teacher from both."""
        self.head.start(self._asked)
        if self.teacher is not None:
            self.teacher.copy_students()

    # --- what the engine asks -----------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """The system's; a head's tables of positions are spared by name."""
        return {_SYSTEM + name for name in self._asked.no_weight_decay()}

    def carried_state(self) -> dict[str, Tensor]:
        """The teacher, fp32, equal on every rank; not copies."""
        if self.teacher is None:
            return {}
        return {_TEACHER + name: value for name, value in self.teacher.state().items()}

    def load_carried_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `carried_state` gave.

        Raises:
            KeyError: a name is missing or unknown.
            RuntimeError: a shape differs.
        """
        unknown = [name for name in state if self.teacher is None or not name.startswith(_TEACHER)]
        if unknown:
            raise KeyError(f"carried state: unknown {sorted(unknown)}")
        if self.teacher is not None:
            self.teacher.load_state({name.removeprefix(_TEACHER): value for name, value in state.items()})

    def place(self, device: torch.device) -> None:
        """Move the teacher, and what the system keeps beside its parameters, to `device`."""
        self._asked.place(device)
        if self.teacher is not None:
            self.teacher.place(device)

    # --- what tasks and inspection ask --------------------------------------------------------------------------------

    @property
    def grounding_layer(self) -> int:
        """The layer that was tuned, or the system's."""
        tuned = self.head.layer if isinstance(self.head, GroundingHead) else None
        return cast(Any, self.system).grounding_layer if tuned is None else tuned

    def __getattr__(self, name: str) -> Any:
        """What neither this nor `nn.Module` has is the system's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "system":
                raise
            return getattr(self.system, name)

    # --- parts --------------------------------------------------------------------------------------------------------

    @property
    def _asked(self) -> System:
        return cast(System, self.system)

    def _students(self) -> dict[str, nn.Module]:
        """What the logits depend on: whole parts of the system, and the head."""
        names = dict.fromkeys(part.partition(".")[0] for part in self._read)
        parts = {_SYSTEM + name: getattr(self.system, name) for name in names}
        return parts | {_HEAD: self.head}

    def _teach(self, batch: Batch) -> Tensor:
        """The teacher's logits; no gradient."""
        assert self.teacher is not None
        copies = self.teacher.modules
        inside = {name.removeprefix(_SYSTEM): module for name, module in copies.items() if name.startswith(_SYSTEM)}
        system, head = cast(System, with_parts(self.system, inside)), cast(TaskHead, copies[_HEAD])
        dtype = next(self.system.parameters()).dtype
        half = dtype != torch.float32  # native half precision has no autocast; the fp32 teacher takes its own
        with torch.no_grad(), torch.autocast(batch.input_ids.device.type, dtype) if half else nullcontext():
            return head.logits(system, batch)

    def _alpha(self, progress: Progress) -> float:
        """Weight of the teacher's targets; with `ramp` linear from 0 over the task's first epoch."""
        if self.distill is None:
            return 0.0
        done = (progress.step - self._assignment_steps) / progress.steps_per_epoch
        return self.distill.alpha * (min(1.0, done) if self.distill.ramp else 1.0)

    def _assigns(self, progress: Progress) -> bool:
        return progress.step < self._assignment_steps

    @property
    def _assignment_steps(self) -> int:
        return self.task.assignment_steps if isinstance(self.task, Nlvr2Task) else 0


def with_parts(system: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """The same system but for these of its modules; everything is shared, nothing copied."""
    other = copy.copy(system)
    other._modules = {**system._modules, **parts}
    return other


def make_head(system: nn.Module, task: TaskConfig, vocabulary: Vocabulary) -> TaskHead:
    """The head of a task other than retrieval; the recipe has been held against what the system can do."""
    text = cast(Any, system).config.text
    if isinstance(task, VqaTask):
        make = AnswerWordsHead if task.mode == "generate" else AnswerClassesHead
        return make(task, text, vocabulary)
    if isinstance(task, EntailmentTask):
        return EntailmentHead(task, text.width)
    if isinstance(task, GroundingTask):
        return GroundingHead(task)
    assert isinstance(task, Nlvr2Task)
    if task.mode == "passes":
        return TwoPassesHead(task, text.width)
    assert isinstance(system, PairEncoding)
    return PairedHead(task, system)
