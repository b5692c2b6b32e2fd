"""What people called the images of CIFAR-10, right or wrong: labels with the mistakes that people make."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.arrays import read_npz
from engine.data.dataset import DataError

CLASSES = 10

# Key in the file by kind: the majority of three people; each of the three; a wrong one of theirs where there is any.
KINDS = {
    "aggre": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "worse": "worse_label",
}


def cifar10n(file: Path, kind: str, clean: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels of CIFAR-10N (Wei et al. 2022, arXiv 2110.12088) for the training images of CIFAR-10, 0..9 [N].

    Args:
        file: an .npz archive of the published labels: `clean_label` and the kinds, integers [N].
        kind: a key of KINDS; 9.0 % of `aggre` are wrong, 17 to 18 % of each `random`, 40.2 % of `worse`.
        clean: the labels of CIFAR-10 [N], in the order of the images.

    Raises:
        DataError: unknown kind; the file cannot be read, lacks a key, or is about other images or another order.
    """
    if kind not in KINDS:
        raise DataError(f"{file}: has no labels of the kind {kind!r}; give one of {', '.join(KINDS)}")
    keys = ("clean_label", KINDS[kind])
    own, given = (_labels(file, key, array, len(clean)) for key, array in zip(keys, read_npz(file, *keys), strict=True))
    other = np.flatnonzero(own != clean)
    if len(other):
        i = other[0]
        raise DataError(
            f"{file}: `clean_label` differs from the labels of {len(other)} of {len(clean)} images (of the first, {i}: "
            f"{own[i]}, not {clean[i]}), so these stand in another order; give the training images of CIFAR-10 in "
            "theirs, as cifar10 does"
        )
    return given


def _labels(file: Path, key: str, array: np.ndarray, count: int) -> NDArray[np.int64]:
    if (
        array.shape != (count,)
        or not np.issubdtype(array.dtype, np.integer)
        or not np.isin(array, range(CLASSES)).all()
    ):
        found = f"{array.dtype} {list(array.shape)}"
        if array.size and np.issubdtype(array.dtype, np.integer):
            found += f" from {array.min()} to {array.max()}"
        raise DataError(
            f"{file}: `{key}` is {found} for {count} images; give integers from 0 to {CLASSES - 1}, one an image, as "
            "published"
        )
    return array.astype(np.int64)
