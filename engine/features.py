"""Features of whole data sets: every image once through an encoder in evaluation mode, the work shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from engine.data.dataset import ImageDataset
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import plain_images
from engine.distributed import Ranks
from kernels.collectives import gather_rows

UNREADABLE = -1  # label of a row whose image cannot be read: it is left out
FEATURE_BATCH = 512  # images of a forward pass

Encode = Callable[[Tensor], Tensor]  # images [c, 3, S, S] -> features [c, F]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of a channel, values in [0, 1]


class Labelled(NamedTuple):
    """Features of a labelled data set, but for images that cannot be read."""

    features: Tensor  # [n, F]
    labels: Tensor  # [n] int64
    place: Tensor  # [n] int64, on the CPU: the image's place in the data set

    def at(self, places: Tensor) -> Labelled:
        """The rows at some places [k] (int64 or bool), on the CPU."""
        there = places.to(self.labels.device)
        return Labelled(self.features[there], self.labels[there], self.place[places])


class Reader(NamedTuple):
    """How images come to an encoder, and who shares the work."""

    size: int  # S
    statistics: Statistics
    workers: int
    ranks: Ranks
    skipped: SkippedImages

    def labelled(self, dataset: ImageDataset, encode: Encode, at_most: int | None = None) -> Labelled:
        """Features of a labelled data set, or of `at_most` evenly spaced images of it, the same on every rank."""
        assert dataset.labels is not None
        picked = evenly_spaced(len(dataset), at_most or len(dataset))
        count = len(picked)
        own = _even_share(picked, self.ranks)
        parts = list(self._encoded(dataset, own, encode))
        features, read = torch.cat([part for part, _ in parts]), torch.cat([index for _, index in parts]).numpy()
        labels = torch.from_numpy(np.where(own == read, dataset.labels[own], UNREADABLE))
        group, device = self.ranks.group, self.ranks.device
        every, every_label = _gathered(features, group), _gathered(labels.to(device), group)
        # Rows stand rank by rank, padded; the padding is at the end of the last ranks.
        keep = (torch.arange(len(every), device=device) < count) & (every_label != UNREADABLE)
        return Labelled(every[keep], every_label[keep], torch.from_numpy(picked)[keep[:count].cpu()])

    def every(self, dataset: ImageDataset, encode: Encode, done: Callable[[int], Any] = lambda images: None) -> Tensor:
        """Features [len(dataset), F] of all images, on the CPU, the same on every rank; the row of an image that cannot
        be read is another's.  `done` is told how many images of this rank were encoded.
        """
        own, world = _even_share(np.arange(len(dataset)), self.ranks), self.ranks.world
        bank, begin = torch.empty(0), 0
        for features, _ in self._encoded(dataset, own, encode):
            # A part at a time: of a large data set they would fill a GPU.
            everyone = _gathered(features, self.ranks.group).cpu().unflatten(0, (world, -1))  # [W, c, F]
            if begin == 0:
                bank = everyone.new_empty((world, len(own), everyone.shape[2]))
            bank[:, begin : begin + len(features)] = everyone
            begin += len(features)
            done(len(features))
        return bank.flatten(0, 1)[: len(dataset)]

    def _encoded(
        self, dataset: ImageDataset, own: NDArray[np.int64], encode: Encode
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [c, F] of this rank's images, and which images were read [c], in parts."""
        for images, index in plain_images(
            dataset, own, size=self.size, statistics=self.statistics,
            batch_size=FEATURE_BATCH, workers=self.workers, ranks=self.ranks, skipped=self.skipped,
        ):  # fmt: skip
            yield encode(images), index


def evenly_spaced(n: int, at_most: int) -> NDArray[np.int64]:
    """`at_most` of the places 0 ... n - 1, the first and the last among them; all where n is no more."""
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)


def _even_share(indices: NDArray[np.int64], ranks: Ranks) -> NDArray[np.int64]:
    """This rank's contiguous share; the last image is repeated so that every rank has as many (ZeRO 3 needs that)."""
    share = -(-len(indices) // ranks.world)
    padded = np.concatenate((indices, np.repeat(indices[-1:], share * ranks.world - len(indices))))
    return padded[ranks.rank * share : (ranks.rank + 1) * share]


@torch.no_grad()
def _gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return gather_rows(rows, group)
