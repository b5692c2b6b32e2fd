"""Which images make which batch: a function of seed and step, the same for every loader, on any number of ranks.

Legend
  N  images of the global batch      n  images of this rank      V  views of an image      S  side in pixels
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.data.augment import permutation
from engine.data.dataset import DataError, ImageDataset
from engine.distributed import Ranks, rows_per_rank


class Batch(NamedTuple):
    """One step's share of this rank."""

    step: int
    views: list[Tensor]  # V tensors [n, 3, S, S], normalised, channels_last strides, on the device
    indices: Tensor  # [n] images in the data set, on the CPU


class BatchOrder:
    """The batches of endless epochs, each a permutation of all images.

    Args:
        dataset: what is drawn from.
        batch_size: N.
        seed: of the permutations.
        ranks: share a batch in contiguous rows.
        last_batch: what becomes of the images that make no whole batch at the end of an epoch; drop: nothing; fill:
            they come, with the epoch's first images to fill the batch.

    Raises DataError: fewer images than one global batch.  ConfigError: a batch that does not divide by the ranks.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        last_batch: Literal["drop", "fill"] = "drop",
    ) -> None:
        if len(dataset) < batch_size:
            raise DataError(
                f"data.batch_size: {batch_size} is more than the {len(dataset)} readable images of {dataset.name}; "
                "use a smaller batch or more images"
            )
        self.images, self.batch_size, self.seed = len(dataset), batch_size, seed
        self.rows = rows_per_rank(batch_size, ranks)  # n
        self._first_row = ranks.rank * self.rows
        whole, left = divmod(self.images, batch_size)
        self.steps_per_epoch = whole + (left > 0 and last_batch == "fill")

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """The images of this rank's rows `start` to `stop` in a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size + self._first_row
        rows = np.arange(first + start, first + (self.rows if stop is None else min(stop, self.rows)))
        return _epoch_order(self.seed, epoch, self.images)[rows % self.images]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n)
