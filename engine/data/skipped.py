"""Images that cannot be read: what takes their places, the same in every loader, and who hears of them.

A batch is as large on every rank as it should be, so the place of an unreadable image goes to another one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from engine.data.dataset import DataError, ImageDataset, UnreadableImage
from engine.distributed import Ranks, gather_objects

log = logging.getLogger(__name__)

T = TypeVar("T")


def readable(dataset: ImageDataset, index: int, read: Callable[[int], T]) -> tuple[T, int]:
    """What `read` makes of an index, and the index; an unreadable image gives its place to another, always the same.

    Raises DataError where the whole data set is unreadable.
    """
    n = len(dataset)
    for candidate in ((index + k * _stride(n)) % n for k in range(n)):
        try:
            return read(candidate), candidate
        except UnreadableImage:
            continue
    raise DataError(f"{dataset.name}: none of its {n} images can be read, as {dataset.describe(index)}")


@lru_cache(maxsize=4)
def _stride(n: int) -> int:
    """Steps of this size visit all of n, and leave at once a neighbourhood that is damaged as a whole."""
    stride = max(1, int(n * 0.618))
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


class SkippedImages:
    """Unreadable images met so far by any loader, with the reason: counted, and reported once over all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, dataset: ImageDataset, wanted: Tensor, read: Tensor) -> None:
        """Takes down the indices that others stand in for; local to this rank until `share`."""
        for index in wanted[wanted != read].tolist():
            name = dataset.describe(index)
            if name not in self._known and name not in self._new:
                self._new[name] = _reason(dataset, index)

    def share(self) -> None:
        """Brings the ranks to one list, and rank 0 reports what is new; called by all ranks together."""
        for found in gather_objects(self._ranks, self._new):
            for name, reason in found.items():
                if name not in self._known:
                    self._known[name] = reason
                    if self._ranks.is_first:
                        log.warning("skipped %s", reason)
        self._new = {}


def _reason(dataset: ImageDataset, index: int) -> str:
    try:
        dataset.image(index)
    except UnreadableImage as error:
        return str(error)
    return f"{dataset.describe(index)} (readable again now)"
