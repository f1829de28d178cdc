"""Which sample comes when, and the micro-batches made of it (architecture.md, "The order of samples").

Nothing here has state besides the step: the order is a function of (seed, epoch) and the number of samples, a sample's
caption, crop and augmentation of (seed, epoch, sample id). Workers are given whole batches by their positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vlscale.config import Data
from vlscale.data.aspect import AspectOrder, stacked
from vlscale.data.concept_regions import check_regions
from vlscale.data.concepts import ConceptInputs, ConceptReader, load_phrases
from vlscale.data.corpus import Corpus, SampleList, as_corpus, has_caption, image_identity
from vlscale.data.images import ImageError, evaluation_image, load_image, train_transform
from vlscale.data.order import Order, ShuffledOrder, generator, number_of
from vlscale.data.pairs import DrawnTexts, draw_texts
from vlscale.data.sample import Batch, Sample, SampleError
from vlscale.data.targets import Targets
from vlscale.data.text import TextTokenizer
from vlscale.data.workers import context, start_worker, warm_up
from vlscale.errors import RunBroken, UserError

MAX_REPLACEMENTS = 1000
"""So many unreadable samples in a row (or the whole epoch, where it is smaller) mean wrong paths, not broken files."""

_DEATH_SECONDS = 2.0
"""How long after its connections the end of a process may become known."""
_SECOND_VIEW = 1
"""What the generator of a sample's second view is named by, besides (seed, epoch, sample id)."""


