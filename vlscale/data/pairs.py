"""The texts that come with an image: its own captions, and others' (SOHO 3.4, the image-text matching task)."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from vlscale.config import Texts
from vlscale.data.corpus import Corpus, image_identity
from vlscale.data.sample import Sample, SampleError
from vlscale.errors import UserError

DRAWS = 32
"""So many draws that all give the same image: then the corpus is walked through from there."""

_SIDES = re.compile(r"\b(left|right)(most|wards?)?\b", re.IGNORECASE)


class DrawnTexts(NamedTuple):
    """The S texts of one image."""

    texts: list[str]
    matched: list[bool]
    """Whether each is the image's own; without a coin the own ones come first."""

    @property
    def names_a_side(self) -> bool:
        """Whether one that is the image's own says left or right: then the image can't be mirrored."""
        return any(own and _SIDES.search(text) for text, own in zip(self.texts, self.matched, strict=True))


def draw_texts(sample: Sample, corpus: Corpus, options: Texts, drawn: np.random.Generator) -> DrawnTexts:
    """S = positive + negative texts of the sample, a function of what `drawn` was made of and the corpus.

    Raises:
        SampleError: the sample has no caption.
        UserError: mismatched texts are asked for, and no other image has another caption.
    """
    own = _captions(sample)
    if not own:
        raise SampleError("no caption")
    if options.coin:
        matched = (drawn.random(options.per_image) < 0.5).tolist()
    else:
        matched = [True] * options.positive + [False] * options.negative
    positives = iter(_own_texts(own, sum(matched), drawn))
    texts = [next(positives) if is_own else _other_text(sample, corpus, drawn) for is_own in matched]
    return DrawnTexts(texts, matched)


def _captions(sample: Sample) -> list[str]:
    return [caption for caption in sample.captions if caption.strip()]


def _own_texts(captions: list[str], count: int, drawn: np.random.Generator) -> list[str]:
    """`count` captions; none comes twice before all have come once."""
    if count == 1:  # as it was drawn before there could be several: a run goes on with the captions it would have had
        return [captions[int(drawn.integers(len(captions)))]]
    rounds = -(-count // len(captions))
    chosen = [number for _ in range(rounds) for number in drawn.permutation(len(captions)).tolist()]
    return [captions[number] for number in chosen[:count]]


def _other_text(sample: Sample, corpus: Corpus, drawn: np.random.Generator) -> str:
    """A caption of another image: the samples of the corpus are equally likely, and the captions of each.

    What also stands among the sample's own captions is no mismatch and is not taken.
    """
    index = 0
    for _ in range(DRAWS):
        index = int(drawn.integers(len(corpus)))
        if captions := _others(sample, corpus, index):
            return captions[int(drawn.integers(len(captions)))]
    for step in range(1, len(corpus)):
        if captions := _others(sample, corpus, (index + step) % len(corpus)):
            return captions[int(drawn.integers(len(captions)))]
    raise UserError(
        f"data.texts: no caption of another image than that of sample {sample.id} among {len(corpus)} samples; "
        "mismatched texts need two images with captions of their own: add data, or set data.texts.negative=0 "
        "and data.texts.coin=false"
    )


def _others(sample: Sample, corpus: Corpus, index: int) -> list[str]:
    """The captions of the corpus's sample that don't fit `sample`; none where it shows the same image."""
    try:
        other = corpus.sample(index)
    except SampleError:  # named when its own turn comes
        return []
    if image_identity(other) == image_identity(sample):
        return []
    return [caption for caption in _captions(other) if caption not in sample.captions]
