"""Scores of annotated phrases with the regions of their images, caption by caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlscale.config import Data
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch, Phrase, Sample
from vlscale.data.spans import Annotated, SpanEncoder, SpokenTexts, phrase_words
from vlscale.data.stream import evaluation_batches
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.systems.concept_inputs import given, phrase_masks
from vlscale.tasks.cam_scores import with_candidates
from vlscale.tasks.features import Precision

_TEXT_FIELDS = frozenset({"input_ids", "attention_mask", "phrase_places", "phrase_words", "matched"})

Asked = dict[int, list[Annotated]]
"""By number of the sample: its captions that have phrases to ask for, with these."""


class ScoresRegions(Protocol):
    """A system that tells how well phrases fit regions."""

    @property
    def grounding_layer(self) -> int:
        """The layer that is asked where nobody chooses one."""
        ...

    def phrase_region_scores(self, batch: Batch, spans: Tensor, layer: int | None = None) -> Tensor:
        """Scores of every phrase with every region of its caption's image, higher is better.

        Args:
            batch: B captions, each with its image and `region_mask`.
            spans: [B, S, L] bool: the tokens of each phrase.
            layer: default `grounding_layer`.

        Returns:
            [B, S, R] fp32, −inf where a region is padding.

        Raises:
            UserError: there is no such layer.
        """
        ...


class Grounded(NamedTuple):
    """A caption with S phrases to ask for and P phrase concepts, beside an image of R regions."""

    image: int
    """Number of the sample."""
    caption: Annotated
    scores: Tensor
    """[S, R] fp32, finite."""
    said: list[bool]
    """Of each phrase whether cleaning and cutting left a word of it; else its scores mean nothing."""
    concepts: list[str]
    concept_scores: Tensor
    """[P, R] fp32, finite."""
    regions: Tensor
    """[R, 4] float32, x1, y1, x2, y2 as shares of the image."""


def phrases_to_ask(samples: Sequence[Sample]) -> tuple[Asked, Counter[str]]:
    """Phrases that have boxes and a place in a caption, and how much is left out.

    Raises:
        UserError: there is none.
    """
    asked: Asked = {}
    left_out: Counter[str] = Counter(images_without_phrases=0, phrases_without_box=0, phrases_without_place=0)
    for number, sample in enumerate(samples):
        of_caption: dict[int, list[Phrase]] = {}
        for phrase in sample.phrases:
            if not phrase.boxes:
                left_out["phrases_without_box"] += 1
            elif not _is_placed(sample, phrase):
                left_out["phrases_without_place"] += 1
            else:
                of_caption.setdefault(phrase.caption, []).append(phrase)
        if of_caption:
            asked[number] = [Annotated(sample, caption, tuple(own)) for caption, own in sorted(of_caption.items())]
        else:
            left_out["images_without_phrases"] += 1
    if not asked:
        raise UserError(
            f"grounding needs phrases of captions with boxes, and none of the {len(samples)} images has any; data with "
            "phrases: --data entities:FOLDER (Flickr30k Entities), the embedded scenes, or a jsonl file with `phrases`"
        )
    return asked, left_out


def _is_placed(sample: Sample, phrase: Phrase) -> bool:
    if not 0 <= phrase.caption < len(sample.captions):
        return False
    return phrase_words(sample.captions[phrase.caption], phrase) is not None


def with_phrase_boxes(sample: Sample, data: Data) -> Sample:
    """Where the data's own boxes stand for regions: those of phrases among them."""
    if sample.regions is not None or (data.concepts is not None and data.concepts.pixels is None):
        return sample
    boxes = dict.fromkeys([*sample.boxes, *(box for phrase in sample.phrases for box in phrase.boxes)])
    return replace(sample, boxes=tuple(boxes))


@dataclass(slots=True)
class Grounder:
    """A system, in evaluation mode on the precision's device, and how it is asked."""

    system: ScoresRegions
    layer: int
    data: Data
    tokenizer: TextTokenizer
    encode: SpanEncoder
    precision: Precision
    batch_size: int
    grid: bool = False
    """Where the data has no regions of its own to read: a grid of boxes in place of the annotated ones."""
    skipped: list[str] = field(default_factory=list)
    """Images that could not be read so far: `path: reason`."""

    @torch.no_grad()  # not inference mode: Grad-CAM derives by what it makes of these inputs
    def captions(self, samples: Sequence[Sample], asked: Asked) -> Iterator[Grounded]:
        """Every caption of the images that can be read, in order, `batch_size` of them at a time.

        Raises:
            UserError: the system has no such layer, an image has no regions, or a score is not finite.
        """
        numbers = list(asked)
        images = [with_phrase_boxes(samples[number], self.data) for number in numbers]
        for loaded in evaluation_batches(images, self.data, self.batch_size, self.tokenizer):
            self.skipped += loaded.skipped
            batch = normalize_batch(loaded.to(self.precision.device), self.data)
            places = loaded.image_ids.tolist()
            if self.data.concepts is None and places:
                batch = with_candidates(batch, [images[place] for place in places], self.grid)
            kept = [numbers[place] for place in places]
            rows = [(row, number, caption) for row, number in enumerate(kept) for caption in asked[number]]
            for start in range(0, len(rows), self.batch_size):
                taken, of_images, captions = zip(*rows[start : start + self.batch_size], strict=True)
                yield from self._grounded(repeated(batch, taken), of_images, captions)

    def _grounded(self, images: Batch, numbers: Sequence[int], captions: Sequence[Annotated]) -> Iterator[Grounded]:
        """Captions, each with its image in the same row."""
        texts = self.encode(captions)
        scores = self._scores(images, texts)
        there, boxes = given(images.region_mask).bool().cpu(), given(images.region_boxes).cpu()
        slots = texts.spans.shape[1]
        said = texts.spans.any(2).tolist()
        for row, (number, caption) in enumerate(zip(numbers, captions, strict=True)):
            own, concepts = scores[row][:, there[row]], texts.concepts[row]
            if not own.isfinite().all():
                raise UserError("the checkpoint's scores are not finite: it diverged, evaluate an earlier one")
            count = len(caption.phrases)
            yield Grounded(
                image=number,
                caption=caption,
                scores=own[:count],
                said=said[row][:count],
                concepts=concepts,
                concept_scores=own[slots : slots + len(concepts)],
                regions=boxes[row][there[row]],
            )

    def _scores(self, images: Batch, texts: SpokenTexts) -> Tensor:
        """[B, S + P, R] on the CPU: of the phrases, then of the phrase concepts by their slots."""
        fields: dict[str, Any] = texts.fields
        batch = replace(images, **fields).to(self.precision.device)
        spans = texts.spans.to(self.precision.device)
        if batch.phrase_places is not None:
            spans = torch.cat([spans, phrase_masks(batch)], dim=1)
        with self.precision.autocast():
            return self.system.phrase_region_scores(batch, spans, self.layer).float().cpu()


def repeated(images: Batch, rows: Sequence[int]) -> Batch:
    """The images of these rows, as often as they come; texts are left as they are."""
    index = torch.tensor(rows, device=images.images.device)
    taken: dict[str, Any] = {
        f.name: value[index]
        for f in fields(images)
        if f.name not in _TEXT_FIELDS and isinstance(value := getattr(images, f.name), Tensor)
    }
    return replace(images, **taken, sample_ids=[images.sample_ids[row] for row in rows])
