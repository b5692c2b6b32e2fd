"""Losses of one peer that predict the other view's embedding and need no negatives: SimSiam and BYOL.

Legend
  N  images of the global batch     n  images of this rank     D  embedding width     sg  stop-gradient
  p_x, p_y  outputs of the predictor for an image's two views
  z_x, z_y  what they are compared with: SimSiam's own projections, or those of BYOL's target network (t_x, t_y)

    cos(p, z) = p.z / (|p| |z|)                     c = mean_i cos(p_x_i, sg z_y_i) + mean_i cos(p_y_i, sg z_x_i)

    simsiam = -c / 2                                byol = 4 - 2 c, the sum over both views of mean_i |p/|p| - t/|t||^2
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from kernels import checks
from kernels.collectives import global_mean
from kernels.precision import full_precision, unit_rows


def simsiam_loss(
    p_x: Tensor,  # [n, D] predictions of view 1
    p_y: Tensor,  # [n, D] predictions of view 2
    z_x: Tensor,  # [n, D] projections of view 1
    z_y: Tensor,  # [n, D] projections of view 2
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SimSiam's negative cosine, each view predicting the other one's projection (Chen & He 2020, arXiv 2011.10566).

    Raw embeddings in, normalised inside; the projections are constants.  float16, bfloat16, float32 or float64, at
    least float32 inside and out; predictions and projections may differ in dtype.  A single image will do.
    `group=None` is this process alone; else every rank passes the same shape, gets the loss of the global batch, and
    gradients W times the true ones, which the mean over W ranks of data parallelism makes exact.

        -1/2 [ mean_i cos(p_x_i, sg z_y_i) + mean_i cos(p_y_i, sg z_x_i) ]

    Raises ValueError, naming the argument: shapes or devices that differ, dtypes that differ between two views or are
    no floating point, an empty batch.
    """
    checks.check_pair(p_x=p_x, p_y=p_y)
    checks.check_targets(p_x=p_x, z_x=z_x, z_y=z_y)
    with full_precision(p_x):
        return global_mean(-0.5 * _cosines(p_x, p_y, z_x, z_y), group)


def byol_loss(
    p_x: Tensor,  # [n, D] predictions of view 1
    p_y: Tensor,  # [n, D] predictions of view 2
    t_x: Tensor,  # [n, D] projections of view 1 by the target network
    t_y: Tensor,  # [n, D] projections of view 2 by the target network
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """BYOL's squared distance of unit vectors, over both views (Grill et al. 2020, arXiv 2006.07733).

    Embeddings, dtypes, `group` and errors as for `simsiam_loss`; the target network's projections are constants.

        mean_i [2 - 2 cos(p_x_i, sg t_y_i)] + mean_i [2 - 2 cos(p_y_i, sg t_x_i)]
    """
    checks.check_pair(p_x=p_x, p_y=p_y)
    checks.check_targets(p_x=p_x, t_x=t_x, t_y=t_y)
    with full_precision(p_x):
        return global_mean(4 - 2 * _cosines(p_x, p_y, t_x, t_y), group)


def _cosines(p_x: Tensor, p_y: Tensor, z_x: Tensor, z_y: Tensor) -> Tensor:
    """The mean cosine of each view's predictions with the other's projections, summed over the two views."""
    x = unit_rows(p_x) * unit_rows(z_y.detach())
    y = unit_rows(p_y) * unit_rows(z_x.detach())
    return (x.sum(dim=1) + y.sum(dim=1)).mean()
