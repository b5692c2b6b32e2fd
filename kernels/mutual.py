"""Public losses of two peers: argument checks, and the batch of all ranks.

The maths stands in reference.py, what the backends are in backends.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import checks, mutual_native, reference
from kernels.backends import HAS_TRITON, choose_backend
from kernels.collectives import gather_rows, global_mean, mean_over_ranks, rank_in, with_value, world_size
from kernels.precision import full_precision, unit_rows

if HAS_TRITON:
    from kernels import mutual_triton


class MutualLoss(NamedTuple):
    """Scalars of `mutual_loss`: the two losses carry gradients, the four terms are detached values."""

    loss_a: Tensor
    loss_b: Tensor
    ntxent_a: Tensor
    ntxent_b: Tensor
    kl_a: Tensor
    kl_b: Tensor


class SimilarityKL(NamedTuple):
    """Scalars of `similarity_kl`, both with gradients."""

    kl_a: Tensor
    kl_b: Tensor


class GatheredViews(NamedTuple):
    """What `gather_views` began: one peer's embeddings on their way between the ranks."""

    x: Tensor
    y: Tensor
    versions: tuple[int, int]  # of x and y, which an operation in place would raise
    settings: tuple[float, float, dist.ProcessGroup | None]  # temperatures and group
    under_way: mutual_triton.Gathering | None  # None with the backends that gather in the loss


