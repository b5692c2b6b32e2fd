"""Public losses: argument checks, choice of backend, and the batch of all ranks.

The maths stands in reference.py.  Backends: `torch` (any device, float32 and float64; half inputs are computed in
float32).  `auto` picks the best that fits; today that is `torch`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.collectives import gather_rows, mean_over_ranks, rank_in, world_size

BACKENDS = ("auto", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    _check_backend(backend)
    _check_positive("tau", tau)
    _check_views(group, x=x, y=y)
    with _full_precision(x):
        cosine = _cosines(x, y, group)
        return _global(reference.ntxent_from_cosines(cosine, tau, rank_in(group)), group)


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
) -> MutualLoss:
    """Both peers' losses, loss_p = ntxent_p + weight_p * kl_p (Bhat et al. 2021, arXiv 2104.09866).

    Raw embeddings, dtypes and `group` as for `ntxent_loss`.  Each loss sends gradient to its own peer only: the other's
    similarity distribution is a constant in it.  `kl_reduction`: `batchmean` (mean over rows) or `mean` (over all N^2
    entries: the authors' code, where a weight of 100 at N = 256 is 0.39 in batchmean).  No tau^2 factor.

        P_p[i, :] = softmax_j (x_i.y_j / tau_distill)        kl_a = reduce_i KL(P_b[i] || P_a[i])

    Raises ValueError, naming the argument, as `ntxent_loss` does; the peers must hold the same number of images.
    """
    _check_backend(backend)
    _check_positive("tau_contrast", tau_contrast)
    _check_positive("tau_distill", tau_distill)
    _check_reduction(kl_reduction)
    _check_weights(weights)
    _check_views(group, x_a=x_a, y_a=y_a)
    _check_views(group, x_b=x_b, y_b=y_b)
    _check_peers(x_a, x_b)
    with _full_precision(x_a):
        cosine_a, cosine_b = _cosines(x_a, y_a, group), _cosines(x_b, y_b, group)
        kl_a, kl_b = reference.kl_from_cosines(
            reference.cross_view(cosine_a), reference.cross_view(cosine_b), tau_distill, kl_reduction
        )
        rank = rank_in(group)
        ntxent_a = reference.ntxent_from_cosines(cosine_a, tau_contrast, rank)
        ntxent_b = reference.ntxent_from_cosines(cosine_b, tau_contrast, rank)
        terms = mean_over_ranks(torch.stack((ntxent_a, ntxent_b, kl_a, kl_b)), group).unbind()
        loss_a = _with_value(ntxent_a + weights[0] * kl_a, terms[0] + weights[0] * terms[2], group)
        loss_b = _with_value(ntxent_b + weights[1] * kl_b, terms[1] + weights[1] * terms[3], group)
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
    _check_backend(backend)
    _check_positive("tau", tau)
    _check_reduction(kl_reduction)
    _check_views(group, x_a=x_a, y_a=y_a)
    _check_views(group, x_b=x_b, y_b=y_b)
    _check_peers(x_a, x_b)
    with _full_precision(x_a):
        cross_a, cross_b = _cross_cosines(x_a, y_a, group), _cross_cosines(x_b, y_b, group)
        kl_a, kl_b = reference.kl_from_cosines(cross_a, cross_b, tau, kl_reduction)
        return SimilarityKL(_global(kl_a, group), _global(kl_b, group))


# -- the batch of all ranks ----------------------------------------------------------------------------------------


def _full_precision(x: Tensor) -> torch.autocast:
    """Losses never run in the reduced precision of a surrounding autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _normalized(x: Tensor) -> Tensor:
    return reference.normalize(x if x.dtype == torch.float64 else x.float())


def _cosines(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[2n, 2N] cosines of this rank's rows with those of all ranks; one gather of both views."""
    x, y = _normalized(x), _normalized(y)
    if world_size(group) == 1:
        return reference.cosines(x, y, x, y)
    both = gather_rows(torch.stack((x, y), dim=1), group)  # [N, 2, D]
    return reference.cosines(x, y, both[:, 0], both[:, 1])


def _cross_cosines(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n, N] cosines of view 1 of this rank with view 2 of all ranks."""
    return _normalized(x) @ gather_rows(_normalized(y), group).T


def _global(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _with_value(local, mean_over_ranks(local, group), group)


def _with_value(local: Tensor, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A scalar with the value of the global batch and the gradient of this rank's rows."""
    return local if world_size(group) == 1 else _ReplaceValue.apply(local, value)


class _ReplaceValue(torch.autograd.Function):
    # local + (value - local).detach() would round, and turn an infinite loss into NaN.
    @staticmethod
    def forward(ctx, local: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


# -- checks --------------------------------------------------------------------------------------------------------


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: must be positive and finite, found {value!r}")


def _check_reduction(kl_reduction: str) -> None:
    if kl_reduction not in reference.KL_REDUCTIONS:
        raise ValueError(f"kl_reduction: {kl_reduction!r} is unknown; allowed: {', '.join(reference.KL_REDUCTIONS)}")


def _check_weights(weights: tuple[float, float]) -> None:
    pair = isinstance(weights, tuple | list) and len(weights) == 2
    if not (pair and all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights)):
        raise ValueError(f"weights: two finite numbers >= 0 (one a peer), found {weights!r}")


def _check_views(group: dist.ProcessGroup | None, **views: Tensor) -> None:
    """Both views of one peer: [n, D], same shape, dtype and device, and enough images for a negative."""
    (name_x, x), (name_y, y) = views.items()
    for name, z in views.items():
        if not isinstance(z, Tensor):
            raise ValueError(f"{name}: a tensor [N, D] is expected, found {type(z).__name__}")
        if z.ndim != 2 or 0 in z.shape:
            raise ValueError(f"{name}: shape [N, D] with N, D >= 1 is expected, found {list(z.shape)}")
        if z.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{name}: dtype {z.dtype} is not supported; allowed: {allowed}")
    for what in ("shape", "dtype", "device"):
        if getattr(x, what) != getattr(y, what):
            raise ValueError(f"{name_y}: {what} {getattr(y, what)} differs from {name_x}'s {getattr(x, what)}")
    if x.shape[0] * world_size(group) < 2:
        raise ValueError(f"{name_x}: N = 1 has no negatives; at least 2 images over all ranks are needed")


def _check_peers(x_a: Tensor, x_b: Tensor) -> None:
    if x_a.shape[0] != x_b.shape[0]:
        raise ValueError(f"x_b: {x_b.shape[0]} images, but x_a holds {x_a.shape[0]}; peers see the same images")
    if x_a.device != x_b.device:
        raise ValueError(f"x_b: device {x_b.device} differs from x_a's {x_a.device}")
