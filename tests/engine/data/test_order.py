"""The order of images: a function of seed and step, every image once an epoch, shared by ranks."""

import dataclasses

import numpy as np
import pytest

from engine.config import ConfigError
from engine.data.dataset import ArrayDataset, DataError
from engine.data.order import BatchOrder


def images(n=37) -> ArrayDataset:
    return ArrayDataset("random", np.zeros((n, 2, 2, 3), np.uint8), None)


def order(ranks, n=37, **changes) -> BatchOrder:
    return BatchOrder(images(n), **{"batch_size": 10, "seed": 1, "ranks": ranks, **changes})


def steps(one: BatchOrder, count: int) -> np.ndarray:
    return np.concatenate([one.indices(step) for step in range(count)])


def test_an_epoch_holds_every_image_once_but_the_incomplete_batch(alone):
    small = order(alone)
    assert (small.steps_per_epoch, small.images, small.rows) == (3, 37, 10)
    epochs = steps(small, 6).reshape(2, 30)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 30
    assert epochs[0].tolist() != epochs[1].tolist()
    assert [small.epoch(step) for step in (0, 2, 3, 6)] == [0, 0, 1, 2]


def test_the_last_batch_is_filled_with_the_epochs_first_images(alone):
    filled = order(alone, last_batch="fill")
    assert filled.steps_per_epoch == 4
    for epoch in steps(filled, 8).reshape(2, 40):
        assert sorted(set(epoch.tolist())) == list(range(37))
        assert epoch[37:].tolist() == epoch[:3].tolist()
    np.testing.assert_array_equal(steps(order(alone, n=40, last_batch="fill"), 8), steps(order(alone, n=40), 8))


@pytest.mark.parametrize("last_batch", ["drop", "fill"])
@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_batch_of_one(alone, world, last_batch):
    parts = [order(dataclasses.replace(alone, rank=r, world=world), last_batch=last_batch) for r in range(world)]
    whole = order(alone, last_batch=last_batch)
    for step in range(9):
        np.testing.assert_array_equal(np.concatenate([part.indices(step) for part in parts]), whole.indices(step))


def test_rows_of_a_step_by_parts(alone):
    one = order(alone)
    np.testing.assert_array_equal(np.concatenate([one.indices(4, 0, 7), one.indices(4, 7, 14)]), one.indices(4))


def test_seeds_differ(alone):
    assert steps(order(alone), 3).tolist() != steps(order(alone, seed=2), 3).tolist()


def test_too_few_images_and_ranks_that_do_not_divide(alone):
    with pytest.raises(DataError, match="data.batch_size: 38 is more than the 37 readable images of random"):
        order(alone, batch_size=38)
    with pytest.raises(ConfigError, match="data.batch_size: 10 does not divide by 3 ranks"):
        order(dataclasses.replace(alone, world=3))