class Stream:
    """Micro-batches of one rank, in order and without end; every rank gets equally many.

    Global step s is positions [s·G, (s+1)·G) of the order, rank r takes its contiguous G/R of them, and micro-batches
    slice that. `start_step` resumes: no other state is needed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        data: Data,
        tokenizer: TextTokenizer,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        workers: int = 0,
        order: Order | None = None,
        targets: Targets | None = None,
    ) -> None:
        corpus = as_corpus(samples)
        if not len(corpus):
            raise UserError("data: no samples to train on")
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world):
            raise UserError(
                f"train.global_batch: {global_batch} is no multiple of micro_batch × ranks = {micro_batch} × {world}; "
                "change train.global_batch or train.micro_batch"
            )
        self._order: Order = order or _order(corpus, data, seed, global_batch)
        self.steps_per_epoch: float = len(self._order) / global_batch
        self.micro_batches_per_step: int = global_batch // (micro_batch * world)
        self._global_batch, self._micro_batch = global_batch, micro_batch
        _check_captions(corpus)
        if data.concepts is not None:
            check_regions(corpus, data.concepts)
        self._rank, self._world, self._start_step = rank, world, start_step
        self._dataset = _TrainingBatches(corpus, data, tokenizer, seed, self._order, targets)
        self._workers = workers
        if workers:
            warm_up()  # the caller builds its engine meanwhile
        self._running: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from `start_step` on: uint8 images and ids padded to max_tokens, on the CPU.

        With `data.aspect` images are padded right and below, and `image_sizes` tells their own sizes; with several
        `data.texts` per image `matched` tells which are its own; with `data.second_view` there are `second_images`.
        With `data.concepts` there are phrases, tags and regions, and images of no pixels.

        Raises:
            UserError: no image can be read; or, with `data.concepts`, a sample has no regions.
            RunBroken: a worker was killed.
        """
        self.close()
        self._running = self._batches()
        return self._running

    def close(self) -> None:
        """Stop the workers; iterating again starts them anew, at `start_step`."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[attr-defined]  # a generator: dropping its loader ends the workers

    def positions(self) -> Iterator[list[int]]:
        """Positions in the order of each micro-batch of this rank, without end."""
        step = self._start_step
        share = self._global_batch // self._world
        while True:
            start = step * self._global_batch + self._rank * share
            for micro in range(self.micro_batches_per_step):
                first = start + micro * self._micro_batch
                yield list(range(first, first + self._micro_batch))
            step += 1

    def _batches(self) -> Iterator[Batch]:
        yield from _loaded(self._dataset, self.positions(), self._workers)


def evaluation_batches(
    samples: Sequence[Sample], data: Data, batch_size: int, tokenizer: TextTokenizer | None = None
) -> Iterator[Batch]:
    """Every image once, in order, resized without cropping; no text (input_ids is [B, 0]).

    With `data.aspect` each batch is padded to its own largest image, and `image_sizes` tells what is not padding.

    With `data.concepts` there are tags and regions, and images of no pixels.

    `image_ids` are indices into `samples`. An image that can't be read is left out of its batch and named in `skipped`.

    Args:
        tokenizer: of the tags; needed with `data.concepts` alone.

    Raises:
        UserError: with `data.concepts`, a sample has no regions.
        ValueError: `data.concepts` without tokenizer.
    """
    corpus, concepts = as_corpus(samples), data.concepts
    reader = None
    if concepts is not None:
        if tokenizer is None:
            raise ValueError("data.concepts: tags need a tokenizer")
        check_regions(corpus, concepts)
        reader = ConceptReader(data, concepts, tokenizer, None)
    dataset = _EvaluationBatches(corpus, data, reader)
    positions = (list(range(i, min(i + batch_size, len(samples)))) for i in range(0, len(samples), batch_size))
    # Starting workers takes seconds: only worth it for many images.
    workers = data.workers if len(samples) >= 2000 else 0
    yield from _loaded(dataset, positions, workers)


def _order(corpus: Corpus, data: Data, seed: int, global_batch: int) -> Order:
    shuffled = ShuffledOrder(corpus.parts(), seed, data.window)
    if data.aspect is None:
        return shuffled
    return AspectOrder(shuffled, corpus.aspects(), data.aspect.window, global_batch, seed)


class _Drawn(NamedTuple):
    """What one sample gives a batch."""

    sample: Sample
    views: list[Tensor]
    """One or two, uint8 [3, H, W]; with `data.concepts` one without pixels."""
    texts: DrawnTexts
    concepts: ConceptInputs | None = None
    right: Tensor | None = None
    """Of a pair: its right image, uint8 [3, H, W]."""


class _TrainingBatches(Dataset[Any]):
    """A list of positions → the fields of a Batch, or the UserError that ends the run. Runs in the workers."""

    def __init__(
        self,
        corpus: Corpus,
        data: Data,
        tokenizer: TextTokenizer,
        seed: int,
        order: Order,
        targets: Targets | None,
    ) -> None:
        self._corpus, self._targets = corpus, targets
        self._data, self._tokenizer, self._seed, self._order = data, tokenizer, seed, order
        self._concepts = None
        if data.concepts is not None:
            self._concepts = ConceptReader(data, data.concepts, tokenizer, load_phrases(data.concepts))

    def __getitems__(self, positions: list[int]) -> dict[str, Any] | UserError:
        skipped: list[str] = []
        try:
            drawn = [self._readable(position, skipped) for position in positions]
        except UserError as error:  # as a value: the loader would wrap it into a traceback
            return error
        fields = {**self._images(drawn), **self._texts(drawn), "skipped": skipped}
        if self._targets is not None:
            fields["targets"] = self._targets([one.sample for one in drawn], fields)
        return fields

    def _images(self, drawn: list[_Drawn]) -> dict[str, Any]:
        first, *second = (
            stacked(views, self._data.image_size, self._data.aspect)
            for views in zip(*(one.views for one in drawn), strict=True)
        )
        images, sizes = first
        return {
            "images": images,
            "image_sizes": sizes,
            "second_images": second[0][0] if second else None,
            "image_ids": torch.tensor([number_of(image_identity(one.sample)) >> 1 for one in drawn]),
            "sample_ids": [one.sample.id for one in drawn],
            "right": _right_images([one.right for one in drawn if one.right is not None], self._data),
        }

    def _texts(self, drawn: list[_Drawn]) -> dict[str, Any]:
        texts = [text for one in drawn for text in one.texts.texts]
        matched = [own for one in drawn for own in one.texts.matched]
        many = self._data.texts.per_image > 1
        return {
            **self._encoded(texts, drawn),
            "matched": torch.tensor(matched, dtype=torch.int64) if many else None,
            "texts": texts,
        }

    def _encoded(self, texts: list[str], drawn: list[_Drawn]) -> dict[str, Tensor]:
        if self._concepts is None:
            input_ids, mask = self._tokenizer.encode(texts, pad_to=self._tokenizer.max_tokens)
            return {"input_ids": input_ids, "attention_mask": mask}
        inputs = [one.concepts for one in drawn if one.concepts is not None]
        return {**self._concepts.texts(texts, inputs), **self._concepts.images(inputs)}

    def _readable(self, position: int, skipped: list[str]) -> _Drawn:
        """The sample at `position`, or the next one in the order that can be read."""
        limit = min(len(self._order), MAX_REPLACEMENTS)
        for candidate in range(position, position + limit):
            walk, index = self._order.at(candidate)
            try:
                return self._draw(walk, self._corpus.sample(index))
            except (ImageError, SampleError) as error:
                skipped.append(f"{self._corpus.where(index)}: {error}")
        raise UserError(
            f"data: none of {limit} samples in a row can be read, the last one is {skipped[-1]}; check data.image_root"
        )

    def _draw(self, walk: int, sample: Sample) -> _Drawn:
        """Views and texts of the sample's `walk`-th time; the image is decoded once."""
        names = (self._seed, walk, number_of(sample.id))
        drawn = generator(*names)
        texts = draw_texts(sample, self._corpus, self._data.texts, drawn)
        if self._concepts is not None:
            return _Drawn(sample, [_no_pixels()], texts, self._concepts.read(sample, texts.texts[0], drawn))
        image, may_flip = load_image(sample.image), not texts.names_a_side
        draws = [drawn, generator(*names, _SECOND_VIEW)] if self._data.second_view else [drawn]
        views = [train_transform(self._data, of_view, may_flip)(image) for of_view in draws]
        if sample.second is None:
            return _Drawn(sample, views, texts)
        right = train_transform(self._data, drawn, may_flip)(load_image(sample.second))
        return _Drawn(sample, views, texts, right=right)


