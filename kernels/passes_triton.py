"""The passes of a fused loss in order, and the memory between them.

Legend
  n, N  images of this rank and of all W ranks, M = 2N rows     D  embedding width
  maths: reference.py; pass 0 embed_triton.py, pass 1 stats_triton.py, pass 2 gradient_triton.py

Gradients are computed with the loss, in one call: `backward` multiplies them with the upstream gradient.  Float32
memory is what leaves (the gradients) and room for row sums; float16 embeddings are all that is read M / 64 times.

Across ranks: embeddings are gathered once (float16), four sums a row are added over ranks (l', t' and the positives of
both peers; five where forward stands alone), and each rank computes the gradient of its own rows from them, W times the
true one (collectives.py); nothing is exchanged for gradients.  Pass 1's chunks are shared among ranks, each pair
computed once in the cluster.

Every sum has a fixed order, so a result is equal to the bit in every run with the same number of ranks.  That costs the
room: 40 to 56 floats a row and peer, divided by the root of the number of ranks, written and read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tiles
from kernels.finish_triton import collect_kernel, finish_kernel
from kernels.gradient_triton import gradient_kernel
from kernels.problem import Problem
from kernels.project_triton import project_kernel, strip_product_kernel
from kernels.stats_safe_triton import stats_safe_kernel
from kernels.stats_triton import gather_tasks_kernel, stats_kernel, task_count
from kernels.tiles import launch

STRIP_BYTES = 256 * 2**20  # weights of one strip where gradients do not fit registers


class Embedded(NamedTuple):
    """Pass 0 of one peer, with the vectors of all ranks."""

    z: Tensor  # [2, pitch, P]
    inverse_norm: Tensor  # [2, n]
    positive: Tensor  # [n]


def compute(
    problem: Problem,
    views: list[tuple[Tensor, Tensor]],  # raw [n, D] of both views, a peer
    embedded: list[Embedded],
    group: dist.ProcessGroup | None,
    gradients: bool,
) -> tuple[Tensor, ...]:
    """(loss_a, loss_b, terms [4]) of the global batch and, asked for, the gradients [2, n, D] float32 a peer."""
    safe = problem.temperatures.safe
    valued = problem.distill and not gradients and not safe  # forward alone: the KL's value comes from pass 1
    sums = _safe_stats(problem, embedded) if safe else _stats(problem, embedded, valued)
    if problem.world > 1:
        dist.all_reduce(sums, group=group)
    finished = _finish(problem, sums, valued)
    grads: list[Tensor] = []
    if gradients or (problem.distill and not valued):
        grads = _gradients(problem, views, embedded, finished)
    return *_collect(problem, finished, group), *(grads if gradients else [])


# -- pass 1 --------------------------------------------------------------------------------------------------------


def _descriptors(problem: Problem, embedded: list[Embedded], *sides: int) -> list[TensorDescriptor]:
    """z of peer a in blocks of each of `sides` rows, then of peer b; with one peer, b is a."""
    depths = problem.plan.depths()
    return [
        TensorDescriptor.from_tensor(embedded[peer].z.flatten(0, 1), [side, depths[peer]])
        for peer in (0, problem.peers - 1)
        for side in sides
    ]


def _stats(problem: Problem, embedded: list[Embedded], valued: bool) -> Tensor:
    """This rank's part of the row sums, [peers, 4 or with the value 5, pitch] as gather_tasks_kernel lists them."""
    plan, temps, peers = problem.plan, problem.temperatures, problem.peers
    tile = plan.tiles.stats_value if valued else plan.tiles.stats
    R, Q = problem.chunks
    tasks = -(-task_count(R, Q, contrast=problem.contrast) // problem.world)
    cross_tasks = -(-task_count(R, Q, contrast=False) // problem.world)
    # In one piece: on small batches launches are what costs.
    sizes = [
        peers * tasks * plan.row_chunk * problem.contrast,
        peers * tasks * plan.col_chunk * problem.contrast,
        peers * cross_tasks * plan.row_chunk * problem.distill,
        peers * cross_tasks * plan.row_chunk * valued,
    ]
    parts = embedded[0].z.new_zeros(sum(sizes), dtype=torch.float32).split(sizes)
    descriptors = _descriptors(problem, embedded, tile.rows, tile.cols)
    # Peers meet in pass 1 for the KL's value alone; one at a time leaves registers for larger tiles.
    launches = [(0, peers)] if valued else [(peer, peer + 1) for peer in range(peers)]
    for peer, end in launches:
        own = (*descriptors[2 * peer : 2 * peer + 2], *descriptors[2 * end - 2 : 2 * end])
        room = (part[peer * (size // peers) :] for part, size in zip(parts, sizes, strict=True))
        launch(
            stats_kernel, (tasks,), *own, *room,
            problem.N, plan.pitch, R, Q, plan.col_chunk, tasks, cross_tasks, problem.rank, problem.world,
            temps.contrast, temps.distill,
            V=problem.variant(tile, peers=slice(peer, end), valued=valued), warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    sums = embedded[0].z.new_empty((peers, 4 + valued, plan.pitch), dtype=torch.float32)
    launch(
        gather_tasks_kernel, (plan.pitch // tiles.BLOCK, peers), *parts,
        embedded[0].positive, embedded[-1].positive, sums,
        problem.N, problem.n, plan.pitch, problem.first, R, Q, plan.col_chunk, tasks, cross_tasks,
        problem.rank, problem.world,
        BLOCK=tiles.BLOCK, CONTRAST=problem.contrast, DISTILL=problem.distill, VALUED=valued,
    )  # fmt: skip
    return sums


def _safe_stats(problem: Problem, embedded: list[Embedded]) -> Tensor:
    """The same in logarithms of base 2, of this rank's rows; zeros elsewhere."""
    plan, temps, tile = problem.plan, problem.temperatures, problem.plan.tiles.stats_value
    sums = embedded[0].z.new_zeros((problem.peers, 4, plan.pitch), dtype=torch.float32)
    launch(
        stats_safe_kernel, (-(-problem.n // tile.rows), 2), *_descriptors(problem, embedded, tile.rows, tile.cols),
        embedded[0].positive, embedded[-1].positive, sums,
        problem.N, problem.n, plan.pitch, problem.first, temps.contrast, temps.distill,
        V=problem.variant(tile), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return sums


# -- between and behind the passes ---------------------------------------------------------------------------------


class _Finished(NamedTuple):
    inverse_l: Tensor  # [peers, 2, pitch]
    inverse_t: Tensor  # [peers, pitch]
    positive_weights: Tensor  # [peers, n]
    contrast_terms: Tensor  # [peers, 2, n]
    kl_terms: Tensor  # [peers, splits + 1, n]


def _finish(problem: Problem, sums: Tensor, valued: bool) -> _Finished:
    n, pitch, peers, temps = problem.n, problem.plan.pitch, problem.peers, problem.temperatures
    splits = 0 if valued else problem.plan.split
    new = sums.new_empty
    finished = _Finished(
        new((peers, 2, pitch)), new((peers, pitch)), new((peers, n)), new((peers, 2, n)), new((peers, splits + 1, n))
    )
    launch(
        finish_kernel, (pitch // tiles.BLOCK,), sums, *finished,
        problem.N, n, pitch, splits, problem.first, temps.contrast, temps.distill,
        *problem.kappas, *problem.weight_scales,
        BLOCK=tiles.BLOCK, PEERS=peers, CONTRAST=problem.contrast, DISTILL=problem.distill,
        VALUED=valued, SAFE=temps.safe,
    )  # fmt: skip
    return finished


def _collect(problem: Problem, finished: _Finished, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_a, loss_b, [ntxent_a, ntxent_b, kl_a, kl_b]) of the global batch; with one peer, b's are zeros."""
    new = finished.inverse_l.new_empty
    values = new(6) if problem.world > 1 else None
    outs = (new(()), new(()), new(4)) if values is None else (values[0], values[1], values[2:])
    launch(
        collect_kernel, (1,), finished.contrast_terms, finished.kl_terms, *outs,
        problem.n, finished.kl_terms.shape[1] - 1, 1.0 / (2 * problem.N), problem.kl_share, *problem.weights,
        BLOCK=4096, PEERS=problem.peers, CONTRAST=problem.contrast, DISTILL=problem.distill, warps=8,
    )  # fmt: skip
    if values is None:
        return outs
    dist.all_reduce(values, group=group)
    return outs[0].clone(), outs[1].clone(), outs[2].clone()  # operators may not return views of one tensor


# -- pass 2 --------------------------------------------------------------------------------------------------------


def _gradients(
    problem: Problem, views: list[tuple[Tensor, Tensor]], embedded: list[Embedded], finished: _Finished
) -> list[Tensor]:
    """Gradients [2, n, D] float32 of this rank's raw embeddings, a peer; fills the KL's terms."""
    plan, n = problem.plan, problem.n
    new = finished.inverse_l.new_empty
    if plan.fused:
        sums = [new((plan.split, 2, n, width)) for width in (plan.width_a, plan.width_b)[: problem.peers]]
        _pull(problem, embedded, finished, sums, 0, n)
        in_place = [s[0] if s.shape[0] == 1 and s.shape[3] == D else None for s, D in zip(sums, problem.D, strict=True)]
        grads = [new((2, n, D)) if g is None else g for g, D in zip(in_place, problem.D, strict=True)]
        _project(problem, views, embedded, finished, sums, grads, 0, n)
        return grads
    grads = [new((2, n, D)) for D in problem.D]
    rows = _strip_rows(problem)
    strips = [embedded[0].z.new_empty((2, rows, 2 * plan.pitch)) for _ in problem.D]
    for begin in range(0, n, rows):
        count = min(rows, n - begin)
        _pull(problem, embedded, finished, strips, begin, count)
        sums = [_strip_product(problem, strip, e.z, count)[None] for strip, e in zip(strips, embedded, strict=True)]
        _project(problem, views, embedded, finished, sums, grads, begin, count)
    return grads


def _strip_rows(problem: Problem) -> int:
    """Images whose weights are held at once: STRIP_BYTES of them, and enough to fill a GPU with their product."""
    a_row = 2 * problem.peers * 2 * problem.plan.pitch * 2
    fitting = STRIP_BYTES // a_row // tiles.BLOCK * tiles.BLOCK
    return min(problem.n, max(4 * tiles.BLOCK, fitting))


def _pull(
    problem: Problem, embedded: list[Embedded], finished: _Finished, outs: list[Tensor], begin: int, count: int
) -> None:
    plan, temps, scales = problem.plan, problem.temperatures, problem.weight_scales
    _, _, tile, value_cols, narrow = plan.tiles
    launch(
        gradient_kernel, (-(-count // tile.rows), plan.split, 2),
        *_descriptors(problem, embedded, tile.rows, tile.cols, value_cols, narrow),
        finished.inverse_l, finished.inverse_t, outs[0], outs[-1], finished.kl_terms,
        problem.N, problem.n, plan.pitch, problem.first, begin, count,
        temps.contrast, temps.distill, *(kappa * scale for kappa, scale in zip(problem.kappas, scales, strict=True)),
        *scales,
        V=problem.variant(tile, fused=plan.fused, split=plan.split, value_cols=value_cols, narrow=narrow),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _strip_product(problem: Problem, strip: Tensor, z: Tensor, count: int) -> Tensor:
    plan, width = problem.plan, z.shape[2]
    g = z.new_empty((2, count, width), dtype=torch.float32)
    columns = min(128, width)
    launch(
        strip_product_kernel, (-(-count // 128), -(-width // columns), 2), strip, z, g,
        count, problem.N, plan.pitch,
        WIDTH=width, BM=128, BK=64, BW=columns, CONTRAST=problem.contrast, warps=8,
    )  # fmt: skip
    return g


def _project(
    problem: Problem, views: list[tuple[Tensor, Tensor]], embedded: list[Embedded], finished: _Finished,
    sums: list[Tensor], grads: list[Tensor], begin: int, count: int,
) -> None:  # fmt: skip
    for peer, ((x, y), e, g, out) in enumerate(zip(views, embedded, sums, grads, strict=True)):
        width = g.shape[-1]
        P = 1 << (width - 1).bit_length()
        block = max(1, 2048 // P)
        launch(
            project_kernel, (-(-count // block), 2), g, x, y, e.inverse_norm, finished.positive_weights[peer], out,
            begin, count, problem.n, problem.D[peer], g.shape[0],
            problem.factor / (problem.weight_scales[peer] * problem.temperatures.scale), problem.factor,
            *x.stride(), *y.stride(),
            P=P, WIDTH=width, BLOCK=block,
        )  # fmt: skip
