"""Pass 1 for temperatures whose exponentials leave float32's range: logarithms of row sums, by a running maximum.

Legend as in stats_triton.py; logits are s contrast and s distill, of unit vectors that are not scaled.

A maximum a row destroys the symmetry that pass 1 lives from, so each row walks over all columns, M^2 pairs in all, and
every tile is masked: this is for tau < 0.0145, where correct is what matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.pairs_triton import scores


@triton.jit
def _accumulate(logits, mask, top, total):
    """Running (maximum, sum of 2^(logit - maximum)) of each row, [rows]."""
    logits = tl.where(mask, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
    return higher, total


@triton.jit
def _log_sums(
    z_rows,
    z_cols,
    z_row,
    row,
    view,
    N,
    pitch,
    contrast,
    distill,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    V: tl.constexpr,
):
    """log2 l and log2 t [rows] of one peer; t means something for rows of view 1 alone."""
    i = row + tl.arange(0, V.rows)
    top = tl.full([V.rows], float("-inf"), tl.float32)
    l_top, t_top = top, top
    l_sum, t_sum = tl.full([V.rows], 0.0, tl.float32), tl.full([V.rows], 0.0, tl.float32)
    for col_view in range(0, 2):
        for col in range(0, N, V.cols):
            s = scores(z_rows, z_cols, z_row, col_view * pitch + col, WIDTH, DEPTH)
            j = col + tl.arange(0, V.cols)
            inside = (j < N)[None, :]
            apart = i[:, None] != j[None, :]  # not itself, and not its positive
            l_top, l_sum = _accumulate(s * contrast, inside & apart, l_top, l_sum)
            if V.distill:
                second = (j + col_view * pitch >= pitch)[None, :]
                t_top, t_sum = _accumulate(s * distill, inside & apart & second, t_top, t_sum)
    return l_top + tl.log2(l_sum), t_top + tl.log2(t_sum)


@triton.jit
def stats_safe_kernel(
    a_rows, a_cols, b_rows, b_cols,  # descriptors of z, as in stats_kernel
    positive_a, positive_b,  # [n] s of each image of this rank with itself in the other view
    sums,  # [peers, 4, pitch] out: log2 l' of view 1 and 2, log2 t', s of the positive; of this rank's rows
    N, n, pitch, first, contrast, distill,
    V: tl.constexpr,
):  # fmt: skip
    """V.rows images of one view a program; `first` is the place of this rank's first image."""
    row = first + tl.program_id(0) * V.rows
    view = tl.program_id(1)
    i = row + tl.arange(0, V.rows)
    own = i < first + n
    at = (a_rows, a_cols), positive_a, sums
    _store_peer(at, row, view, i, own, first, N, pitch, contrast, distill, V.width_a, V.depth_a, V)
    if V.peers == 2:
        at = (b_rows, b_cols), positive_b, sums + 4 * tl.cast(pitch, tl.int64)
        _store_peer(at, row, view, i, own, first, N, pitch, contrast, distill, V.width_b, V.depth_b, V)


@triton.jit
def _store_peer(
    at, row, view, i, own, first, N, pitch, contrast, distill, WIDTH: tl.constexpr, DEPTH: tl.constexpr, V: tl.constexpr
):
    z, positive, sums = at
    z_rows, z_cols = z
    log_l, log_t = _log_sums(
        z_rows, z_cols, view * pitch + row, row, view, N, pitch, contrast, distill, WIDTH, DEPTH, V
    )
    tl.store(sums + view * pitch + i, log_l, mask=own)
    once = own & (i + view * pitch < pitch)
    if V.distill:
        tl.store(sums + 2 * pitch + i, log_t, mask=once)
    tl.store(sums + 3 * pitch + i, tl.load(positive + i - first, mask=once, other=0.0), mask=once)
