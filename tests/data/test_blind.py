"""With `data.blind` nothing of an image reaches an answer, and the words still do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.systems.tuned_fixtures import BUILD, batch_for, tuned
from vlscale.config import Data
from vlscale.data.blind import hide_images
from vlscale.data.images import normalize_batch
from vlscale.data.sample import Batch


def of_another_image(batch: Batch, other: Batch) -> Batch:
    """The batch with every image-side tensor of the other."""
    names = ("images", "image_sizes", "tag_ids", "tag_mask", "tag_places", "regions", "region_mask", "region_boxes")
    return replace(batch, **{name: getattr(other, name) for name in names}, right=other.right)


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_answers_depend_on_the_words_alone(name: str) -> None:
    system = tuned(name, "snli-ve").eval()
    batch, other = batch_for(name), batch_for(name, seed=1)
    changed = of_another_image(batch, other)
    assert not torch.allclose(system.predict(batch), system.predict(changed)), "seeing, they differ"
    hidden: Tensor = system.predict(hide_images(batch))
    torch.testing.assert_close(system.predict(hide_images(changed)), hidden)
    assert not torch.allclose(system.predict(hide_images(replace(other, images=batch.images))), hidden), "other words"


@torch.no_grad()
def test_both_images_of_a_pair_are_hidden() -> None:
    system, batch = tuned("albef", "paired").eval(), batch_for("albef")
    changed = replace(batch, right=batch_for("albef", seed=1).right)
    torch.testing.assert_close(system.predict(hide_images(changed)), system.predict(hide_images(batch)))


def test_the_recipe_asks_for_it() -> None:
    words = torch.ones(2, 4, dtype=torch.int64)
    batch = Batch(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8), words, words, torch.arange(2))
    assert normalize_batch(batch, Data()).images.abs().min() > 0
    assert normalize_batch(batch, Data(blind=True)).images.abs().max() == 0
