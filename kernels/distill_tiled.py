"""Distillation terms between networks in strips of rows: any divergence, any rows, any number of teachers.

Legend
  n, N  images of this rank and of all W ranks, N = W n        D  embedding width        tau  temperature
  P, Q  similarity distributions of a row, of the student and of its teachers; definitions in reference_distill.py
  r, C  rows of a strip, and columns: N or 2N

The matrices of similarities are worked off in blocks, a view of the rows against views of the columns: (x, y), with
`symmetric` also (y, x), with rows `all` (x, xy) and (y, xy).  Each block has N rows, which all count the same.

A term takes from a strip of a block the divergence of each row and its derivative G with respect to the student's
logits (distill_strip.py), and carries G on to the unit rows of both sides:

    d rows = G columns / tau        d columns += G^T rows / tau

Across ranks the columns are gathered once a network, and their gradients added up once; the gradient that reaches a
rank's rows is W times the true one (collectives.py).  Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import distill_strip, forward_gradients, strips
from kernels.collectives import group_called, mean_over_ranks, name_of, rank_in, sum_op, world_size
from kernels.distill_strip import Strip
from kernels.precision import full_precision
from kernels.reference_distill import Settings, Term, Views
from kernels.strips import Unit


class Block(NamedTuple):
    """Part of the matrix of similarities."""

    view: int  # of the rows
    columns: slice  # of the views whose columns are needed


def _blocks(settings: Settings) -> list[Block]:
    if settings.rows == "all":
        return [Block(0, slice(0, 2)), Block(1, slice(0, 2))]
    if settings.symmetric:
        return [Block(0, slice(1, 2)), Block(1, slice(0, 1))]
    return [Block(0, slice(0, 1))]  # y alone has columns


class Network(NamedTuple):
    unit: Unit
    columns: Tensor  # [1 or 2, N, D] unit rows of y or of both views, of all ranks


def _network(views: Views, dtype: torch.dtype, settings: Settings, group: dist.ProcessGroup | None) -> Network:
    unit = strips.unit_rows(*(z.to(dtype) for z in views))
    both = settings.symmetric or settings.rows == "all"
    return Network(unit, strips.all_columns(unit.rows if both else unit.rows[1:], group))


class Gradient:
    """The gradient of one term, of its student's unit rows, and of columns of all ranks until they are added up."""

    def __init__(self, student: Network):
        self.rows = torch.zeros_like(student.unit.rows)  # [2, n, D]
        self.columns = torch.zeros_like(student.columns)  # [1 or 2, N, D]

    def add(self, block: Block, span: slice, slope: Tensor, rows: Tensor, columns: Tensor) -> None:
        torch.mm(slope, columns, out=self.rows[block.view, span])  # rows of one strip alone
        self.columns[block.columns].flatten(0, 1).addmm_(slope.T, rows)


