"""The ring of features."""

from __future__ import annotations

import pytest
import torch

from vlscale.nn.queue import EMPTY, FeatureQueue, IdQueue


def test_starts_with_unit_vectors_equal_for_equal_seeds() -> None:
    torch.manual_seed(1)
    first = FeatureQueue(4, 50, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first.features, FeatureQueue(4, 50, seed=0).features)
    assert not torch.equal(first.features, FeatureQueue(4, 50, seed=1).features)
    assert torch.allclose(first.features.norm(dim=0), torch.ones(50))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 20])
def test_wraps_around_like_a_list(size: int) -> None:
    """Batches that don't divide the queue, or are larger than it, against one column at a time."""
    queue = FeatureQueue(2, size, seed=0)
    slow, position = list(queue.features.T.clone()), 0
    for step, count in enumerate((3, 8, 0, 5, 21)):
        batch = torch.arange(count * 2).float().reshape(count, 2) + 100 * step
        queue.push(batch)
        for feature in batch:
            slow[position] = feature
            position = (position + 1) % size
        assert torch.equal(queue.features, torch.stack(slow, dim=1))
        assert queue.pointer == position


def test_an_empty_queue_stays_empty() -> None:
    queue = FeatureQueue(2, 0, seed=0)
    queue.push(torch.ones(3, 2))
    assert queue.features.shape == (2, 0)


def test_state_goes_round_and_is_strict() -> None:
    queue = FeatureQueue(2, 5, seed=0)
    queue.push(torch.ones(3, 2))
    state = {name: value.clone() for name, value in queue.state().items()}
    other = FeatureQueue(2, 5, seed=1)
    other.load_state(**state)
    assert torch.equal(other.features, queue.features)
    assert other.pointer == 3
    with pytest.raises(ValueError, match=r"expected \(2, 5\)"):
        other.load_state(torch.zeros(2, 6), state["pointer"])
    with pytest.raises(ValueError, match="pointer"):
        other.load_state(state["features"], torch.tensor([5]))


@pytest.mark.parametrize("size", [0, 1, 3, 7, 20])
def test_ids_go_where_their_features_go(size: int) -> None:
    features, ids = FeatureQueue(1, size, seed=0), IdQueue(size)
    features.features.fill_(EMPTY)
    for step, count in enumerate((3, 8, 0, 5, 21)):
        batch = torch.arange(count) + 100 * step
        features.push(batch[:, None].float())
        ids.push(batch)
        assert torch.equal(ids.ids, features.features[0].long())
        assert ids.pointer == features.pointer


def test_ids_start_empty_go_round_and_are_strict() -> None:
    queue = IdQueue(5)
    assert queue.ids.tolist() == [EMPTY] * 5
    queue.push(torch.tensor([4, 2]))
    state = {name: value.clone() for name, value in queue.state().items()}
    other = IdQueue(5)
    other.load_state(**state)
    assert other.ids.tolist() == [4, 2, EMPTY, EMPTY, EMPTY]
    assert other.pointer == 2
    with pytest.raises(ValueError, match=r"expected \(5,\)"):
        other.load_state(torch.zeros(6), state["pointer"])
    with pytest.raises(ValueError, match="pointer"):
        other.load_state(state["ids"], torch.tensor([5]))
