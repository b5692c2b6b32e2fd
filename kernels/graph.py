"""Embedding graph alignment (EGA) of a student with its teachers, in strips of rows.

Legend
  n, N  images of this rank and of all W ranks, N = W n        D  embedding width
  s, t  rows of the student and of a teacher, each without its mean over D and of unit length: [N, D]

The definition stands in reference_distill.py.  For each view by itself, with Frobenius norms over N x N,

    A = s t^T - 1        B = t t^T - s s^T        loss = node |A| + edge |B|

    d|A| / ds = A t / |A|        d|B| / ds = -2 B s / |B|,  since B is symmetric

so that a row's gradient takes that row of A and B alone: a rank works off its own rows and exchanges nothing for
gradients.  The norms are known when the last strip is done: rows A t and B s are kept, and scaled then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import checks, forward_gradients, reference_distill, strips
from kernels.collectives import gather_rows, group_called, mean_over_ranks, name_of, rank_in, world_size
from kernels.precision import full_precision
from kernels.reference_distill import Views

BACKENDS = ("auto", "torch")


def graph_alignment(
    student: Views,  # (x, y), each [n, D]: embeddings of both views
    teachers: Sequence[Views],  # of several networks, each like the student's
    *,
    node: float = 0.8,
    edge: float = 0.24,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distance of the student's graph of embeddings from its teachers' (Ma et al. 2022, arXiv 2211.13264).

    Raw embeddings, dtypes, gradients and `group` as for `mutual_loss`, and float64 where any network's are; gradient to
    the student only.  With s, t the rows without their mean and of unit length, so that products are Pearson
    correlations (those of a constant row are 0), and Frobenius norms over the N rows of the global batch,

        node |s t^T - 1| + edge |t t^T - s s^T|

    of each view by itself, the mean over views and teachers.  No matrix of N x N stands in memory, unless `backend` is
    `torch`, the definition: differentiable any number of times, and what `auto` takes for torch.func's transforms.

    Raises ValueError, naming the argument, as `mutual_loss` does, also for widths that differ, for width 1, and for
    weights that are negative or both zero.
    """
    checks.check_choice("backend", backend, BACKENDS)
    checks.check_weight("node", node)
    checks.check_weight("edge", edge)
    if node == 0 and edge == 0:
        raise ValueError("edge: node and edge are both 0, which leaves no loss; at least one must be positive")
    checks.check_several("teachers", teachers, "pairs (x, y)")
    others = {f"teachers[{k}]": teacher for k, teacher in enumerate(teachers)}
    checks.check_networks(group, student=student, **others)
    D = student[0].shape[1]
    if D == 1:
        raise ValueError("student: width 1 leaves nothing of a row without its mean; at least 2 is needed")
    for name, (x, _) in others.items():
        if x.shape[1] != D:
            raise ValueError(
                f"{name}: width {x.shape[1]} differs from the student's {D}; a projection to one width makes them equal"
            )
    views = [z for pair in (student, *teachers) for z in pair]
    if backend == "torch" or forward_gradients.unfit(*views):
        return _defined(views, node, edge, group)
    wanted = forward_gradients.wanted(*student)
    loss, gradient = graph_op([z.detach() for z in views], float(node), float(edge), name_of(group), wanted)
    return forward_gradients.attach(loss, *student, gradient)


def _defined(views: list[Tensor], node: float, edge: float, group: dist.ProcessGroup | None) -> Tensor:
    """The definition, of the rows of all ranks on each of them."""
    with full_precision(views[0]):
        dtype = forward_gradients.computed_in(*views)
        whole = [gather_rows(z.to(dtype), group) for z in views]
        student, *teachers = zip(whole[::2], whole[1::2], strict=True)
        return reference_distill.graph_alignment(student, teachers, node=node, edge=edge)


# -- in strips -----------------------------------------------------------------------------------------------------


def _compute(
    views: list[Tensor], node: float, edge: float, group: dist.ProcessGroup | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The loss of the global batch and, where it is wanted, its gradient [2, n, D], W times the true one."""
    dtype = forward_gradients.computed_in(*views)
    units = [
        strips.unit_rows(x.to(dtype), y.to(dtype), centred=True) for x, y in zip(views[::2], views[1::2], strict=True)
    ]
    s, *ts = (unit.rows for unit in units)  # [2, n, D]
    s_all, *ts_all = (strips.all_columns(rows, group) for rows in (s, *ts))  # [2, N, D]
    _, n, D = s.shape
    first = rank_in(group) * n
    squares = s.new_zeros((2, len(ts), 2, n))  # of the rows of A and of B
    pulls = s.new_zeros((2, len(ts), 2, n, D) if wanted else 0)  # A t and B s
    # At once: s s^T, and A beside B.
    for begin, end in strips.strips(n, s_all.shape[1], 3, s):
        span = slice(begin, end)
        for view in range(2):
            own = s[view, span] @ s_all[view].T if edge else None
            for k, (t, t_all) in enumerate(zip(ts, ts_all, strict=True)):
                if node:
                    A = s[view, span] @ t_all[view].T
                    A.diagonal(first + begin).sub_(1)
                    squares[0, k, view, span] = torch.linalg.vector_norm(A, dim=1).square_()
                    if wanted:
                        torch.mm(A, t_all[view], out=pulls[0, k, view, span])
                if own is not None:
                    B = (t[view, span] @ t_all[view].T).sub_(own)
                    squares[1, k, view, span] = torch.linalg.vector_norm(B, dim=1).square_()
                    if wanted:
                        torch.mm(B, s_all[view], out=pulls[1, k, view, span])
    world, count = world_size(group), 2 * len(ts)
    norms = (mean_over_ranks(squares.sum(dim=3), group) * world).sqrt_()  # [2, teachers, 2 views]
    loss = (norms[0].sum() * node + norms[1].sum() * edge) / count
    if not wanted:
        return loss, loss.new_empty(0)
    inverse = norms.reciprocal().masked_fill_(norms == 0, 0)[..., None, None]
    pulls.mul_(inverse)
    gradient = pulls[0].sum(dim=0).mul_(node * world / count).add_(pulls[1].sum(dim=0), alpha=-2 * edge * world / count)
    return loss, strips.through_unit_rows(gradient, units[0])


# -- operator ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dogo::graph", mutates_args=())
def graph_op(
    views: list[Tensor],  # x, y of the student, of the first teacher, ...
    node: float, edge: float, group: str, wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with full_precision(views[0]):
        return _compute(views, node, edge, group_called(group), wanted)


@graph_op.register_fake
def _(views, node, edge, group, wanted):
    dtype = forward_gradients.computed_in(*views)
    return views[0].new_empty((), dtype=dtype), forward_gradients.fake(views[0], wanted, dtype)