def compute(
    views: list[Views],  # raw [n, D] of both views, a network
    terms: list[Term],
    settings: Settings,
    group: dist.ProcessGroup | None,
    gradients: list[bool],  # of each term: whether it is wanted
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(losses, shares), each [terms], of the global batch, and the gradients [2, n, D] that are wanted, else empty."""
    dtype = forward_gradients.computed_in(*(x for x, _ in views))
    used = sorted({network for student, teachers in terms for network in (student, *teachers)})
    networks = {v: _network(views[v], dtype, settings, group) for v in used}
    blocks, n = _blocks(settings), views[0][0].shape[0]
    values = networks[used[0]].columns.new_empty((2, len(terms), len(blocks), n))  # divergences; ones where they count
    made = [Gradient(networks[term[0]]) if wanted else None for term, wanted in zip(terms, gradients, strict=True)]
    for b, block in enumerate(blocks):
        columns = {v: network.columns[block.columns].flatten(0, 1) for v, network in networks.items()}
        C = columns[used[0]].shape[0]
        self_column = block.view * (C // 2) + rank_in(group) * n if settings.rows == "all" else None
        for begin, end in strips.strips(n, C, distill_strip.matrices(terms), columns[used[0]]):
            span = slice(begin, end)
            rows = {v: network.unit.rows[block.view, span] for v, network in networks.items()}
            strip = Strip(rows, columns, settings.tau, None if self_column is None else self_column + begin)
            for i, ((student, teachers), gradient) in enumerate(zip(terms, made, strict=True)):
                value, slope, counts = distill_strip.divergence(
                    strip, (student,), tuple(teachers), settings.divergence, settings.partition, gradient is not None
                )
                values[0, i, b, span], values[1, i, b, span] = value, counts
                if gradient is not None:
                    gradient.add(block, span, slope, rows[student], columns[student])
    scale = 1.0 / C if settings.kl_reduction == "mean" else 1.0
    losses, shares = mean_over_ranks(values.mean(dim=(2, 3)), group).unbind()
    finished = _finished(terms, networks, made, scale / (settings.tau * len(blocks) * n), group)
    return losses * scale, shares.clone(), finished


def _finished(
    terms: list[Term],
    networks: dict[int, Network],
    made: list[Gradient | None],
    scale: float,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Gradients [2, n, D] of the raw views; of the columns those that all ranks have for this one's rows."""
    own = [None if g is None else g.columns for g in made]
    if world_size(group) > 1 and any(made):
        # One exchange for all terms, [N, V D] side by side.
        parts = [g.columns.transpose(0, 1) for g in made if g is not None]
        total = sum_op(torch.cat([part.flatten(1) for part in parts], dim=1), name_of(group), world_size(group))
        split = iter(total.split([part[0].numel() for part in parts], dim=1))
        own = [None if g is None else next(split).unflatten(1, (len(g.columns), -1)).transpose(0, 1) for g in made]
    finished = []
    for (student, _), gradient, columns in zip(terms, made, own, strict=True):
        if gradient is None or columns is None:
            finished.append(networks[student].columns.new_empty(0))
            continue
        gradient.rows[2 - len(columns) :].add_(columns)
        finished.append(strips.through_unit_rows(gradient.rows.mul_(scale), networks[student].unit))
    return finished


# -- operator ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dogo::distill", mutates_args=())
def distill_op(
    views: list[Tensor],  # x, y of the first network, of the second, ...
    students: list[int], teachers: list[int], counts: list[int],  # a term each; teachers of all terms in one list
    tau: float, divergence: str, rows: str, symmetric: bool, partition: bool, kl_reduction: str,
    group: str, gradients: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    pairs = list(zip(views[::2], views[1::2], strict=True))
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    terms = [(s, tuple(teachers[end - count : end])) for s, count, end in zip(students, counts, ends, strict=True)]
    settings = Settings(tau, divergence, rows, symmetric, partition, kl_reduction)
    with full_precision(views[0]):
        return compute(pairs, terms, settings, group_called(group), gradients)


@distill_op.register_fake
def _(
    views, students, teachers, counts, tau, divergence, rows, symmetric, partition, kl_reduction, group, gradients
):  # fmt: skip
    dtype = forward_gradients.computed_in(*views)
    losses, shares = (views[0].new_empty(len(students), dtype=dtype) for _ in range(2))
    made = [forward_gradients.fake(views[2 * s], g, dtype) for s, g in zip(students, gradients, strict=True)]
    return losses, shares, made


def distill(
    views: Sequence[Views], terms: Sequence[Term], settings: Settings, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, shares) of the global batch, one scalar a term each; each loss goes to its student only."""
    gradients = [forward_gradients.wanted(*views[student]) for student, _ in terms]
    losses, shares, made = distill_op(
        [z.detach() for pair in views for z in pair],
        [student for student, _ in terms], [t for _, teachers in terms for t in teachers],
        [len(teachers) for _, teachers in terms], *settings, name_of(group), gradients,
    )  # fmt: skip
    attached = [
        forward_gradients.attach(loss, *views[student], gradient)
        for (student, _), loss, gradient in zip(terms, losses.unbind(), made, strict=True)
    ]
    return attached, list(shares.unbind())
