"""Sets of labels: how many of every class are kept or become wrong, what they become, and that the seed decides."""

from collections import Counter

import numpy as np
import pytest

from engine.data.dataset import DataError
from engine.label_sets import class_balanced, pairflip_noise, symmetric_noise

SIZES = (100, 37, 8, 211)  # images of each class
C = len(SIZES)


@pytest.fixture
def labels() -> np.ndarray:
    found = np.repeat(np.arange(C), SIZES)
    np.random.default_rng(7).shuffle(found)
    return found


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.25, (25, 9, 2, 53)), (0.5, (50, 18, 4, 106)), (0.9, (90, 33, 7, 190)), (1.0, SIZES)]
)
def test_a_share_of_every_class_is_kept(labels, share, counts):
    before = labels.copy()
    places = class_balanced(labels, share, rng())
    assert Counter(labels[places].tolist()) == dict(enumerate(counts))
    assert (np.diff(places) > 0).all(), "ascending, none twice"
    assert np.array_equal(places, class_balanced(labels, share, rng())) and np.array_equal(labels, before)
    if share < 1:
        assert not np.array_equal(places, class_balanced(labels, share, rng(1)))


def test_every_image_is_as_likely_to_be_kept():
    labels = np.repeat([0, 1], [10, 30])
    kept = np.zeros(40)
    for seed in range(1000):
        kept[class_balanced(labels, 0.2, rng(seed))] += 1
    # 200 times of 1,000, with a standard deviation of 12.6
    assert kept.min() > 150 and kept.max() < 250


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.05, "few.shares: 0.05 of the 8 images of class 2 are 0; two are the least"),  # two of class 1 are enough
        (0.04, "few.shares: 0.04 of the 37 images of class 1 are 1; two are the least"),
        (0.001, "few.shares: 0.001 of the 100 images of class 0 are 0; two are the least"),
        (0.1, "few.shares: 0.1 of the 8 images of class 2 are 1; two are the least"),
    ],
)
def test_too_few_of_a_class_are_an_error(labels, share, message):
    with pytest.raises(DataError) as error:
        class_balanced(labels, share, rng())
    assert str(error.value) == message


@pytest.mark.parametrize("noise", [symmetric_noise, pairflip_noise])
@pytest.mark.parametrize(("rate", "counts"), [(0.2, (20, 7, 2, 42)), (0.4, (40, 15, 3, 84)), (0.8, (80, 30, 6, 169))])
def test_a_share_of_every_class_becomes_wrong(labels, noise, rate, counts):
    before = labels.copy()
    noisy = noise(labels, rate, C, rng())
    assert np.array_equal(labels, before) and noisy is not labels
    assert noisy.dtype == labels.dtype and set(noisy) <= set(range(C))
    assert Counter(labels[noisy != labels].tolist()) == dict(enumerate(counts))
    assert np.array_equal(noisy, noise(labels, rate, C, rng()))
    other = noise(labels, rate, C, rng(1))
    assert not np.array_equal(noisy != labels, other != labels), "another seed, other images"


def test_symmetric_noise_reaches_every_other_class_alike():
    classes, n, rate = 10, 20_000, 0.6
    labels = np.arange(n) % classes
    noisy = symmetric_noise(labels, rate, classes, rng())
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, noisy), 1)
    assert np.diag(table).tolist() == [800] * classes
    expected = 1200 / 9
    others = table[~np.eye(classes, dtype=bool)]
    chi_square = ((others - expected) ** 2 / expected).sum()
    freedom = classes * (classes - 2)  # 9 counts a class, with a fixed sum
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_symmetric_noise_makes_classes_that_no_image_has():
    """Training images may lack a class that test images have."""
    noisy = symmetric_noise(np.zeros(3000, np.int64), 0.5, 4, rng())
    assert Counter(noisy.tolist())[0] == 1500
    assert all(400 < Counter(noisy.tolist())[label] < 600 for label in (1, 2, 3))  # 500, with a deviation of 18


def test_pairflip_is_the_next_class_and_the_last_ones_the_first(labels):
    noisy = pairflip_noise(labels, 0.4, C, rng())
    pairs = set(zip(labels[noisy != labels].tolist(), noisy[noisy != labels].tolist(), strict=True))
    assert pairs == {(0, 1), (1, 2), (2, 3), (3, 0)}
    gaps = pairflip_noise(np.repeat([0, 4], 50), 0.2, 6, rng())
    assert Counter(gaps.tolist()) == {0: 40, 1: 10, 4: 40, 5: 10}, "of all classes, not of those that there are"
