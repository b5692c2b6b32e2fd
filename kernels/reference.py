"""Plain-PyTorch definition of every loss: the oracle of all backends in float64, and the `torch` backend.

Legend
  N  images of the global batch        n  images of this rank        W  ranks, N = W n
  D  embedding width                   m = 2n, M = 2N rows z = [x; y]
  x, y  L2-normalised embeddings of an image's two views;  row i of x and row i of y are a positive pair

NT-Xent (Sohn 2016; Chen et al. 2020, arXiv 2002.05709), self-similarity left out, pos(i) the other view:

    l_i = logsumexp_{j != i} (z_i.z_j / tau) - z_i.z_pos(i) / tau              ntxent = mean_i l_i

Similarity distillation (Bhat et al. 2021, arXiv 2104.09866), over the cross-view block, diagonal kept:

    P_p[i, :] = softmax_j (x_i.y_j / tau)       kl_a = reduce_i KL(sg P_b[i] || P_a[i]),  kl_b with a and b exchanged

Rows are those of this rank, columns those of all ranks, so that one function serves the oracle (rows = columns, on one
process) and the distributed backend.  The largest tensor is the m x M matrix of cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_REDUCTIONS = ("batchmean", "mean")


def normalize(x: Tensor) -> Tensor:
    """Rows of unit length, [n, D] -> [n, D]; a row of zeros stays zero, a non-finite row becomes NaN."""
    # By the largest entry first: squares of float32 overflow from 1e19 and vanish below 1e-23.  The direction does not
    # depend on the scale, so the scale is a constant to the gradient.
    scale = x.detach().abs().amax(dim=1, keepdim=True)
    return torch.nn.functional.normalize(x / scale.where(scale != 0, torch.ones_like(scale)), dim=1)


def cosines(x: Tensor, y: Tensor, x_all: Tensor, y_all: Tensor) -> Tensor:
    """All cosines [m, M] of this rank's rows [x; y] with the rows [x_all; y_all] of all ranks (inputs normalised)."""
    return torch.cat((x, y)) @ torch.cat((x_all, y_all)).T


def cross_view(cosine: Tensor) -> Tensor:
    """The block [n, N] of `cosines`: x of this rank against y of all ranks."""
    m, M = cosine.shape
    return cosine[: m // 2, M // 2 :]


def ntxent_from_cosines(cosine: Tensor, tau: float, rank: int = 0) -> Tensor:
    """NT-Xent, the mean over this rank's m rows: a scalar.  `rank` says where the rows stand among the columns."""
    m, M = cosine.shape
    n, N = m // 2, M // 2
    image = torch.arange(n, device=cosine.device) + rank * n
    self_column = torch.cat((image, image + N))[:, None]  # [m, 1]
    positive_column = torch.cat((image + N, image))[:, None]  # [m, 1]
    logits = cosine / tau
    lse = logits.scatter(1, self_column, float("-inf")).logsumexp(dim=1)
    # NaN must survive where it stands only on the left-out diagonal: the positive logit of such a row is NaN too.
    return (lse - logits.gather(1, positive_column).squeeze(1)).mean()


def kl_from_cosines(
    cross_a: Tensor,  # [n, N] cosines of peer a, rows of this rank
    cross_b: Tensor,  # [n, N] cosines of peer b
    tau: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Both distillation terms (kl_a, kl_b), scalars; each sends gradient to its own peer only.

    `batchmean` is the mean over rows, `mean` over all entries of the global N x N block.
    """
    log_a = (cross_a / tau).log_softmax(dim=1)
    log_b = (cross_b / tau).log_softmax(dim=1)
    scale = 1.0 if reduction == "batchmean" else 1.0 / cross_a.shape[1]

    def kl(log_target: Tensor, log_own: Tensor) -> Tensor:
        log_target = log_target.detach()
        return (log_target.exp() * (log_target - log_own)).sum(dim=1).mean() * scale

    return kl(log_b, log_a), kl(log_a, log_b)


def ntxent(x: Tensor, y: Tensor, *, tau: float) -> Tensor:
    """NT-Xent of raw embeddings x, y [N, D] on one process, in their own dtype."""
    x, y = normalize(x), normalize(y)
    return ntxent_from_cosines(cosines(x, y, x, y), tau)


def similarity_kl(
    x_a: Tensor, y_a: Tensor, x_b: Tensor, y_b: Tensor, *, tau: float, kl_reduction: str = "batchmean"
) -> tuple[Tensor, Tensor]:
    """(kl_a, kl_b) of raw embeddings [N, D_a], [N, D_b] on one process, in their own dtype."""
    cross = [normalize(x) @ normalize(y).T for x, y in ((x_a, y_a), (x_b, y_b))]
    return kl_from_cosines(cross[0], cross[1], tau, kl_reduction)


def lars_step(
    w: Tensor,  # parameter
    g: Tensor,  # its gradient, same shape
    v: Tensor,  # its momentum buffer, same shape
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    eta: float,
    adapt: bool = True,
    lr_in_momentum: bool = True,
) -> tuple[Tensor, Tensor]:
    """(w, v) behind one LARS step of one tensor, in w's dtype; the formulas stand in lars.py."""
    u = g.to(w.dtype) + weight_decay * w
    w_norm, u_norm = w.norm(), u.norm()
    plain = not adapt or w_norm == 0 or u_norm == 0
    ratio = 1.0 if plain else eta * w_norm / u_norm
    if lr_in_momentum:
        v = momentum * v + lr * ratio * u
        return w - v, v
    v = momentum * v + ratio * u
    return w - lr * v, v
