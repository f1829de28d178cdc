"""What became of every phrase that was grounded: hits, baselines on the same regions, and kinds of phrases."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlscale.data.sample import Phrase
from vlscale.tasks import box_recall
from vlscale.tasks.box_recall import PROTOCOLS, Hits, mean_hits
from vlscale.tasks.phrase_scores import Grounded

RANDOM, LARGEST, POSSIBLE = BASELINES = ("random region", "largest region", "upper bound")
"""On the same regions: all orders alike (exact expectation), by area, and whether any region is right."""
SEED = 0
"""Draws the caption of the figure."""


@dataclass(slots=True)
class Judgement:
    """Everything that was found, in per cent."""

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    kinds: dict[str, dict[str, float]]
    """By kind of phrase its metrics, number of `phrases` and `upper_bound` of any_r1; a phrase may be of several."""
    figure: dict[str, Any] | None
    """Phrases and phrase concepts of one caption, each with its region (MVPTR, Fig. 5)."""
    predictions: list[dict[str, Any]]
    """One per phrase."""


@dataclass(slots=True)
class Judged:
    """What became of every phrase."""

    hits: list[Hits] = field(default_factory=list)
    baselines: dict[str, list[Hits]] = field(default_factory=lambda: {name: [] for name in BASELINES})
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Predictions."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Captions with phrase concepts."""
    regions: dict[int, int] = field(default_factory=dict)
    """How many, by number of the image."""
    counts: Counter[str] = field(
        default_factory=lambda: Counter(
            captions=0, phrases_with_several_boxes=0, phrases_without_words_left=0, phrases_without_regions=0
        )
    )

    def add(self, caption: Grounded) -> None:
        """Judge a caption's phrases."""
        self.counts["captions"] += 1
        self.regions[caption.image] = len(caption.regions)
        for phrase, scores, said in zip(caption.caption.phrases, caption.scores, caption.said, strict=True):
            self._judge(caption, phrase, scores if said else None)
        if caption.concepts and len(caption.regions):
            self.figures.append(_figure(caption))

    def _judge(self, caption: Grounded, phrase: Phrase, scores: Tensor | None) -> None:
        """A phrase without words left, and without scores, is a miss."""
        right = box_recall.right_regions(caption.regions, phrase.boxes)
        hits = box_recall.no_hits() if scores is None else box_recall.ranked(scores, right)
        self.hits.append(hits)
        self.baselines[RANDOM].append(box_recall.at_random(right))
        self.baselines[LARGEST].append(box_recall.largest_first(caption.regions, right))
        self.baselines[POSSIBLE].append(box_recall.possible(right))
        self.counts["phrases_with_several_boxes"] += len(phrase.boxes) > 1
        self.counts["phrases_without_words_left"] += scores is None
        self.counts["phrases_without_regions"] += not len(caption.regions)
        box, score = None, None
        if scores is not None and len(scores):
            best = _best(scores, right["any"])
            box, score = _numbers(caption.regions[best]), round(float(scores[best]), 6)
        self.rows.append(
            {
                "sample": caption.caption.sample.id,
                "image": caption.image,
                "caption": caption.caption.text,
                "caption_number": caption.caption.caption,
                "phrase": phrase.text,
                "first_word": phrase.first_word,
                "kinds": phrase.kinds,
                "boxes": phrase.boxes,
                "best_box": box,
                "score": score,
                "hit": {name: bool(hits[f"{name}_r1"]) for name in PROTOCOLS},
                "pointing": {name: bool(hits[f"{name}_pointing"]) for name in PROTOCOLS},
            }
        )

    def counted(self) -> dict[str, Any]:
        """For the card."""
        each = round(sum(self.regions.values()) / len(self.regions), 2)
        return {"images": len(self.regions), "regions_per_image": each, "phrases": len(self.hits), **self.counts}

    def judgement(self) -> Judgement:
        """Means over all phrases, and by kind."""
        return Judgement(
            metrics=mean_hits(self.hits),
            baselines={name: mean_hits(hits) for name, hits in self.baselines.items()},
            kinds=self._kinds(),
            figure=random.Random(SEED).choice(self.figures) if self.figures else None,
            predictions=self.rows,
        )

    def _kinds(self) -> dict[str, dict[str, float]]:
        """The most frequent kind first."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            for kind in row["kinds"]:
                places.setdefault(kind, []).append(place)
        kinds: dict[str, dict[str, float]] = {}
        for kind, own in sorted(places.items(), key=lambda item: (-len(item[1]), item[0])):
            possible = mean_hits([self.baselines[POSSIBLE][place] for place in own])
            reached = mean_hits([self.hits[place] for place in own])
            kinds[kind] = {"phrases": len(own), **reached, "upper_bound": possible["any_r1"]}
        return kinds


def _best(scores: Tensor, right: Tensor) -> int:
    """The region of the highest score; of several a wrong one, as in the ranks."""
    top = scores == scores.max()
    wrong = top & ~right
    return int((wrong if wrong.any() else top).int().argmax())


def _figure(caption: Grounded) -> dict[str, Any]:
    """The phrases and concepts of a caption with their regions."""
    phrases = zip(caption.caption.phrases, caption.scores, caption.said, strict=True)
    named = [(phrase.text, "phrase", scores) for phrase, scores, said in phrases if said]
    named += [(text, "concept", scores) for text, scores in zip(caption.concepts, caption.concept_scores, strict=True)]
    regions = []
    for text, kind, scores in named:
        best = int(scores.argmax())
        box, score = _numbers(caption.regions[best]), round(float(scores[best]), 6)
        regions.append({"text": text, "kind": kind, "box": box, "score": score})
    return {
        "sample": caption.caption.sample.id,
        "image": caption.image,
        "caption": caption.caption.text,
        "regions": regions,
    }


def _numbers(box: Tensor) -> list[float]:
    return [round(value, 6) for value in box.tolist()]
