"""Corpora: packed samples are the samples, in every process, and selecting reads no more than it must."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlscale.data.corpus import Joined, SampleList, as_corpus, image_identity, without
from vlscale.data.sample import Phrase, Question, Sample, Statement, TarMember

BOX = (0.1, 0.2, 1 / 3, 1.0)
FULL = Sample(
    id="é \ud800 1",
    image=Path("a/\udce9.jpg"),
    captions=("one", ""),
    split="val",
    boxes=(BOX,),
    tags=("dog",),
    confidences=(0.25,),
    tuples=(("big", "dog"),),
    phrases=(Phrase("a dog", (BOX, BOX), 0, 2, "7", ("animals",)), Phrase("it", unseen="notvisual")),
    questions=(Question("q", "what?", ("dog", "cat"), "other"),),
    statements=(Statement("s", "a dog", "true"),),
    second=TarMember("x.tar", "b.png", 512, 7),
    aliases=("vg:1", "coco:2"),
    extra={"licence": {"by": 4}, "list": [1, 2.5, None]},
)
SAMPLES = [
    FULL,
    Sample("2", TarMember("x.tar", "c.png", 2048, 9), ("a cat",)),
    Sample("3", Path("c.jpg"), (" ",)),
    Sample("4", Path("d.jpg"), ("x",), "restval"),
    replace(FULL, id="5", captions=()),
]


def send(corpus: SampleList) -> SampleList:
    """As torch sends a corpus to a loader process, but for the tensors, which pickle copies."""
    return pickle.loads(pickle.dumps(corpus))


@pytest.mark.parametrize("corpus", [SampleList(SAMPLES), SampleList.packed(iter(SAMPLES)), send(SampleList(SAMPLES))])
def test_packed_samples_are_the_samples(corpus: SampleList) -> None:
    assert len(corpus) == 5
    assert list(corpus) == SAMPLES
    assert (corpus[-1], corpus[1:3]) == (SAMPLES[-1], SAMPLES[1:3])
    assert corpus.splits() == {"val": 2, "train": 2, "restval": 1}
    assert list(corpus.select(["train", "restval"])) == [SAMPLES[1], SAMPLES[3]]
    assert list(corpus.select(["train"], captioned=False)) == SAMPLES[1:3]
    chosen = send(corpus.select(["val", "restval"]))
    assert list(chosen) == [SAMPLES[0], SAMPLES[3]]
    assert chosen.splits() == {"val": 1, "restval": 1}
    assert list(chosen.select(["restval"])) == [SAMPLES[3]]
    assert chosen.where(1) == "d.jpg"
    assert len(corpus.select(["test"])) == 0
    with pytest.raises(IndexError):
        corpus[5]


def test_nothing_is_a_corpus_too() -> None:
    empty = send(SampleList.packed(iter([])))
    assert (len(empty), list(empty), empty.splits(), empty.per_epoch()) == (0, [], {}, 0)


def test_packed_samples_are_small_and_shared() -> None:
    many = SampleList.packed(Sample(f"{n}", Path(f"images/{n:08d}.jpg"), (f"a dog {n}",)) for n in range(10_000))
    assert len(pickle.dumps(many)) < 1_500_000
    tensors = [value for value in vars(many._samples).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3, "torch shares tensors between processes, and nothing else"


def test_joined_and_reduced() -> None:
    joined = Joined([SampleList(SAMPLES), SampleList.packed(SAMPLES[:2])], [1, 0.5])
    assert list(joined) == [*SAMPLES, *SAMPLES[:2]]
    assert joined.where(6) == "x.tar:c.png"
    assert joined.splits() == {"val": 3, "train": 3, "restval": 1}
    assert joined.per_epoch() == 5 + 1
    assert list(joined.select(["restval", "train"])) == [SAMPLES[1], SAMPLES[3], SAMPLES[1]]
    kept, dropped = without(joined, lambda sample: sample.split == "val")
    assert (list(kept), dropped) == ([*SAMPLES[1:4], SAMPLES[1]], 3)
    assert as_corpus(joined) is joined


def test_what_a_photograph_is_known_by() -> None:
    assert image_identity(FULL) == "coco:2"
    assert image_identity(replace(FULL, aliases=("vg:1", "flickr:3"))) == "flickr:3"
    assert image_identity(replace(FULL, aliases=("openimages:1",))) == "openimages:1"
    assert image_identity(SAMPLES[1]) == "x.tar:c.png"
