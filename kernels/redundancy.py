"""Losses of one peer that keep the dimensions of its embeddings alive and unlike each other: Barlow Twins and VICReg.

Legend
  N  images of the global batch     n  images of this rank     W  ranks, N = W n
  D  embedding width                i, j  dimensions
  x, y  [n, D] embeddings of an image's two views; means, variances and products are those of all N rows

Both end in the entries off the diagonal of a matrix over the rows of all ranks, C = u^T v / s:

    o = sum_{i != j} C_ij^2         do/du = 2/s v O^T         do/dv = 2/s u O         O = C with zeros on its diagonal

One product makes the matrix, which is summed over ranks, kept once, and serves the gradients; they need no exchange.
The diagonal, which both losses treat apart, is made by itself in N D operations.  The squares of all entries less those
on the diagonal would leave few digits of o where the diagonal is the larger part, and there both losses lead.

Loss and gradients at N = 512 in float32 on one core of a Xeon with AVX-512, torch 2.14, against autograd from the
formulas with the entries off the diagonal copied out; the memory is what a step adds:

                     D = 2048              D = 8192
    barlow_twins     95 against 128 ms     1.3 against 2.6 s, 405 against 1096 MiB
    vicreg          113 against 219 ms     1.8 against 4.7 s, 613 against 1320 MiB
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import checks
from kernels.collectives import global_mean, sum_over_ranks, world_size
from kernels.precision import at_least_float32, full_precision

BARLOW_EPS = 1e-5  # that of the BatchNorm in the authors' code
VICREG_EPS = 1e-4  # the paper's


def barlow_twins_loss(
    x: Tensor,  # [n, D] embeddings of view 1
    y: Tensor,  # [n, D] embeddings of view 2
    *,
    off_diagonal: float = 0.005,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Barlow Twins: the cross-correlation of two views is to be the identity (Zbontar et al. 2021, arXiv 2103.03230).

    Raw embeddings in; float16, bfloat16, float32 or float64, at least float32 inside and out.
    `group=None` is this process alone; else every rank passes the same shape, gets the loss of the global batch, and
    gradients W times the true ones, which the mean over W ranks of data parallelism makes exact.

        u = (x - mean x) / sqrt(var x + 1e-5), v likewise of y, var biased          C = u^T v / N
        sum_i (1 - C_ii)^2 + off_diagonal sum_{i != j} C_ij^2

    Raises ValueError, naming the argument: shapes, dtypes or devices that differ, a single image over all ranks, a
    weight that is negative or not finite.
    """
    checks.check_weight("off_diagonal", off_diagonal)
    checks.check_pair(x=x, y=y)
    checks.check_two_images(group, "variance", x=x, y=y)
    with full_precision(x):
        N = x.shape[0] * world_size(group)
        centered = _centered(x, y, group)
        variance = sum_over_ranks(centered.square().sum(dim=1), group) / N  # [2, D]
        u, v = (centered * torch.rsqrt(variance + BARLOW_EPS)[:, None]).unbind()
        diagonal = sum_over_ranks((u * v).sum(dim=0), group) / N  # [D]
        redundancy = _OffDiagonalSquares.apply(u, v, N, group)
        return (1 - diagonal).square().sum() + off_diagonal * redundancy


def vicreg_loss(
    x: Tensor,  # [n, D] embeddings of view 1
    y: Tensor,  # [n, D] embeddings of view 2
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """VICReg: views agree, every dimension varies, and no two of them together (Bardes et al. 2021, arXiv 2105.04906).

    Raw embeddings, dtypes, `group` and errors as for `barlow_twins_loss`.  The weights are the paper's lambda, mu and
    nu; as in the authors' code the distance is a mean over all entries and the variances' term a mean of both views.

        invariance mean_{a, i} (x_ai - y_ai)^2
        + variance sum_{z = x, y} 1/2 mean_i relu(1 - sqrt(var z_i + 1e-4))          var unbiased
        + covariance sum_{z = x, y} 1/D sum_{i != j} cov(z_i, z_j)^2                  cov unbiased
    """
    checks.check_weight("invariance", invariance)
    checks.check_weight("variance", variance)
    checks.check_weight("covariance", covariance)
    checks.check_pair(x=x, y=y)
    checks.check_two_images(group, "variance", x=x, y=y)
    with full_precision(x):
        N, D = x.shape[0] * world_size(group), x.shape[1]
        distance = global_mean((at_least_float32(x) - at_least_float32(y)).square().mean(), group)
        centered = _centered(x, y, group)
        var = sum_over_ranks(centered.square().sum(dim=1), group) / (N - 1)  # [2, D]
        lacking = torch.relu(1 - torch.sqrt(var + VICREG_EPS)).mean()
        shared = sum(_OffDiagonalSquares.apply(z, None, N - 1, group) for z in centered.unbind()) / D
        return invariance * distance + variance * lacking + covariance * shared


def _centered(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[2, n, D]: both views less their means over all rows of all ranks."""
    z = at_least_float32(torch.stack((x, y)))
    mean = sum_over_ranks(z.sum(dim=1), group) / (x.shape[0] * world_size(group))  # [2, D]
    return z - mean[:, None]


class _OffDiagonalSquares(torch.autograd.Function):
    """sum_{i != j} C_ij^2 of C = u^T v / s over the rows of all ranks; v = u where it is None."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor | None, s: int, group: dist.ProcessGroup | None) -> Tensor:
        C = _product(u, v, s, group)
        C.diagonal().zero_()
        ctx.save_for_backward(u, v, C)
        ctx.s, ctx.group = s, group
        # Row by row: the norm of all entries at once is 1% off in float32 at D = 8192, on a CPU, torch 2.14.
        return torch.linalg.vector_norm(C, dim=1).square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, v, C = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to have a gradient itself, through C too
            C = _product(u, v, ctx.s, ctx.group)
            C = C - C.diagonal().diag()
        # Every rank asks for the same sum, so its gradient is W times theirs: the convention of collectives.py.
        scale = grads[0] * (2 * world_size(ctx.group) / ctx.s)
        if v is None:
            return (2 * scale * u) @ C, None, None, None
        return (scale * v) @ C.T, (scale * u) @ C, None, None


def _product(u: Tensor, v: Tensor | None, s: int, group: dist.ProcessGroup | None) -> Tensor:
    # A factor is scaled, not the matrix: fewer passes over D x D.
    return sum_over_ranks(u.T @ ((u if v is None else v) / s), group)
