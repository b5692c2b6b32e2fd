"""Losses of peers that distil each other, over the batch of all ranks; an optimizer and augmentations for them.

ntxent_loss               the contrastive loss of one peer
mutual_loss               both peers: NT-Xent and the KL between their similarity distributions, in one call
similarity_kl             the two KL terms alone
similarity_distillation   terms between any number of networks: other divergences, rows, and several teachers
graph_alignment           alignment of the graphs that embeddings span (EGA)
gather_views              starts the exchange of one peer's embeddings ahead of `mutual_loss`
Lars                      the optimizer of large batches, over all tensors at once
augment_views             random views of decoded images on a CPU, all in one call
"""

from kernels.augment import augment_views
from kernels.distill import Distilled, similarity_distillation
from kernels.graph import graph_alignment
from kernels.lars import Lars
from kernels.mutual import (
    GatheredViews,
    MutualLoss,
    SimilarityKL,
    gather_views,
    mutual_loss,
    ntxent_loss,
    similarity_kl,
)

__all__ = [
    "Distilled",
    "GatheredViews",
    "Lars",
    "MutualLoss",
    "SimilarityKL",
    "augment_views",
    "gather_views",
    "graph_alignment",
    "mutual_loss",
    "ntxent_loss",
    "similarity_distillation",
    "similarity_kl",
]
