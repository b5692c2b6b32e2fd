"""Pass 2 of the fused losses: what every pair pulls at either peer's vectors, and the value of the KL.

Legend
  N, n  images of the global batch and of this rank     pitch  rows that a view takes up in z     M = 2N
  i, j  images; a row is an image in one view     e_ij, x_ij, l_i, t_i  as in stats_triton.py     P = x / t
  inverse_l, inverse_t  scale / l_i, 1 / t_i;  scale  of either peer's weights, so that float16 holds them
  V.rows x V.cols  a tile

    gradient of z_i = factor * (sum_j W_ij z_j - 2 z_pos(i)),           W_ij = e_ij (1 / l_i + 1 / l_j)
    peer a's KL adds to W_a, on pairs of view 1 with view 2:            kappa_a (P_a - P_b), normalised along view 1

A program owns V.rows rows of one view, for both peers, and walks over all columns: no two programs write to one place,
so results are equal to the bit in every run.  Tiles are computed again from z; what pass 1 knew of them is in l and t.
The positive pair is left out of W and of the KL's value; finish_triton.py has its weight in full precision, since where
a row has learned its positive that is a small difference of large numbers.  project_triton.py adds it, and goes through
the normalisation, in a kernel of its own: at the end of this one that spilled 880 bytes at D = 128, and the rest alone
0 (triton 3.6) to 48.  It reads and writes the gradient once more, 0.5 % of the time at M = 65,536 by count of bytes.

Tiles with masks are narrow, and so are those with the KL's value: the two gradients of 64 x 128 take half of all
registers, and a tile of 64 columns leaves room for the plain weights alone.

The KL's value is taken from u = ln P_a - ln P_b with the row constants inside, kl_a = -sum P_b u, kl_b = sum P_a u:
summing logits and constants apart cancels where the peers agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.finish_triton import LN_2
from kernels.pairs_triton import exponentials, scores
from kernels.project_triton import store_rows


@triton.jit
def _row_partial(v, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[rows, cols] -> [rows, 4]: the part of a row's sum that lies within a thread (columns 8k + 2 (lane % 4))."""
    return tl.sum(tl.sum(tl.reshape(v, [ROWS, COLS // 8, 4, 2]), axis=3), axis=1)


@triton.jit
def _contrast(s, e, l_row, l_col, logit, weight_scale, V: tl.constexpr):
    """W_ij of NT-Xent: e (1 / l_i + 1 / l_j), from inverse sums or, safe, from logarithms."""
    if V.safe:
        return (tl.exp2(s * logit - l_row) + tl.exp2(s * logit - l_col)) * weight_scale
    else:
        return e * (l_row + l_col)


@triton.jit
def _softmax(s, x, t, logit, V: tl.constexpr):
    """P_ij of the KL."""
    if V.safe:
        return tl.exp2(s * logit - t)
    else:
        return x * t


@triton.jit
def _weigh(
    s_a, s_b, row, col, row_norms, col_norms, value_b, value_sum, logits, weights, N,
    V: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Weights [rows, COLS] of both peers for the tile at images (row, col), and the KL's partial sums [rows, 4].

    FIRST: the rows are of view 1.  SAME: the columns are of the rows' own view.  EDGE: with masks.
    """
    l_row_a, l_row_b, t_row_a, t_row_b = row_norms
    l_cols_a, l_cols_b, t_cols_a, t_cols_b = col_norms
    contrast, distill = logits
    kappa_a, kappa_b, scale_a, scale_b = weights
    j = col + tl.arange(0, COLS)
    e_a, x_a = exponentials(s_a, logits, V)
    e_b, x_b = exponentials(s_b, logits, V)
    w_a = tl.full([V.rows, COLS], 0.0, tl.float32)
    w_b = w_a
    # Not itself in its own view, not its positive in the other; and nothing behind N, where z = 0 does not do, since
    # 1 / l_i times 2^0 may be infinite.
    counts = ((row + tl.arange(0, V.rows))[:, None] != j[None, :]) & (j[None, :] < N)
    if V.distill and not SAME:
        if FIRST:
            t_a, t_b = t_row_a[:, None], t_row_b[:, None]
        else:
            t_a, t_b = tl.load(t_cols_a + j)[None, :], tl.load(t_cols_b + j)[None, :]
        p_a = _softmax(s_a, x_a, t_a, distill, V)
        difference = p_a - _softmax(s_b, x_b, t_b, distill, V)
        if EDGE:
            p_a = tl.where(counts, p_a, 0.0)
            difference = tl.where(counts, difference, 0.0)
        if FIRST:
            log_ratio = t_b - t_a if V.safe else tl.log2(t_a) - tl.log2(t_b)
            u = s_a - s_b + log_ratio / distill
            value_b += _row_partial(p_a * u, V.rows, COLS)
            value_sum += _row_partial(difference * u, V.rows, COLS)
        w_a = kappa_a * difference
        w_b = -kappa_b * difference
    if V.contrast:
        c_a = _contrast(s_a, e_a, l_row_a[:, None], tl.load(l_cols_a + j)[None, :], contrast, scale_a, V)
        c_b = c_a
        if V.peers == 2:
            c_b = _contrast(s_b, e_b, l_row_b[:, None], tl.load(l_cols_b + j)[None, :], contrast, scale_b, V)
        if EDGE:
            c_a = tl.where(counts, c_a, 0.0)
            c_b = tl.where(counts, c_b, 0.0)
        w_a += c_a
        w_b += c_b
    return w_a, w_b, value_b, value_sum


@triton.jit
def columns_of(row, part, N, V: tl.constexpr, COLS: tl.constexpr):
    """Column tiles of one view that a program visits: (edges, diagonal, begin, last, lo, count).

    Edge tiles need masks: `diagonal` ones from tile `begin` on, which hold images of the rows, and `last`, where it
    reaches over N.  The `count` others run from tile lo on, without the diagonal ones.
    """
    tiles = tl.cdiv(N, COLS)
    lo, hi = tiles * part // V.split, tiles * (part + 1) // V.split
    begin = tl.minimum(tl.maximum(row // COLS, lo), hi)
    end = tl.minimum(tl.maximum(tl.cdiv(row + V.rows, COLS), lo), hi)
    ragged = ((hi > N // COLS) & (end < hi)).to(tl.int32)
    return end - begin + ragged, end - begin, begin, hi - 1, lo, hi - lo - (end - begin) - ragged


@triton.jit
def _visit(
    z, own, place, strips, g_a, g_b, value_b, value_sum, row_norms, col_norms, logits, weights, N,
    V: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile: its weights, and what they pull into the gradients or, not fused, into the strips."""
    a_rows, a_cols, b_rows, b_cols = z
    row, col, z_row, z_col = place
    if V.fused:
        own_a, own_b = own
        cols_a = a_cols.load([z_col + col, 0])
        s_a = tl.dot(own_a, cols_a.T, input_precision="ieee")
        s_b = s_a
        if V.peers == 2:
            cols_b = b_cols.load([z_col + col, 0])
            s_b = tl.dot(own_b, cols_b.T, input_precision="ieee")
    else:
        s_a = scores(a_rows, a_cols, z_row, z_col + col, V.width_a, V.depth_a)
        s_b = s_a
        if V.peers == 2:
            s_b = scores(b_rows, b_cols, z_row, z_col + col, V.width_b, V.depth_b)
    w_a, w_b, value_b, value_sum = _weigh(
        s_a, s_b, row, col, row_norms, col_norms, value_b, value_sum, logits, weights, N, V, COLS, FIRST, SAME, EDGE
    )
    if V.fused:
        g_a = tl.dot(w_a.to(cols_a.dtype), cols_a, g_a, input_precision="ieee")
        if V.peers == 2:
            g_b = tl.dot(w_b.to(cols_b.dtype), cols_b, g_b, input_precision="ieee")
    else:
        strip_a, strip_b, offsets, mask = strips
        at = offsets + (z_col + col + tl.arange(0, COLS))[None, :]
        tl.store(strip_a + at, w_a.to(strip_a.dtype.element_ty), mask=mask)
        if V.peers == 2:
            tl.store(strip_b + at, w_b.to(strip_b.dtype.element_ty), mask=mask)
    return g_a, g_b, value_b, value_sum


@triton.jit
def _walk(
    z, z_narrow, own, row, part, z_row, z_col, strips, g_a, g_b, value_b, value_sum, row_norms, col_norms,
    logits, weights, N, V: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """This program's column tiles of one view: those with masks first, in narrow pieces, then the others."""
    edges, diagonal, begin, last, lo, count = columns_of(row, part, N, V, COLS)
    PIECES: tl.constexpr = COLS // V.narrow
    for k in tl.range(0, edges * PIECES, num_stages=1):
        tile = tl.where(k // PIECES < diagonal, begin + k // PIECES, last)
        g_a, g_b, value_b, value_sum = _visit(
            z_narrow, own, (row, tile * COLS + k % PIECES * V.narrow, z_row, z_col), strips,
            g_a, g_b, value_b, value_sum,
            row_norms, col_norms, logits, weights, N, V, V.narrow, FIRST, SAME, True,
        )  # fmt: skip
    for k in range(0, count):
        col = (lo + k + tl.where(lo + k >= begin, diagonal, 0)) * COLS
        g_a, g_b, value_b, value_sum = _visit(
            z, own, (row, col, z_row, z_col), strips, g_a, g_b, value_b, value_sum,
            row_norms, col_norms, logits, weights, N, V, COLS, FIRST, SAME, False,
        )  # fmt: skip
    return g_a, g_b, value_b, value_sum


@triton.jit
def _column_norms(inverse_l, inverse_t, view, wide):
    """inverse_l of both peers at the columns' view, inverse_t of both."""
    return inverse_l + view * wide, inverse_l + (2 + view) * wide, inverse_t, inverse_t + wide


@triton.jit
def _pull_rows(
    z, z_value, z_narrow, norms, outs, kl_terms, block, part, sizes, logits, weights,
    V: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """All columns of a block of rows of one view: FIRST says which."""
    a_rows, _, b_rows, _ = z
    inverse_l, inverse_t = norms
    out_a, out_b = outs
    N, n, pitch, first, begin, count = sizes
    wide = tl.cast(pitch, tl.int64)
    view = 0 if FIRST else 1
    local = block * V.rows + tl.arange(0, V.rows)  # within the images begin .. begin + count of this rank
    row = first + begin + block * V.rows  # among the images of all ranks
    z_row = row + view * pitch
    i = row + tl.arange(0, V.rows)
    nothing = tl.full([V.rows], 0.0, tl.float32)
    l_row_a, l_row_b = nothing, nothing
    if V.contrast:
        l_row_a = tl.load(inverse_l + view * wide + i, mask=i < N, other=0.0)
        if V.peers == 2:
            l_row_b = tl.load(inverse_l + (2 + view) * wide + i, mask=i < N, other=0.0)
    if V.fused:
        own = (a_rows.load([z_row, 0]), b_rows.load([z_row, 0]))
        g_a = tl.full([V.rows, V.width_a], 0.0, tl.float32)
        g_b = tl.full([V.rows, V.width_b], 0.0, tl.float32)
        strips = outs
    else:
        own = outs
        g_a = nothing
        g_b = nothing
        strips = (out_a, out_b, (view * count + local).to(tl.int64)[:, None] * (2 * wide), (local < count)[:, None])
    if V.contrast:
        g_a, g_b, _, _ = _walk(
            z, z_narrow, own, row, part, z_row, view * pitch, strips, g_a, g_b, nothing, nothing,
            (l_row_a, l_row_b, nothing, nothing), _column_norms(inverse_l, inverse_t, view, wide),
            logits, weights, N, V, V.cols, FIRST, True,
        )  # fmt: skip
    # Loaded here: registers are what the loop above is short of.
    t_row_a, t_row_b, value_b = nothing, nothing, nothing
    if V.distill and FIRST:
        t_row_a = tl.load(inverse_t + i, mask=i < N, other=1.0)
        t_row_b = tl.load(inverse_t + wide + i, mask=i < N, other=1.0)
        value_b = tl.full([V.rows, 4], 0.0, tl.float32)
    # The KL's value needs registers that a whole tile does not leave.
    COLS: tl.constexpr = V.value_cols if V.distill and FIRST else V.cols
    g_a, g_b, value_b, value_sum = _walk(
        z_value if V.distill and FIRST else z, z_narrow, own, row, part, z_row, pitch - view * pitch, strips,
        g_a, g_b, value_b, value_b,
        (l_row_a, l_row_b, t_row_a, t_row_b), _column_norms(inverse_l, inverse_t, 1 - view, wide),
        logits, weights, N, V, COLS, FIRST, False,
    )  # fmt: skip
    image = begin + local
    if V.distill and FIRST:
        unit = LN_2 * logits[1]
        kl_b, both = tl.sum(value_b, axis=1) * unit, tl.sum(value_sum, axis=1) * unit
        at = kl_terms + part * n + image
        tl.store(at, both - kl_b, mask=local < count)
        tl.store(at + (V.split + 1) * n, kl_b, mask=local < count)
    if V.fused:
        k = (part * 2 + view) * tl.cast(n, tl.int64)
        store_rows(out_a + k * V.width_a, g_a, image, n, V.width_a, V.width_a)
        if V.peers == 2:
            store_rows(out_b + k * V.width_b, g_b, image, n, V.width_b, V.width_b)


@triton.jit
def gradient_kernel(
    # descriptors of z, [2 pitch, P], in blocks of V.rows, V.cols, V.value_cols and V.narrow
    a_rows, a_cols, a_value, a_narrow,
    b_rows, b_cols, b_value, b_narrow,
    inverse_l,  # [peers, 2, pitch]
    inverse_t,  # [peers, pitch]
    out_a, out_b,  # sums [split, 2, n, P] float32; not fused: strips [2, count, 2 pitch] of weights
    kl_terms,  # [peers, split + 1, n] out: KL of each row, but for the positive's part in the last place
    N, n, pitch, first, begin, count, contrast, distill, kappa_a, kappa_b, scale_a, scale_b,
    V: tl.constexpr,
):  # fmt: skip
    """V.rows images of one view a program and, with V.split, a part of the columns.

    `first` is the place of this rank's first image among those of all ranks; begin .. begin + count are the images of
    this launch among this rank's: all of them but where strips bound the memory.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    z = (a_rows, a_cols, b_rows, b_cols)
    z_value, z_narrow = (a_rows, a_value, b_rows, b_value), (a_rows, a_narrow, b_rows, b_narrow)
    norms, outs = (inverse_l, inverse_t), (out_a, out_b)
    sizes = (N, n, pitch, first, begin, count)
    logits, weights = (contrast, distill), (kappa_a, kappa_b, scale_a, scale_b)
    if tl.program_id(2) == 0:
        _pull_rows(z, z_value, z_narrow, norms, outs, kl_terms, block, part, sizes, logits, weights, V, True)
    else:
        _pull_rows(z, z_value, z_narrow, norms, outs, kl_terms, block, part, sizes, logits, weights, V, False)
