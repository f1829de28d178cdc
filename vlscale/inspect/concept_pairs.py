"""An image with its caption as a concept system reads them, and attention by the names of what stands in its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlscale.data.concepts import ConceptReader, load_phrases
from vlscale.data.images import load_image
from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer
from vlscale.interop.run import Run
from vlscale.systems.concept_attention import ConceptAttention

WHOLE = "whole image"
OVERLAP = 0.5
"""Intersection over union from which a region is called what the data calls a box."""
MOST_PIXELS = 640
"""Of a picture's longer side."""
ROUNDING = 1e-4
"""Of sums of probabilities."""


class Thing(NamedTuple):
    """A word, phrase, tag or region."""

    name: str
    places: list[int]
    """Its positions in the text, among the tags, or among the regions: a word's or tag's pieces."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and caption."""

    sample: str
    """Its id."""
    caption: str
    pixels: np.ndarray
    """[H, W, 3] uint8, for drawing."""
    batch: Batch
    """Of this pair alone, on the CPU."""
    words: list[Thing]
    phrases: list[Thing]
    tags: list[Thing]
    regions: list[Thing]
    """Without a name where the data's boxes give none."""
    boxes: np.ndarray
    """[R, 4] float32, without padding; as in `Batch.region_boxes`."""


class Attended(NamedTuple):
    """Attention of a pair, by `Pair`'s lists: what the pieces of a thing get is added, what they give averaged."""

    phrase_to_words: np.ndarray
    """[phrases, words]."""
    region_to_tags: np.ndarray
    """[regions, tags]."""
    phrase_to_regions: np.ndarray
    """[phrases, regions]."""
    word_to_regions: np.ndarray
    """[words, regions]."""
    shares: dict[str, dict[str, float]]
    """Who looks, and in which encoder → of what kind it is what they look at; on average over them, sums to 1."""


class PairReader:
    """Samples of a run's data → pairs."""

    def __init__(self, run: Run) -> None:
        """Reads the run's phrases.

        Raises:
            UserError: they can't be read.
        """
        concepts = run.recipe.data.concepts
        assert concepts is not None
        self._tokenizer, self._phrases, self._room = run.tokenizer, load_phrases(concepts), concepts.max_words - 2
        self._reader = ConceptReader(run.recipe.data, concepts, run.tokenizer, self._phrases)

    def caption_with_phrases(self, sample: Sample) -> str | None:
        """The first caption of which the vocabulary has a phrase."""
        if self._phrases is None:
            return None
        return next((caption for caption in sample.captions if self._phrases.of_caption(caption, sample)), None)

    def pair(self, sample: Sample, caption: str) -> Pair:
        """The image with one of its captions.

        Raises:
            ImageError: the image can't be read.
            SampleError, UserError: as `ConceptReader.read`.
        """
        image = load_image(sample.image)
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        inputs = self._reader.read(sample, caption)
        tensors = self._reader.texts([caption], [inputs]) | self._reader.images([inputs])
        fields: dict[str, Any] = {**tensors, "image_ids": torch.zeros(1, dtype=torch.int64)}
        batch = Batch(torch.zeros(1, 3, 0, 0), **fields)
        texts = self._phrases.texts if self._phrases else []
        names = [texts[number] for number in inputs.phrases]
        boxes = inputs.regions.boxes.numpy()
        return Pair(
            sample=sample.id,
            caption=caption,
            pixels=np.asarray(image),
            batch=batch,
            words=words_of(self._tokenizer, caption, self._room),
            phrases=[Thing(names[slot], places) for slot, places in enumerate(_places(tensors["phrase_places"]))],
            tags=[
                Thing(self._tokenizer.decode(tensors["tag_ids"][0, places]), places)
                for places in _places(tensors["tag_places"])
            ],
            regions=[Thing(name, [row]) for row, name in enumerate(region_names(sample, boxes))],
            boxes=boxes,
        )


