"""The records that cross module borders: `Sample` (files), `Batch` (tensors) and `Vocabulary` (special ids)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.data.files import read_span

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as shares of the image's width and height."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a tar, read by its position: nothing is unpacked, so no path can leave the tar."""

    tar: str
    name: str
    offset: int
    """Of the first byte of the content."""
    length: int
    """In bytes."""

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read(self) -> bytes:
        """The content.

        Raises:
            OSError: the tar is gone, or shorter than it was.
        """
        return read_span(self.tar, self.offset, self.length)


ImageFile = Path | TarMember


class SampleError(Exception):
    """A sample that can't be used: says why, in one line."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a caption and where they are in the image (Flickr30k Entities, Visual Genome)."""

    text: str
    boxes: tuple[Box, ...] = ()
    """Several where one phrase names several things; none where `unseen` says why."""
    caption: int = -1
    """Which caption of the sample; -1: none, the phrase stands alone."""
    first_word: int = -1
    """Number of its first word, the caption split at spaces."""
    entity: str = ""
    """Equal for phrases that mean the same thing."""
    kinds: tuple[str, ...] = ()
    """people, clothing, scene …"""
    unseen: str = ""
    """Why there is no box: `notvisual`, `scene` (the whole image) or `nobox`; empty where there is one."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the image with everybody's answers."""

    id: str
    text: str
    answers: tuple[str, ...] = ()
    """As people gave them (ten in VQA v2); none in a test split."""
    kind: str = ""
    """The data set's answer or question type, for scores by type."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence to be judged: SNLI-VE's hypotheses, NLVR2's statements."""

    id: str
    text: str
    label: str = ""
    """`entailment`, `neutral`, `contradiction`; or `true`, `false`; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image (NLVR2: a pair) with its texts and whatever its source knows of it."""

    id: str
    """Unique in its source; the image path where the source gives none."""
    image: ImageFile
    captions: tuple[str, ...] = ()
    split: str = "train"
    boxes: tuple[Box, ...] = ()
    tags: tuple[str, ...] = ()
    """One per box; without boxes, of the whole image."""
    confidences: tuple[float, ...] = ()
    """One per tag, where a detector or an annotator gave them."""
    tuples: tuple[tuple[str, ...], ...] = ()
    """Scene-graph tuples: (object,), (attribute, object) or (subject, relation, object)."""
    phrases: tuple[Phrase, ...] = ()
    questions: tuple[Question, ...] = ()
    statements: tuple[Statement, ...] = ()
    regions: TarMember | None = None
    """The image's regions, see `vlscale.data.regions`; None where there are none."""
    second: ImageFile | None = None
    """The right image of a pair; `image` is the left one."""
    aliases: tuple[str, ...] = ()
    """What the photograph is called elsewhere: `coco:391895`, `flickr:2970773875`, `vg:1` … Two samples that share one
    show the same photograph."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the source that vlscale has no name for, kept as they are."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Size and special ids of the tokenizer: all that a system knows of text."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    phrase_pieces: tuple[tuple[int, ...], ...] = ()
    """Word pieces of each phrase concept; phrase p has the id size + p."""

    answer_pieces: tuple[tuple[int, ...], ...] = ()
    """Word pieces of each answer that a task chooses from."""

    @property
    def phrases(self) -> int:
        """Phrase concepts beside the `size` words."""
        return len(self.phrase_pieces)


@dataclass(slots=True)
class Batch:
    """I images with S texts each, B = I · S pairs, on one device; S is 1 but where a recipe asks for more."""

    images: Tensor
    """[I, 3, H, W]: uint8 as loaded, float32 once normalised. [I, 3, 0, 0] with `data.concepts`: none is read."""
    input_ids: Tensor
    """[B, L] int64; the texts of an image follow one another."""
    attention_mask: Tensor
    """[B, L] int64, 1 = attend; rows end in padding."""
    image_ids: Tensor
    """[I] int64, equal where the image is the same; in evaluation the sample's index."""
    image_sizes: Tensor | None = None
    """[I, 2] int64, height and width in pixels of what is not padding; None: images fill their square."""
    matched: Tensor | None = None
    """[B] int64, 1 where the text is the image's own, 0 where it is another's; None: all are."""
    second_images: Tensor | None = None
    """[I, 3, H, W]: another crop of each image for the teacher; None: it sees the same."""
    phrase_places: Tensor | None = None
    """[B, L] int64: 0, or 1 + the slot of the phrase at that position. This and what follows up to `region_boxes` is
    there with `data.concepts` alone; P, T and R are its max_phrases, max_tags and max_regions."""
    phrase_words: Tensor | None = None
    """[B, P, L] bool: the caption's word pieces that say the phrase of a slot."""
    tag_ids: Tensor | None = None
    """[I, T] int64."""
    tag_mask: Tensor | None = None
    """[I, T] int64, 1 = attend."""
    tag_places: Tensor | None = None
    """[I, T] int64: 0, or 1 + the number of the tag that a word piece belongs to."""
    regions: Tensor | None = None
    """[I, R, region_width + 6] float32: feature, then `regions.geometry`; 0 in padding."""
    region_mask: Tensor | None = None
    """[I, R] int64, 1 = a region; rows end in padding."""
    region_boxes: Tensor | None = None
    """[I, R, 4] float32: x1, y1, x2, y2 as shares of the image's width and height; 0 in padding."""
    right: Batch | None = None
    """Right images of pairs (NLVR2), without texts; `images` are the left ones."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """What a task asks for, by name: see `vlscale.data.targets`."""
    sample_ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Unreadable samples that were replaced by the next good one in the order: `path: reason`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["targets"] = {name: value.to(device, non_blocking=True) for name, value in self.targets.items()}
        moved["right"] = None if self.right is None else self.right.to(device)
        return replace(self, **moved)

    def __len__(self) -> int:
        return self.input_ids.shape[0]
