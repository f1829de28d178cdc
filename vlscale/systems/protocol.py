"""What every system offers, and the records its methods exchange.

Tasks, evaluation and inspection are written against `System` and never ask which system it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlscale.codebooks.protocol import Codebook, CodebookUsage
from vlscale.data.sample import Batch
from vlscale.nn.writer import ParameterWriter

__all__ = [
    "Cells",
    "Choices",
    "Codebook",
    "CodebookUsage",
    "ImageStates",
    "ParameterWriter",
    "Progress",
    "Reconstruction",
    "StepOutput",
    "System",
    "TextStates",
    "offers",
]


@dataclass(frozen=True, slots=True)
class Progress:
    """All that a system knows of the schedule; a function of the step, so nothing has to be restored."""

    step: int
    """Optimizer steps taken before this one."""
    total_steps: int
    steps_per_epoch: float
    generator: torch.Generator | None = None
    """Source of the step's random choices, a function of (seed, step, micro step, rank); on the CPU."""

    @property
    def epoch(self) -> float:
        """Epochs seen before this step, with its fraction."""
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the whole run done before this step, in [0, 1]."""
        return self.step / max(1, self.total_steps)


class StepOutput(NamedTuple):
    """Result of a training forward."""

    losses: dict[str, Tensor]
    """Unweighted scalars by name, with gradient."""
    metrics: dict[str, Tensor]
    """Detached scalars to log, on the device: no host sync."""


class ImageStates(NamedTuple):
    """Encoded images."""

    tokens: Tensor
    """[B, 1 + N, D], CLS first."""
    mask: Tensor
    """[B, 1 + N] int64, 1 = attend."""
    pooled: Tensor
    """[B, embed_dim], unit length."""


class TextStates(NamedTuple):
    """Encoded texts."""

    tokens: Tensor
    """[B, L, D]."""
    mask: Tensor
    """[B, L] int64, 1 = attend."""
    pooled: Tensor
    """[B, embed_dim], unit length."""


class Cells(NamedTuple):
    """The visual cells of a batch, row by row."""

    rows: int
    columns: int
    valid: Tensor
    """[B, rows · columns] bool, false where a cell is padding."""


class Reconstruction(NamedTuple):
    """Pictures of the pixel objective, [B, 3, H, W] each, in the input's normalised space."""

    original: Tensor
    masked: Tensor
    """Masked patches are zero, the mean colour."""
    predicted: Tensor
    """Masked patches as predicted, the others as they are."""


@dataclass(slots=True)
class Choices:
    """Random choices of a step, fixed from outside by tests and parity cases; None means: draw it."""

    negative_images: Tensor | None = None
    """[B] int64: image for text b."""
    negative_texts: Tensor | None = None
    """[B] int64: text for image b."""
    masked_input_ids: Tensor | None = None
    """[B, L] int64."""
    mlm_labels: Tensor | None = None
    """[B, L] int64, -100 where not masked."""
    patch_mask: Tensor | None = None
    """[B, N] bool, true = masked for MIM and the pixel term."""
    gumbel_noise: Tensor | None = None
    """[B·N, K] float32."""
    extra: dict[str, Tensor] = field(default_factory=dict)


class System(Protocol):
    """One of the five systems: an `nn.Module` with these methods."""

    def __call__(self, batch: Batch, progress: Progress, choices: Choices | None = None) -> StepOutput:
        """Losses and metrics of a training step. `batch.images` is float32 and normalised."""
        ...

    def after_step(self, progress: Progress, writer: ParameterWriter) -> None:
        """Teacher, queues and codebook: once per optimizer step, same order on every rank, without autograd."""
        ...

    def carried_state(self) -> dict[str, Tensor]:
        """Teacher, queues and statistics: fp32 or int64 tensors, equal on every rank, that a restart needs."""
        ...

    def load_carried_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `carried_state` gave; strict about names and shapes."""
        ...

    def place(self, device: torch.device) -> None:
        """Move the carried state to `device` (it is not among the registered parameters and buffers)."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, besides biases and norms."""
        ...

    def encode_image(self, batch: Batch) -> ImageStates: ...

    def encode_text(self, batch: Batch) -> TextStates: ...

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        """Text queries over image tokens; [B, L, D].

        An image of one row serves all B texts: its keys and values are computed once.
        """
        ...

    def joint_feature(self, states: Tensor) -> Tensor:
        """What a task reads of a pair: fused states [B, L, D] → [B, D]."""
        ...

    def joint_parts(self, pooled: bool = True) -> tuple[str, ...]:
        """Dotted names of the modules that `fuse` and what it is given read, and with `pooled` `joint_feature` too.

        Every parameter in them is read: what trains through these methods alone leaves no parameter there at rest.
        """
        ...

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        """First-stage scores [B_image, B_text], cosines over the temperature; None where there is no first stage."""
        ...

    def match_logits(self, states: Tensor) -> Tensor:
        """ITM logits [B, 2] of fused states; class 1 = match."""
        ...

    def word_logits(self, states: Tensor) -> Tensor:
        """MLM logits [n, V] of fused states [n, D]."""
        ...

    def word_decoder(self) -> tuple[Tensor, Tensor]:
        """Matrix [V, D] and bias [V] that `word_logits` ends with; no copies."""
        ...

    def codebooks(self) -> dict[str, Codebook]: ...

    def codebook_features(self, batch: Batch) -> dict[str, Tensor]:
        """Per codebook the features it quantises, [B, N, d], cells row by row; {} where there is none."""
        ...

    def cells(self, batch: Batch) -> Cells:
        """The cells that `codebook_features` gives features of, for images of this size and these paddings."""
        ...

    def rest(self, progress: Progress) -> bool:
        """Whether the parameters under `backbone.` rest in this step; puts them to rest or wakes them.

        Called before every step's forward: a function of the progress, so that resuming needs no state.
        """
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual cells."""
        ...


def offers(system: object, protocol: Any) -> bool:
    """Whether the system has all that a protocol names: itself or, where it is tuned, the system inside.

    `isinstance` doesn't see the latter from Python 3.12 on.
    """
    return all(hasattr(system, name) for name in vars(protocol) if not name.startswith("_"))