def words_of(tokenizer: TextTokenizer, caption: str, room: int) -> list[Thing]:
    """Words of a caption in order, as far as its first `room` pieces go; position 0 is [CLS]."""
    pieces = tokenizer.pieces([caption])[0]
    rows: dict[int, list[int]] = {}
    for row, word in enumerate(pieces.word_of[:room], start=1):
        rows.setdefault(word, []).append(row)
    return [Thing(pieces.words[word], places) for word, places in rows.items()]


def region_names(sample: Sample, boxes: np.ndarray) -> list[str]:
    """What the data calls the box that each region [R, 4] covers best, if by `OVERLAP`; empty where none."""
    known = [*zip(sample.boxes, sample.tags, strict=False), ((0.0, 0.0, 1.0, 1.0), WHOLE)]
    names = []
    for box in boxes.tolist():
        overlaps = [_overlap(box, other) for other, _ in known]
        best = int(np.argmax(overlaps))
        names.append(known[best][1] if overlaps[best] >= OVERLAP else "")
    return names


def attended(pair: Pair, attention: ConceptAttention) -> Attended:
    """The attention of a batch of this pair alone, by names."""
    assert pair.batch.tag_ids is not None
    behind = pair.batch.tag_ids.shape[1]
    textual, visual, to_text, to_regions, to_tags = (part[0, 0].cpu().numpy() for part in attention[:5])
    regions = [Thing(name, [behind + row for row in places]) for name, places in pair.regions]
    shares = {
        "phrases, textual encoder": _shares(textual, pair.phrases, {"words": pair.words, "phrases": pair.phrases}),
        "regions, visual encoder": _shares(visual, regions, {"tags": pair.tags, "regions": regions}),
    }
    for kind, things in (("phrases", pair.phrases), ("words", pair.words)):
        parts = {"words, phrases, [CLS], [SEP]": to_text, "tags": to_tags, "regions": to_regions}
        rows = [row for thing in things for row in thing.places]
        if rows:
            shares[f"{kind}, multimodal encoder"] = {
                name: float(part[rows].sum(1).mean()) for name, part in parts.items()
            }
    return Attended(
        _between(textual, pair.phrases, pair.words),
        _between(visual, regions, pair.tags),
        _between(to_regions, pair.phrases, pair.regions),
        _between(to_regions, pair.words, pair.regions),
        {who: {name: share for name, share in what.items() if share > 0} for who, what in shares.items() if what},
    )


def _between(matrix: np.ndarray, who: Sequence[Thing], whom: Sequence[Thing]) -> np.ndarray:
    """[len(who), len(whom)] float32: mean over the rows of a thing, sum over its columns."""
    found = np.zeros((len(who), len(whom)), dtype=np.float32)
    for row, one in enumerate(who):
        for column, other in enumerate(whom):
            found[row, column] = matrix[np.ix_(one.places, other.places)].sum(axis=1).mean()
    return found


def _shares(matrix: np.ndarray, who: Sequence[Thing], kinds: dict[str, list[Thing]]) -> dict[str, float]:
    """Shares of the kinds, of what else the encoder sees of this modality, and of the other one, if it sees that."""
    rows = [row for thing in who for row in thing.places]
    if not rows:
        return {}
    columns = {kind: [column for thing in things for column in thing.places] for kind, things in kinds.items()}
    named = {kind: float(matrix[np.ix_(rows, some)].sum(axis=1).mean()) for kind, some in columns.items()}
    seen = float(matrix[rows].sum(axis=1).mean())
    rest, other = seen - sum(named.values()), 1 - seen
    return named | {"[CLS], [SEP]": max(0.0, rest), "the other modality": other if other > ROUNDING else 0.0}


def _places(numbers: Tensor) -> list[list[int]]:
    """[1, L] int64, 0 or 1 + a thing's number → positions of every thing."""
    (row,) = numbers.tolist()
    return [[place for place, found in enumerate(row) if found == number] for number in range(1, max(row) + 1)]


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    common = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return common / (areas - common) if areas > common else 0.0
