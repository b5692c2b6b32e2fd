"""Quality of frozen features: weighted k-nearest neighbours.

Legend
  B  images of the bank      Q  query images      F  feature width      C  classes
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import KnnConfig
from engine.data.catalog import open_split
from engine.data_config import DataConfig
from engine.features import Encode, Reader

QUERY_CHUNK = 1024  # queries at once: 1,024 x 50,000 cosines are 200 MB


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
        # Minus the nearest's: the largest exponent is 0 whatever tau.
        votes.scatter_add_(1, bank_labels[nearest], ((cosine - cosine[:, :1]) / tau).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(queries)


class KnnProbe:
    """kNN accuracy of an encoder on a data set, the work shared by the ranks; None where there are no labels."""

    def __init__(self, data: DataConfig, cfg: KnnConfig, reader: Reader) -> None:
        self.cfg, self.reader = cfg, reader
        self.bank = open_split(data, "bank")
        self.queries = open_split(data, "test")

    def accuracy(self, features: Encode, reader: Reader | None = None) -> float | None:
        """`features` maps images [c, 3, S, S] to [c, F]; the same accuracy on every rank.  Called by all ranks.

        `reader`: of images as this encoder has them, where they are not the run's.
        """
        if self.bank is None or self.queries is None:
            return None
        reader = reader or self.reader
        bank = reader.labelled(self.bank, features, self.cfg.bank)
        queries = reader.labelled(self.queries, features)
        return knn_accuracy(
            bank.features, bank.labels, queries.features, queries.labels, k=self.cfg.k, tau=self.cfg.tau
        )