class _EvaluationBatches(Dataset[Any]):
    """A list of indices → the fields of a Batch without text."""

    def __init__(self, corpus: Corpus, data: Data, concepts: ConceptReader | None) -> None:
        self._corpus, self._data, self._concepts = corpus, data, concepts

    def __getitems__(self, indices: list[int]) -> dict[str, Any] | UserError:
        images: list[Tensor] = []
        right: list[Tensor] = []
        inputs: list[ConceptInputs] = []
        kept, ids, skipped = [], [], []
        for index in indices:
            try:
                sample = self._corpus.sample(index)
                if self._concepts is None:
                    shown = [evaluation_image(file, self._data) for file in (sample.image, sample.second) if file]
                    images.append(shown[0])
                    right += shown[1:]
                else:
                    inputs.append(self._concepts.read(sample))
                    images.append(_no_pixels())
                kept.append(index)
                ids.append(sample.id)
            except (ImageError, SampleError) as error:
                skipped.append(f"{self._corpus.where(index)}: {error}")
            except UserError as error:  # as in training
                return error
        pixels, sizes = stacked(images, self._data.image_size, self._data.aspect)
        return {
            **({} if self._concepts is None else self._concepts.images(inputs)),
            "images": pixels,
            "image_sizes": sizes,
            "input_ids": torch.empty(len(kept), 0, dtype=torch.int64),
            "attention_mask": torch.empty(len(kept), 0, dtype=torch.int64),
            "image_ids": torch.tensor(kept, dtype=torch.int64),
            "right": _right_images(right, self._data),
            "sample_ids": ids,
            "skipped": skipped,
        }


def _loaded(dataset: Dataset[Any], positions: Iterator[list[int]], workers: int) -> Iterator[Batch]:
    """Whole batches go to the workers in turn and come back in order; closing the generator ends the workers."""
    loader = DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=context() if workers else None,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one, and the run depends on it
    )
    items = iter(loader)
    try:
        for item in _given(items):
            yield _batch(item)
    finally:
        # Not left to the garbage collector: seen once on a GPU, the workers were gone before the thread that pins their
        # batches, which ended in a traceback.
        if isinstance(items, _MultiProcessingDataLoaderIter):
            items._shutdown_workers()


def _given(items: Iterator[Any]) -> Iterator[Any]:
    """What a loader gives.

    Raises:
        RunBroken: a worker is gone; torch says so in half a dozen ways.
    """
    try:
        yield from items
    except Exception as error:
        sentinels = [worker.sentinel for worker in getattr(items, "_workers", [])]
        if not (sentinels and wait(sentinels, _DEATH_SECONDS)):
            raise
        raise RunBroken(
            f"a process of the data loader was killed, most often because memory ran out ({type(error).__name__}); "
            "lower data.workers and start again, a training with --resume auto"
        ) from None


def _right_images(views: list[Tensor], data: Data) -> Batch | None:
    """Of samples that are pairs, all of them or none."""
    if not views:
        return None
    pixels, sizes = stacked(views, data.image_size, data.aspect)
    nothing = torch.empty(len(views), 0, dtype=torch.int64)
    return Batch(pixels, nothing, nothing, torch.arange(len(views)), image_sizes=sizes)


def _no_pixels() -> Tensor:
    return torch.empty(3, 0, 0, dtype=torch.uint8)


def _as_it_is(item: Any) -> Any:
    return item


def _batch(item: dict[str, Any] | UserError) -> Batch:
    if isinstance(item, UserError):
        raise item
    return Batch(**item)


def _check_captions(corpus: Corpus) -> None:
    """Of samples in memory; shards are selected by their index."""
    if isinstance(corpus, SampleList):
        for sample in corpus:
            if not has_caption(sample):
                raise UserError(f"data: sample {sample.id} has no caption; training needs one per image")
