"""Distillation terms between any number of networks: argument checks, and which form computes which term.

The maths stands in reference_distill.py.  Forms:

  fused   similarity_kl of mutual.py, where a backend of backends.py fits: divergence `kl`, rows `cross_view`, one
          teacher, no partition
  tiled   strips of rows in PyTorch (distill_tiled.py), for everything else; which it says once
  torch   the definition: whole matrices of all ranks on each of them, differentiable any number of times, also by
          torch.func's transforms and forward mode
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import checks, distill_tiled, forward_gradients, reference_distill
from kernels.backends import choose_backend
from kernels.collectives import gather_rows
from kernels.mutual import similarity_kl
from kernels.precision import full_precision
from kernels.reference_distill import DIVERGENCES, ROWS, Settings, Term, Views

log = logging.getLogger(__name__)


class Distilled(NamedTuple):
    """Scalars of `similarity_distillation`, one a term."""

    losses: tuple[Tensor, ...]  # with gradients
    shares: tuple[Tensor, ...]  # of rows that were distilled: 1 without partition; detached


def similarity_distillation(
    views: Sequence[Views],  # (x, y), each [n, D_v]: embeddings of both views, of several networks
    terms: Sequence[Term],  # (student, (teacher, ...)): places in `views`
    *,
    tau: float = 0.1,
    divergence: str = "kl",
    rows: str = "cross_view",
    symmetric: bool = False,
    partition: bool = False,
    kl_reduction: str = "batchmean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Distilled:
    """Each term's divergence between its student's similarity distributions and the mean of its teachers'.

    Raw embeddings, dtypes, gradients and `group` as for `mutual_loss`, and float64 where any network's are.  A term
    sends gradient to its student only.  P of a row is the softmax over the columns of

        cross_view    x y^T / tau, N x N (Bhat et al. 2021, arXiv 2104.09866); `symmetric` takes the mean of the term
                      and of the same with x and y exchanged, the softmax over the other axis
        all           z z^T / tau of z = [x; y], 2N x 2N, without self-similarity

    and Q is the mean of the teachers' P (Zhang et al. 2017, arXiv 1706.00384).  `divergence` of a row: `kl` KL(Q || P),
    `reverse_kl` KL(P || Q), `jeffreys` 1/2 (KL(Q || P) + KL(P || Q)), `js` 1/2 KL(P || M) + 1/2 KL(Q || M) with
    M = (P + Q) / 2.  `kl_reduction`: `batchmean` (mean over rows) or `mean` (over all N^2 or 4 N^2 entries).
    `partition` distils only rows in which the teacher is the more confident, max Q > max P (after Roth et al. 2023,
    arXiv 2310.17653); the others count as zero in the mean.  No tau^2 factor.

    A network in two guises is two entries of `views`: SimSiam's predictions as student, its projections as teacher.

    Raises ValueError, naming the argument, as `mutual_loss` does, also for places that `views` does not have, a student
    among its own teachers, an unknown divergence or rows, and `symmetric` with rows `all`, which are symmetric already.
    """
    checks.check_backend(backend)
    checks.check_positive("tau", tau)
    checks.check_choice("divergence", divergence, DIVERGENCES)
    checks.check_choice("rows", rows, ROWS)
    checks.check_reduction(kl_reduction)
    if symmetric and rows == "all":
        raise ValueError("symmetric: with rows='all' the matrix is symmetric already; use symmetric=False")
    checks.check_several("views", views, "pairs (x, y)")
    checks.check_networks(group, **{f"views[{place}]": pair for place, pair in enumerate(views)})
    checks.check_terms(terms, len(views))
    flat = [z for pair in views for z in pair]
    chosen, unfit = choose_backend(backend, *flat)
    if (dtype := forward_gradients.computed_in(*flat)) == torch.float64:
        views = [(x.to(dtype), y.to(dtype)) for x, y in views]
    terms = [(student, tuple(teachers)) for student, teachers in terms]
    settings = Settings(float(tau), divergence, rows, bool(symmetric), bool(partition), kl_reduction)
    unreached = "" if backend == "torch" else forward_gradients.unfit(*flat)
    if backend == "torch" or unreached:
        if unreached:
            _say_once(f"backend 'auto' ({unreached}) has no fused kernel; the plain definition computes it")
        return _defined(views, terms, settings, group)
    reasons = [[f"backend 'auto' ({unfit})"] if unfit else _uncovered(teachers, settings) for _, teachers in terms]
    for reason in dict.fromkeys(reason for found in reasons for reason in found):
        _say_once(f"{reason} has no fused kernel; the tiled PyTorch form computes it")
    return _computed(views, terms, [not found for found in reasons], settings, group, chosen)


# -- the three forms -----------------------------------------------------------------------------------------------


def _computed(
    views: Sequence[Views], terms: list[Term], fused: list[bool], settings: Settings,
    group: dist.ProcessGroup | None, backend: str,
) -> Distilled:  # fmt: skip
    """Each term by the fused kernels or, all that are not, in one pass of the tiled form."""
    losses, shares = {}, {}
    rest = [i for i in range(len(terms)) if not fused[i]]
    if rest:
        found, counted = distill_tiled.distill(views, [terms[i] for i in rest], settings, group)
        losses, shares = dict(zip(rest, found, strict=True)), dict(zip(rest, counted, strict=True))
    for i, (student, (teacher, *_)) in enumerate(terms):
        if i in losses:
            continue
        # One call serves both directions.
        mirrored = [k for k in range(i + 1, len(terms)) if k not in losses and terms[k] == (teacher, (student,))][:1]
        x, y = views[teacher]
        both = _fused(views[student], (x, y) if mirrored else (x.detach(), y.detach()), settings, group, backend)
        for k, loss in zip([i, *mirrored], both, strict=False):
            losses[k], shares[k] = loss, torch.ones_like(loss)
    return Distilled(tuple(losses[i] for i in range(len(terms))), tuple(shares[i] for i in range(len(terms))))


def _fused(
    a: Views, b: Views, settings: Settings, group: dist.ProcessGroup | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The term of student a and teacher b, and that of student b and teacher a."""
    tau, reduction = settings.tau, settings.kl_reduction
    kl_a, kl_b = similarity_kl(*a, *b, tau=tau, kl_reduction=reduction, group=group, backend=backend)
    if not settings.symmetric:
        return kl_a, kl_b
    (x_a, y_a), (x_b, y_b) = a, b
    other_a, other_b = similarity_kl(y_a, x_a, y_b, x_b, tau=tau, kl_reduction=reduction, group=group, backend=backend)
    return (kl_a + other_a) / 2, (kl_b + other_b) / 2


def _defined(
    views: Sequence[Views], terms: list[Term], settings: Settings, group: dist.ProcessGroup | None
) -> Distilled:
    """The definition, of the rows of all ranks on each of them."""
    with full_precision(views[0][0]):
        dtype = forward_gradients.computed_in(*(x for x, _ in views))
        whole = [(gather_rows(x.to(dtype), group), gather_rows(y.to(dtype), group)) for x, y in views]
        losses, shares = reference_distill.similarity_distillation(whole, terms, settings)
    return Distilled(tuple(losses), tuple(shares))


# -- what the fused kernels leave to the tiled form ----------------------------------------------------------------


def _uncovered(teachers: tuple[int, ...], settings: Settings) -> list[str]:
    """The settings of a term that no fused kernel computes; none where one does."""
    found = []
    if settings.divergence != "kl":
        found.append(f"divergence={settings.divergence!r}")
    if settings.rows != "cross_view":
        found.append(f"rows={settings.rows!r}")
    if settings.partition:
        found.append("partition=True")
    if len(teachers) > 1:
        found.append("a term of several teachers")
    return found


_said: set[str] = set()


@torch.compiler.assume_constant_result  # torch.compile says it where it traces, as graphs hold no messages
def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("similarity_distillation: %s", message)