def ntxent_loss(
    x: Tensor,  # [n, D] embeddings of view 1
    y: Tensor,  # [n, D] embeddings of view 2
    *,
    tau: float = 0.5,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent over the 2N rows [x; y] with the negatives of all ranks in `group` (Chen et al. 2020, arXiv 2002.05709).

    Raw embeddings in, normalised inside; float16, bfloat16, float32 or float64, at least float32 inside and out.
    `group=None` is this process alone; else every rank passes the same shape, gets the loss of the global batch, and
    gradients W times the true ones, which the mean over W ranks of data parallelism makes exact.

        mean_i [ logsumexp_{j != i} (z_i.z_j / tau) - z_i.z_pos(i) / tau ]

    Raises ValueError, naming the argument: shapes, dtypes or devices that differ, an empty batch, a single image with
    no other rank, tau not positive and finite, an unknown backend.
    """
    checks.check_backend(backend)
    checks.check_positive("tau", tau)
    checks.check_views(group, x=x, y=y)
    chosen, _ = choose_backend(backend, x, y)
    if chosen == "triton":
        return mutual_triton.ntxent(x, y, float(tau), group)
    if chosen == "native":
        return mutual_native.ntxent(x, y, float(tau), group)
    with full_precision(x):
        cosine = _cosines(x, y, group)
        return global_mean(reference.ntxent_from_cosines(cosine, tau, rank_in(group)), group)


def mutual_loss(
    x_a: Tensor,  # [n, D_a] peer a, view 1
    y_a: Tensor,  # [n, D_a] peer a, view 2
    x_b: Tensor,  # [n, D_b] peer b, view 1
    y_b: Tensor,  # [n, D_b] peer b, view 2
    *,
    tau_contrast: float = 0.5,
    tau_distill: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    kl_reduction: str = "batchmean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    gathered: tuple[GatheredViews | None, GatheredViews | None] = (None, None),
) -> MutualLoss:
    """Both peers' losses, loss_p = ntxent_p + weight_p * kl_p (Bhat et al. 2021, arXiv 2104.09866).

    Raw embeddings, dtypes and `group` as for `ntxent_loss`.  Each loss sends gradient to its own peer only: the other's
    similarity distribution is a constant in it.  `kl_reduction`: `batchmean` (mean over rows) or `mean` (over all N^2
    entries: the authors' code, where a weight of 100 at N = 256 is 0.39 in batchmean).  No tau^2 factor.

        P_p[i, :] = softmax_j (x_i.y_j / tau_distill)        kl_a = reduce_i KL(P_b[i] || P_a[i])

    `gathered`: what `gather_views` returned for either peer, so that its exchange overlapped other work.

    Raises ValueError, naming the argument, as `ntxent_loss` does; the peers must hold the same number of images.
    """
    checks.check_backend(backend)
    checks.check_positive("tau_contrast", tau_contrast)
    checks.check_positive("tau_distill", tau_distill)
    checks.check_reduction(kl_reduction)
    checks.check_weights(weights)
    checks.check_views(group, x_a=x_a, y_a=y_a)
    checks.check_views(group, x_b=x_b, y_b=y_b)
    checks.check_peers(x_a, x_b)
    _check_gathered(gathered, (x_a, x_b), (y_a, y_b), (tau_contrast, tau_distill, group))
    chosen, _ = choose_backend(backend, x_a, y_a, x_b, y_b)
    if chosen != "torch":
        views, mean = [(x_a, y_a), (x_b, y_b)], kl_reduction == "mean"
        options = (float(tau_contrast), float(tau_distill), weights, mean, group)
        if chosen == "native":
            loss_a, loss_b, values = mutual_native.mutual(views, *options)
        else:
            under_way = (gathered[0] and gathered[0].under_way, gathered[1] and gathered[1].under_way)
            loss_a, loss_b, values = mutual_triton.mutual(views, *options, under_way)
        return MutualLoss(loss_a, loss_b, *values.unbind())
    with full_precision(x_a):
        cosine_a, cosine_b = _cosines(x_a, y_a, group), _cosines(x_b, y_b, group)
        kl_a, kl_b = reference.kl_from_cosines(
            reference.cross_view(cosine_a), reference.cross_view(cosine_b), tau_distill, kl_reduction
        )
        rank = rank_in(group)
        ntxent_a = reference.ntxent_from_cosines(cosine_a, tau_contrast, rank)
        ntxent_b = reference.ntxent_from_cosines(cosine_b, tau_contrast, rank)
        terms = mean_over_ranks(torch.stack((ntxent_a, ntxent_b, kl_a, kl_b)), group).unbind()
        loss_a = with_value(ntxent_a + weights[0] * kl_a, terms[0] + weights[0] * terms[2], group)
        loss_b = with_value(ntxent_b + weights[1] * kl_b, terms[1] + weights[1] * terms[3], group)
        return MutualLoss(loss_a, loss_b, *terms)


def similarity_kl(
    x_a: Tensor,  # [n, D_a] peer a, view 1
    y_a: Tensor,  # [n, D_a] peer a, view 2
    x_b: Tensor,  # [n, D_b] peer b, view 1
    y_b: Tensor,  # [n, D_b] peer b, view 2
    *,
    tau: float = 0.1,
    kl_reduction: str = "batchmean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> SimilarityKL:
    """The two distillation terms alone, kl_a = reduce_i KL(P_b[i] || P_a[i]) and kl_b with a and b exchanged.

    Arguments, gradients and errors as for `mutual_loss`; P_p[i, :] = softmax_j (x_i.y_j / tau).
    """
    checks.check_backend(backend)
    checks.check_positive("tau", tau)
    checks.check_reduction(kl_reduction)
    checks.check_views(group, x_a=x_a, y_a=y_a)
    checks.check_views(group, x_b=x_b, y_b=y_b)
    checks.check_peers(x_a, x_b)
    chosen, _ = choose_backend(backend, x_a, y_a, x_b, y_b)
    if chosen != "torch":
        fused = mutual_triton.mutual if chosen == "triton" else mutual_native.mutual
        views = [(x_a, y_a), (x_b, y_b)]
        kl_a, kl_b, _ = fused(views, None, float(tau), (1.0, 1.0), kl_reduction == "mean", group)
        return SimilarityKL(kl_a, kl_b)
    with full_precision(x_a):
        cross_a, cross_b = _cross_cosines(x_a, y_a, group), _cross_cosines(x_b, y_b, group)
        kl_a, kl_b = reference.kl_from_cosines(cross_a, cross_b, tau, kl_reduction)
        return SimilarityKL(global_mean(kl_a, group), global_mean(kl_b, group))


def gather_views(
    x: Tensor,  # [n, D] one peer's embeddings of view 1
    y: Tensor,  # [n, D] of view 2
    *,
    tau_contrast: float = 0.5,
    tau_distill: float = 0.1,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> GatheredViews:
    """Starts the exchange of one peer's embeddings between ranks, for `mutual_loss(..., gathered=...)`.

    Returns at once; between this call and the loss the other peer's forward can run.  The loss must be given the same
    tensors, unchanged, and the same temperatures, group and backend.  With the torch backend nothing is under way, and
    the loss gathers.  For eager code: torch.compile does not take it in.
    Raises ValueError, naming the argument, as `mutual_loss` does.
    """
    checks.check_backend(backend)
    checks.check_positive("tau_contrast", tau_contrast)
    checks.check_positive("tau_distill", tau_distill)
    checks.check_views(group, x=x, y=y)
    under_way = None
    if choose_backend(backend, x, y).name == "triton":
        under_way = mutual_triton.start_gather(x, y, float(tau_contrast), float(tau_distill), group)
    return GatheredViews(x, y, (x._version, y._version), (tau_contrast, tau_distill, group), under_way)


# -- the batch of all ranks ----------------------------------------------------------------------------------------


def _cosines(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[2n, 2N] cosines of this rank's rows with those of all ranks; one gather of both views."""
    x, y = unit_rows(x), unit_rows(y)
    if world_size(group) == 1:
        return reference.cosines(x, y, x, y)
    both = gather_rows(torch.stack((x, y), dim=1), group)  # [N, 2, D]
    return reference.cosines(x, y, both[:, 0], both[:, 1])


def _cross_cosines(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n, N] cosines of view 1 of this rank with view 2 of all ranks."""
    return unit_rows(x) @ gather_rows(unit_rows(y), group).T


def _check_gathered(
    gathered: tuple[GatheredViews | None, GatheredViews | None],
    x: tuple[Tensor, Tensor],
    y: tuple[Tensor, Tensor],
    settings: tuple[float, float, dist.ProcessGroup | None],
) -> None:
    pair = isinstance(gathered, tuple | list) and not isinstance(gathered, GatheredViews) and len(gathered) == 2
    if not (pair and all(handle is None or isinstance(handle, GatheredViews) for handle in gathered)):
        raise ValueError(
            f"gathered: two of what gather_views returns, or None, one a peer; found {type(gathered).__name__}"
        )
    for peer, handle in enumerate(gathered):
        if handle is None:
            continue
        if handle.x is not x[peer] or handle.y is not y[peer]:
            raise ValueError(f"gathered[{peer}]: was started with other embeddings than those of this call")
        if handle.versions != (handle.x._version, handle.y._version):
            raise ValueError(f"gathered[{peer}]: the embeddings were changed in place since it was started")
        if handle.settings != settings:
            raise ValueError(f"gathered[{peer}]: was started with other temperatures or another group than this call's")
