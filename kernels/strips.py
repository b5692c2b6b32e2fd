"""Losses over similarity matrices of all ranks, a strip of rows at a time: what such losses share.

Legend
  n, N  images of this rank and of all W ranks, N = W n        D  embedding width        C  columns of the matrix
  unit  rows of length 1, u = x / |x|

A strip is computed, used for the loss and for its gradient, and dropped: the matrix never stands in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.collectives import gather_rows

STRIP_BYTES = 256 * 2**20  # of all matrices of one strip together; as in passes_triton.py, enough to fill a GPU
# On a CPU rows of a strip at most.  Milliseconds by rows of KL both ways between two networks of width 128, float32, on
# one core and on two that other work shared (Xeon with AVX-512, 2 MiB of L2 cache a core, threads that wait asleep):
#             32          64          128         192         256         512         1024
#   N = 256   2.4   3.1   2.0   2.6   2.0   2.3   2.0   2.4   2.0   2.3
#   N = 1024   23    56    19    38    19    30    19    26    20    28    22    27    26    30
#   N = 4096  305   457   268   350   255   312   263   315   311   333   383   351   369   358
# Fewer rows read all columns more often, more leave the caches.
CPU_ROWS = 192
FEWEST_ROWS = 32  # of a strip, whatever its bytes: fewer cost more than they save


class Unit(NamedTuple):
    """Both views of a network: unit rows, and what a gradient is multiplied with on its way to the raw ones."""

    rows: Tensor  # [2, n, D]
    inverse_norm: Tensor  # [2, n, 1]


def unit_rows(x: Tensor, y: Tensor, *, centred: bool = False) -> Unit:
    """Normalised views [n, D], `centred` without their mean first; non-finite rows become NaN.

    A row of zeros stays zero, as in reference.normalize; so does a constant one that is centred, and has no gradient.
    """
    z = torch.stack((x, y))
    # By the largest entry first, since squares overflow and vanish.
    scale = z.abs().amax(dim=2, keepdim=True)
    z.div_(scale.masked_fill_(scale == 0, 1))
    constant = z.amax(dim=2, keepdim=True) == z.amin(dim=2, keepdim=True) if centred else None
    if constant is not None:
        # Set to zero, since a mean that a GPU takes by the reciprocal of D may miss the entries.
        z.sub_(z.mean(dim=2, keepdim=True)).masked_fill_(constant, 0)
    norm = torch.linalg.vector_norm(z, dim=2, keepdim=True)
    norm.masked_fill_(norm == 0, 1e-12)
    # At most what the dtype holds: infinity times an entry of zero would make the gradient NaN.
    inverse_norm = norm.mul(scale).reciprocal_().clamp_(max=torch.finfo(z.dtype).max)
    if constant is not None:
        inverse_norm.masked_fill_(constant, 0)
    return Unit(z.div_(norm), inverse_norm)


def through_unit_rows(gradient: Tensor, unit: Unit) -> Tensor:
    """The gradient [2, n, D] of the raw views from that of their unit rows, in place: (g - (g.u) u) / |x|.

    Of centred rows where g has no mean over D, as a sum of centred rows has none: taking the mean out changes nothing.
    """
    along = (gradient * unit.rows).sum(dim=2, keepdim=True)
    return gradient.addcmul_(along, unit.rows, value=-1).mul_(unit.inverse_norm)


def all_columns(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [V, n, D] of all ranks, [V, N, D]; one gather."""
    gathered = gather_rows(rows.transpose(0, 1), group)
    return gathered.transpose(0, 1).contiguous()


def strips(n: int, columns: int, matrices: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """(begin, end) of strips of n rows, even ones, of which `matrices` [rows, columns] fit the bound."""
    rows = max(STRIP_BYTES // (matrices * columns * like.element_size()), FEWEST_ROWS)
    if like.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    count = -(-n // rows)
    return ((n * k // count, n * (k + 1) // count) for k in range(count))
