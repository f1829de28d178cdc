"""Counts, choices of patches and what the boxes say, against slow re-computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vlscale.data.sample import Sample
from vlscale.inspect.cells import CutImage
from vlscale.inspect.tags import TagTable, cell_tags
from vlscale.inspect.usage import PADDING, pick_codes, pick_patches, some_samples, usage_of, zero_codes


def sample(name: str, boxes: list[tuple[float, float, float, float]], tags: list[str]) -> Sample:
    return Sample(name, Path(name), boxes=tuple(boxes), tags=tuple(tags))


def square(rows: int, columns: int) -> CutImage:
    """An image without padding, whose cells are 8 pixels wide."""
    return CutImage.whole(np.zeros((8 * rows, 8 * columns, 3), dtype=np.uint8), rows, columns)


def test_usage() -> None:
    codes = np.array([[0, 0, 0, 2], [2, 4, 0, 2]])
    usage = usage_of(codes, 6)
    assert usage.counts.tolist() == [4, 0, 3, 0, 1, 0]
    assert usage.dead == [1, 3, 5]
    assert usage.order.tolist() == [0, 2, 4]
    shares = [4 / 8, 3 / 8, 1 / 8]
    assert usage.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert usage.perplexity == pytest.approx(math.exp(usage.entropy))


def test_padding_counts_nowhere() -> None:
    codes = np.array([[0, 0, 1, PADDING], [PADDING, 1, PADDING, PADDING], [3, 0, 1, 1]])
    usage = usage_of(codes, 5)
    assert usage.counts.tolist() == [3, 4, 0, 1, 0]
    shares = [3 / 8, 4 / 8, 1 / 8]
    assert usage.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    samples = [sample(name, [(0.0, 0.0, 1.0, 1.0)], [f"{name} box"]) for name in "abc"]
    table = TagTable(samples, [square(2, 2)] * 3, codes != PADDING)
    shares_of_tags, _ = table.of(codes, 1)
    assert [(t.tag, t.share, t.everywhere) for t in shares_of_tags] == [("b box", 0.25, 0.125)]


def test_zero_codes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((40, 16)).astype(np.float32)
    assert zero_codes(1e-6 * codes) == [], "small codes among small ones are no zeros"
    codes[[3, 17]] = 0
    codes[8] *= 1e-5
    assert zero_codes(codes) == [3, 8, 17]
    codes[0] *= 1e4
    assert zero_codes(codes) == [3, 8, 17], "one far-off code changes nothing"
    assert zero_codes(np.zeros((3, 2), dtype=np.float32)) == [0, 1, 2]


def test_codes_picked() -> None:
    """The most used ones, then a quarter as many of the rest, none of them dead, the same every time."""
    counts = np.repeat(np.arange(40), np.arange(40) * 2)  # code k occurs 2k times
    usage = usage_of(counts[None], 60)
    picked = pick_codes(usage, 8)
    assert picked[:8] == list(range(39, 31, -1))
    assert len(picked) == 10
    assert set(picked[8:]) <= set(range(1, 32))
    assert picked == pick_codes(usage, 8)
    assert pick_codes(usage, 1000) == list(range(39, 0, -1))


def test_patches_come_from_different_images() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (30, 16))
    codes[:, 0] = 7
    codes[4] = 7
    for count, images in ((10, 10), (30, 30), (35, 30), (1000, 30)):
        places = pick_patches(codes, 7, count)
        assert len(places) == min(count, int((codes == 7).sum())) == len(set(places))
        assert all(codes[image, cell] == 7 for image, cell in places)
        assert len({image for image, _ in places}) == images
    first = [image for image, _ in pick_patches(codes, 7, 10)]
    assert first != sorted(first), "a draw, not the first images"
    assert pick_patches(codes, 7, 10) == pick_patches(codes, 7, 10)
    assert pick_patches(codes, 9, 10) == []


def test_cells_take_the_smallest_box_that_holds_their_centre() -> None:
    samples = [
        sample("a", [(0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.3, 0.3)], ["red box", "blue cat"]),
        sample("b", [(0.0, 0.0, 0.3, 0.3), (0.0, 0.0, 0.5, 1.0)], ["blue cat", "red box"]),
        sample("c", [], []),
    ]
    names, cells = cell_tags(samples, [square(2, 4)] * 3)
    assert names == ["blue cat", "red box"]
    assert cells[0].tolist() == [0, 1, -1, -1, 1, 1, -1, -1]
    assert cells[1].tolist() == cells[0].tolist(), "whatever the order of the boxes"
    assert cells[2].tolist() == [-1] * 8


def test_cells_of_padded_images_are_placed_in_the_image() -> None:
    """3 × 4 cells of 8 pixels over an image of 20 × 18: the last column is padding, row 2 and column 2 partly."""
    image = CutImage(np.zeros((20, 18, 3), dtype=np.uint8), 3, 4, (24, 32))
    box = (7 / 18, 0.0, 17.5 / 18, 19 / 20)  # holds the centres of columns 1 and 2, at 12 and 17, and row 2's, at 18
    names, cells = cell_tags([sample("a", [box], ["box"]), sample("b", [box], ["box"])], [image, square(4, 4)])
    assert names == ["box"]
    assert cells.shape == (2, 16)
    assert cells[0].reshape(4, 4).tolist() == [[-1, 0, 0, -1]] * 3 + [[-1] * 4]
    assert image.visible().reshape(3, 4).tolist() == [[True, True, True, False]] * 3


def test_shares_of_tags_and_words() -> None:
    samples = [sample("a", [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], ["red box", "red cat"]), sample("b", [], [])]
    images, valid = [square(2, 2)] * 2, np.ones((2, 4), dtype=bool)
    table = TagTable(samples, images, valid)
    codes = np.array([[5, 5, 5, 1], [5, 0, 0, 0]])  # code 5: two cells of the box, one of the cat, one without a box
    tags, words = table.of(codes, 5)
    assert [(t.tag, t.share, t.everywhere) for t in tags] == [("red box", 0.5, 0.25)]
    assert [(w.tag, w.share, w.everywhere) for w in words] == [("box", 0.5, 0.25), ("red", 0.75, 0.5)]
    assert [t.tag for t in table.of(codes, 0)[0]] == ["no box"]
    assert table.of(codes, 9) == ([], []), "a code that does not occur"
    assert TagTable([sample("b", [], [])], images[:1], valid[:1]).of(codes[1:], 5) == ([], [])


def test_large_splits_are_sampled_in_order() -> None:
    samples = [sample(f"{index:03d}", [], []) for index in range(50)]
    drawn = [s.id for s in some_samples(samples, 10)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn)
    assert drawn == [s.id for s in some_samples(samples, 10)]
    assert some_samples(samples, 50) is samples
