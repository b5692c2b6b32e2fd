"""Labels to train probes on: fewer of them, or some made wrong; a function of the seed, on any machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.dataset import DataError

Labels = NDArray[np.int64]  # [n]


def class_balanced(labels: Labels, share: float, rng: np.random.Generator) -> Labels:
    """Places of `share` of every class's images, at random, in ascending order.

    Raises DataError: less than two images of some class would stay, one to train on and one held out.
    """
    picked = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(share * len(members))
        if count < 2:
            raise DataError(
                f"few.shares: {share:g} of the {len(members)} images of class {label} are {count}; two are the least"
            )
        picked.append(rng.choice(members, count, replace=False))
    return np.sort(np.concatenate(picked))


def symmetric_noise(labels: Labels, rate: float, classes: int, rng: np.random.Generator) -> Labels:
    """`rate` of every class's labels become another class, all equally likely; so many to the image, not on average.

    The true class is no choice, as in most of the literature; DoGo's authors draw among all classes, where fewer labels
    become wrong, rate (C - 1) / C.
    """
    noisy, places = labels.copy(), _places(labels, rate, rng)
    noisy[places] = (labels[places] + rng.integers(1, classes, len(places))) % classes
    return noisy


def pairflip_noise(labels: Labels, rate: float, classes: int, rng: np.random.Generator) -> Labels:
    """`rate` of every class's labels become the next class, the last one's the first.

    Han et al. 2018, arXiv 1804.06872.
    """
    noisy, places = labels.copy(), _places(labels, rate, rng)
    noisy[places] = (labels[places] + 1) % classes
    return noisy


def _places(labels: Labels, rate: float, rng: np.random.Generator) -> Labels:
    """Places of `rate` of every class's images."""
    picked = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        picked.append(rng.choice(members, round(rate * len(members)), replace=False))
    return np.concatenate(picked)
