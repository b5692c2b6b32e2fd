"""Losses of peers that distil each other, over the batch of all ranks; an optimizer and augmentations for them.

ntxent_loss               the contrastive loss of one peer: SimCLR's
simsiam_loss              SimSiam: each view predicts the other's projection
byol_loss                 BYOL: each view predicts the other's projection by a target network
moco_loss                 MoCo v2: contrastive against a queue of earlier keys
enqueue, new_queue        the queue
barlow_twins_loss         Barlow Twins: the cross-correlation of two views is to be the identity
vicreg_loss               VICReg: variance, invariance, covariance
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
from kernels.moco import enqueue, moco_loss, new_queue
from kernels.mutual import (
    GatheredViews,
    MutualLoss,
    SimilarityKL,
    gather_views,
    mutual_loss,
    ntxent_loss,
    similarity_kl,
)
from kernels.predictive import byol_loss, simsiam_loss
from kernels.redundancy import barlow_twins_loss, vicreg_loss

__all__ = [
    "Distilled",
    "GatheredViews",
    "Lars",
    "MutualLoss",
    "SimilarityKL",
    "augment_views",
    "barlow_twins_loss",
    "byol_loss",
    "enqueue",
    "gather_views",
    "graph_alignment",
    "moco_loss",
    "mutual_loss",
    "new_queue",
    "ntxent_loss",
    "similarity_distillation",
    "similarity_kl",
    "simsiam_loss",
    "vicreg_loss",
]
