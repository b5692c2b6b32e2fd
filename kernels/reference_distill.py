"""Plain-PyTorch definition of the distillation terms between networks: the oracle in float64, and the `torch` backend.

Legend
  N  images        D_v  embedding width of network v        R, C  rows and columns of a similarity matrix
  x, y  L2-normalised embeddings of an image's two views
  P  similarity distribution of a row of the student        Q  of its teachers: a constant

Similarity distributions of network v, the softmax over the columns of each row, with temperature tau:

  cross_view   S_v = x y^T / tau    N x N, diagonal kept                     (Bhat et al. 2021, arXiv 2104.09866)
               symmetric: also y x^T / tau, whose softmax is over the other axis; the rows of both count the same
  all          S_v = z z^T / tau, z = [x; y]    2N x 2N, self-similarity left out: no column of that row

A term is the mean over rows of the divergence from Q, the mean of its teachers' P (Zhang et al. 2017, 1706.00384):

  kl  KL(Q || P)    reverse_kl  KL(P || Q)    jeffreys  1/2 (KL(Q || P) + KL(P || Q))
  js  1/2 KL(P || M) + 1/2 KL(Q || M),  M = (P + Q) / 2

With `partition` only rows count in which the teacher is the more confident, max_j Q_ij > max_j P_ij (after Roth et al.
2023, arXiv 2310.17653); those left out count as zero in the mean.

Embedding graph alignment (Ma et al. 2022, arXiv 2211.13264) of one view, s and t the student's and the teacher's rows,
each without its mean over D and of unit length, so that products are Pearson correlations:

  node || s t^T - 1 ||_F + edge || t t^T - s s^T ||_F
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import cosines, normalize

DIVERGENCES = ("kl", "reverse_kl", "jeffreys", "js")
ROWS = ("cross_view", "all")

Views = tuple[Tensor, Tensor]  # x, y: embeddings [N, D_v] of the two views of a network
Term = tuple[int, tuple[int, ...]]  # student and teachers, as places in a list of views


class Settings(NamedTuple):
    """What `similarity_distillation` computes."""

    tau: float = 0.1
    divergence: str = "kl"
    rows: str = "cross_view"
    symmetric: bool = False
    partition: bool = False
    kl_reduction: str = "batchmean"  # the mean over rows; `mean`: over all N^2 or 4 N^2 entries


def similarity_distillation(
    views: Sequence[Views], terms: Sequence[Term], settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, shares of rows that count), one scalar a term each, of raw embeddings on one process, in their dtype.

    Each loss sends gradient to its student only.
    """
    tau, divergence, rows, symmetric, partition, kl_reduction = settings
    log_p = [log_distribution(normalize(x), normalize(y), tau, rows, symmetric) for x, y in views]
    N = views[0][0].shape[0]
    scale = 1.0 if kl_reduction == "batchmean" else 1.0 / (N if rows == "cross_view" else 2 * N)
    losses, shares = [], []
    for student, teachers in terms:
        log_q = log_mean([log_p[teacher].detach() for teacher in teachers])
        distance = row_divergence(log_p[student], log_q, divergence)
        # The comparison is one that NaN fails: a row of NaN counts.
        left_out = (log_q.amax(dim=1) <= log_p[student].detach().amax(dim=1)) & partition
        losses.append(distance.where(~left_out, torch.zeros_like(distance)).mean() * scale)
        shares.append((~left_out).to(distance.dtype).mean())
    return losses, shares


def log_distribution(x: Tensor, y: Tensor, tau: float, rows: str, symmetric: bool) -> Tensor:
    """log P [R, C] of unit rows x, y [N, D]: N x N, symmetric 2N x N, over all rows 2N x (2N - 1)."""
    if rows == "all":
        column = torch.arange(2 * x.shape[0] - 1, device=x.device)
        self_column = torch.arange(2 * x.shape[0], device=x.device)[:, None]
        others = column + (column >= self_column)  # [2N, 2N - 1]
        return (cosines(x, y, x, y).gather(1, others) / tau).log_softmax(dim=1)
    logits = torch.cat((x @ y.T, y @ x.T)) if symmetric else x @ y.T
    return (logits / tau).log_softmax(dim=1)


def log_mean(log_p: list[Tensor]) -> Tensor:
    """Log of the mean of distributions, each given as its log [R, C]."""
    return log_p[0] if len(log_p) == 1 else torch.stack(log_p).logsumexp(dim=0) - math.log(len(log_p))


def row_divergence(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """The divergence of each row, [R], between distributions given as their logs [R, C]."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(dim=1)

    if divergence == "kl":
        return kl(log_q, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "jeffreys":
        return (kl(log_q, log_p) + kl(log_p, log_q)) / 2
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def graph_alignment(student: Views, teachers: Sequence[Views], *, node: float, edge: float) -> Tensor:
    """The scalar of raw embeddings [N, D] on one process, in their dtype: the mean over views and teachers."""
    total = []
    for teacher in teachers:
        for own, other in zip(student, teacher, strict=True):
            s, t = normalize(centre(own)), normalize(centre(other.detach()))
            identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
            nodes, edges = torch.linalg.vector_norm(s @ t.T - identity), torch.linalg.vector_norm(t @ t.T - s @ s.T)
            total.append(node * nodes + edge * edges)
    return torch.stack(total).mean()


def centre(x: Tensor) -> Tensor:
    """Rows [N, D] without their mean, up to a factor; a constant row becomes exactly zero, a non-finite one NaN."""
    # By the largest entry first, whose sum over D may overflow; normalising takes any factor out again.
    scale = x.detach().abs().amax(dim=1, keepdim=True)
    x = x / scale.where(scale != 0, torch.ones_like(scale))
    # What rounding leaves of a constant row, normalising would make a direction; and its gradient is zero.
    constant = x.detach().amax(dim=1, keepdim=True) == x.detach().amin(dim=1, keepdim=True)
    return (x - x.mean(dim=1, keepdim=True)).where(~constant, torch.zeros_like(x))
