"""Quality of frozen features: weighted k-nearest neighbours.

Legend
  B  images of the bank      Q  query images      F  feature width      C  classes
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from engine.config import KnnConfig
from engine.data.augment import AugmentPolicy
from engine.data.catalog import open_split
from engine.data.dataset import ImageDataset
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import plain_images
from engine.data_config import DataConfig
from engine.distributed import Ranks
from kernels.collectives import gather_rows

QUERY_CHUNK = 1024  # queries at once: 1,024 x 50,000 cosines are 200 MB
UNREADABLE = -1  # label of a row whose image cannot be read: it stays out of the score
FEATURE_BATCH = 512  # images of a forward pass


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,  # [B, F] features
    bank_labels: Tensor,  # [B] int64
    queries: Tensor,  # [Q, F]
    query_labels: Tensor,  # [Q] int64
    *,
    k: int,
    tau: float,
) -> float:
    """Share of queries whose k nearest bank features (cosine) elect their label, each voting with exp(cosine / tau).

    Wu et al. 2018, arXiv 1805.01978.  k is cut to B.
    """
    bank = torch.nn.functional.normalize(bank.float(), dim=1)
    queries = torch.nn.functional.normalize(queries.float(), dim=1)
    classes = int(torch.cat((bank_labels, query_labels)).max()) + 1
    right = 0
    for chunk, labels in zip(queries.split(QUERY_CHUNK), query_labels.split(QUERY_CHUNK), strict=True):
        cosine, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        # minus 1: the largest exponent is 0 whatever tau
        votes.scatter_add_(1, bank_labels[nearest], ((cosine - 1) / tau).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(queries)


class KnnProbe:
    """kNN accuracy of an encoder on a data set, the work shared by the ranks; None where there are no labels."""

    def __init__(
        self,
        data: DataConfig,
        cfg: KnnConfig,
        policy: AugmentPolicy,
        *,
        workers: int,
        ranks: Ranks,
        skipped: SkippedImages,
    ) -> None:
        self.cfg, self.policy, self.workers, self.ranks, self.skipped = cfg, policy, workers, ranks, skipped
        self.bank = open_split(data, "bank")
        self.queries = open_split(data, "test")

    def accuracy(self, features: Callable[[Tensor], Tensor]) -> float | None:
        """`features` maps images [c, 3, S, S] to [c, F]; the same accuracy on every rank.  Called by all ranks."""
        if self.bank is None or self.queries is None:
            return None
        bank = self._features(self.bank, features, self.cfg.bank)
        queries = self._features(self.queries, features, None)
        return knn_accuracy(*bank, *queries, k=self.cfg.k, tau=self.cfg.tau)

    def _features(
        self, dataset: ImageDataset, features: Callable[[Tensor], Tensor], at_most: int | None
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of a data set, or of `at_most` evenly spaced images of it, on every rank."""
        assert dataset.labels is not None
        count = min(len(dataset), at_most or len(dataset))
        picked = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
        own = _even_share(picked, self.ranks)
        parts, read = [], []
        for images, index in plain_images(
            dataset, own, size=self.policy.size, statistics=self.policy.statistics,
            batch_size=FEATURE_BATCH, workers=self.workers, ranks=self.ranks, skipped=self.skipped,
        ):  # fmt: skip
            parts.append(features(images))
            read.append(index)
        labels = torch.from_numpy(np.where(own == torch.cat(read).numpy(), dataset.labels[own], UNREADABLE))
        every, every_label = (
            _gathered(rows, self.ranks.group) for rows in (torch.cat(parts), labels.to(self.ranks.device))
        )
        # Rows stand rank by rank, padded; the padding is at the end of the last ranks.
        keep = (torch.arange(len(every), device=every.device) < count) & (every_label != UNREADABLE)
        return every[keep], every_label[keep]


def _even_share(indices: NDArray[np.int64], ranks: Ranks) -> NDArray[np.int64]:
    """This rank's contiguous share; the last image is repeated so that every rank has as many (ZeRO 3 needs that)."""
    share = -(-len(indices) // ranks.world)
    padded = np.concatenate((indices, np.repeat(indices[-1:], share * ranks.world - len(indices))))
    return padded[ranks.rank * share : (ranks.rank + 1) * share]


@torch.no_grad()
def _gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return gather_rows(rows, group)
