"""Pass 1 of the fused losses: the sums of each row's exponentials, over half of the pairs.

Legend
  N  images of the global batch   pitch  rows that a view takes up in z (N and padding)   M = 2N rows of both views
  e_ij, x_ij  exponentials of a pair at NT-Xent's and the KL's temperature (pairs_triton.py)
  V.rows x V.cols  a tile;  a chunk is row_chunk x col_chunk pairs of one block, the work of one program
  Q = row_chunk / col_chunk;  R, C  chunks of a view's rows and columns, C = R Q

    l_i = sum_{j != i} e_ij over both views        t_i = sum_j x_ij, row i of view 1, j over view 2 alone

The matrix of exponentials is symmetric, since nothing is subtracted from a logit, so a tile serves its rows and its
columns.  Of the four blocks (view 1 or 2) x (view 1 or 2), the two on the diagonal are visited from their diagonal
down, view 1 x view 2 whole, its mirror image never: M^2 / 2 pairs.  A tile that holds a piece of the diagonal serves
its rows alone; the tiles of the square that it belongs to (the tile's longer side) cover both orders of its pairs.

A program keeps V.cols columns where they are and walks down the rows.  Column sums stay in registers, one partial a
thread (a thread owns rows r and r + 8 of a warp's 16 in the layout of a tensor-core product, so the sum over those two
and over warps' slabs needs no exchange; `tl.sum(e, 0)` in the loop cost 18.75 shuffles a pair).  Row sums go to a slot
that no other program touches, in program order, so that a sum has one order of additions: results are equal to the bit
in every run.  The additions there are atomics because those do not wait for an answer, not because anyone competes.

Slots of a row: [0, C) from column chunks of its own view; [C, C + R) as a column, from row chunks of its own view;
[C + R, 2C + R) from the other view: column chunks for view 1, row chunks for view 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.pairs_triton import exponentials, scores


@triton.jit
def locate(task, R, Q):
    """(same, view, row chunk, column chunk) of a task; view 1 x view 2 first, then each view with itself."""
    cross = R * R * Q
    same = task >= cross
    triangle = R * (R + 1) // 2 * Q
    rest = task - cross
    view = rest // triangle
    square = (rest - view * triangle) // Q
    # The largest I with I (I + 1) / 2 <= square, for at most 64 chunks: float32 misses by one at most.
    row_chunk = ((tl.sqrt(8.0 * tl.maximum(square, 0).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row_chunk -= (row_chunk * (row_chunk + 1) // 2 > square).to(tl.int32)
    row_chunk += ((row_chunk + 1) * (row_chunk + 2) // 2 <= square).to(tl.int32)
    col_chunk = (square - row_chunk * (row_chunk + 1) // 2) * Q + rest % Q
    return (
        same,
        tl.where(same, view, 0),
        tl.where(same, row_chunk, task // (R * Q)),
        tl.where(same, col_chunk, task % (R * Q)),
    )


@triton.jit
def walk(col, row_lo, row_hi, N, V: tl.constexpr, SAME: tl.constexpr):
    """The row tiles under column tile `col`: (first, diagonal, edges, lo, hi).

    Edge tiles need masks: the `diagonal` ones from `first` on and those that reach over N (from hi on); `edges` counts
    both.  The others begin at lo, lo + V.rows, ... below hi.
    """
    row_hi = tl.minimum(row_hi, N)
    first = row_lo
    lo = row_lo
    diagonal = 0
    if SAME:
        SIDE: tl.constexpr = max(V.rows, V.cols)
        first = col // SIDE * SIDE
        end = tl.minimum(first + SIDE, row_hi)
        diagonal = tl.where(first >= row_lo, tl.maximum(end - first + V.rows - 1, 0) // V.rows, 0)
        lo = tl.maximum(row_lo, first + diagonal * V.rows)
    whole = lo + tl.maximum(row_hi - lo, 0) // V.rows * V.rows
    hi = tl.where(col + V.cols <= N, whole, lo)  # a column tile that reaches over N has edge tiles alone
    edges = diagonal + tl.maximum(row_hi - hi + V.rows - 1, 0) // V.rows
    return first, diagonal, edges, lo, hi


@triton.jit
def _column_partial(e, V: tl.constexpr):
    """[rows, cols] -> [rows / 16, 8, cols]: the part of a column's sum that lies within a thread."""
    return tl.sum(tl.reshape(e, [V.rows // 16, 2, 8, V.cols]), axis=1)


@triton.jit
def _add_peer(
    s, other, columns, slots, row, col, N, below, distill,
    V: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One peer's share of a tile: adds to its rows' slots, returns the column partials [rows / 16, 8, cols]."""
    l_rows, t_rows, u_rows = slots
    e, x = exponentials(s, distill, V)
    if EDGE:
        i = row + tl.arange(0, V.rows)[:, None]
        j = col + tl.arange(0, V.cols)[None, :]
        inside = (i < N) & (j < N)
        x = tl.where(inside, x, 0.0)
        e = tl.where(inside & (i != j), e, 0.0) if SAME else tl.where(inside, e, 0.0)
    if V.contrast:
        tl.atomic_add(l_rows + row, tl.sum(e, axis=1), sem="relaxed")
        if SAME and EDGE:
            e = tl.where(row < below, 0.0, e)  # its mirror image is visited too
        columns += _column_partial(e, V)
    if V.distill and not SAME:
        tl.atomic_add(t_rows + row, tl.sum(x, axis=1), sem="relaxed")
        if V.valued:
            tl.atomic_add(u_rows + row, tl.sum(x * (s - other), axis=1), sem="relaxed")
    return columns


@triton.jit
def _add_tile(
    z, at, place, columns_a, columns_b, slots_a, slots_b, distill,
    V: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Both peers' shares of a tile."""
    a_rows, a_cols, b_rows, b_cols = z
    z_row, z_col = at
    row, col, N, below = place
    s_a = scores(a_rows, a_cols, z_row + row, z_col + col, V.width_a, V.depth_a)
    s_b = s_a
    if V.peers == 2:
        s_b = scores(b_rows, b_cols, z_row + row, z_col + col, V.width_b, V.depth_b)
        columns_b = _add_peer(s_b, s_a, columns_b, slots_b, row, col, N, below, distill, V, SAME, EDGE)
    columns_a = _add_peer(s_a, s_b, columns_a, slots_a, row, col, N, below, distill, V, SAME, EDGE)
    return columns_a, columns_b


@triton.jit
def _add_chunk(
    z, parts, bounds, view, row_chunk_index, col_chunk_index, sizes, distill, V: tl.constexpr, SAME: tl.constexpr
):
    """All tiles of a chunk."""
    l_parts, t_parts, u_parts = parts
    row_lo, row_hi, col_lo, col_hi = bounds
    N, pitch, R, C = sizes
    wide = tl.cast(pitch, tl.int64)
    if SAME:
        z_row, z_col = view * pitch, view * pitch
        row_slot, col_slot = col_chunk_index, C + row_chunk_index
    else:
        z_row, z_col = pitch * 0, pitch
        row_slot, col_slot = C + R + col_chunk_index, C + R + row_chunk_index
    rows = tl.arange(0, V.rows)
    peer_l, peer_t = (2 * C + R) * (2 * wide), C * wide  # peer b's slots lie this far behind peer a's
    l_rows = l_parts + row_slot * (2 * wide) + z_row + rows
    l_cols = l_parts + col_slot * (2 * wide) + z_col + tl.arange(0, V.cols)
    t_rows, u_rows = t_parts + col_chunk_index * wide + rows, u_parts + col_chunk_index * wide + rows
    slots_a = (l_rows, t_rows, u_rows)
    slots_b = (l_rows + peer_l, t_rows + peer_t, u_rows + peer_t)
    at = (z_row, z_col)
    for col in tl.range(col_lo, col_hi, V.cols, num_stages=1):
        columns_a = tl.full([V.rows // 16, 8, V.cols], 0.0, tl.float32)
        columns_b = columns_a
        first, diagonal, edges, lo, hi = walk(col, row_lo, row_hi, N, V, SAME)
        for k in tl.range(0, edges, num_stages=1):
            row = tl.where(k < diagonal, first + k * V.rows, hi + (k - diagonal) * V.rows)
            columns_a, columns_b = _add_tile(
                z, at, (row, col, N, lo), columns_a, columns_b, slots_a, slots_b, distill, V, SAME, True
            )
        for row in range(lo, hi, V.rows):
            columns_a, columns_b = _add_tile(
                z, at, (row, col, N, lo), columns_a, columns_b, slots_a, slots_b, distill, V, SAME, False
            )
        if V.contrast:
            tl.store(l_cols + col, tl.sum(tl.sum(columns_a, axis=0), axis=0))
            if V.peers == 2:
                tl.store(l_cols + peer_l + col, tl.sum(tl.sum(columns_b, axis=0), axis=0))


@triton.jit
def stats_kernel(
    a_rows, a_cols, b_rows, b_cols,  # descriptors of z, [2 pitch, P], in blocks of V.rows and of V.cols
    l_parts,  # [peers, 2 C + R, 2 pitch] zeros, out: parts of l
    t_parts,  # [peers, C, pitch] zeros, out: parts of t
    u_parts,  # [peers, C, pitch] zeros, out: parts of sum_j x_ij (s_ij - other peer's s_ij), where V.valued
    N, pitch, R, Q, col_chunk, rank, world, distill,
    V: tl.constexpr,
):  # fmt: skip
    """One chunk a program; the chunks go round the ranks, each of which holds all of z."""
    task = tl.program_id(0) * world + rank
    same, view, row_chunk_index, col_chunk_index = locate(task, R, Q)
    row_lo = row_chunk_index * col_chunk * Q
    col_lo = col_chunk_index * col_chunk
    col_hi = tl.where(view < 2, tl.minimum(col_lo + col_chunk, N), 0)  # the last ranks may have one chunk fewer
    bounds = (row_lo, row_lo + col_chunk * Q, col_lo, col_hi)
    z, parts = (a_rows, a_cols, b_rows, b_cols), (l_parts, t_parts, u_parts)
    sizes = (N, pitch, R, R * Q)
    if same:
        if V.contrast:
            _add_chunk(z, parts, bounds, view, row_chunk_index, col_chunk_index, sizes, distill, V, True)
    else:
        _add_chunk(z, parts, bounds, view, row_chunk_index, col_chunk_index, sizes, distill, V, False)


def task_count(R: int, Q: int, *, contrast: bool) -> int:
    """Chunks over all ranks; without NT-Xent only those of view 1 x view 2."""
    return R * R * Q + (R * (R + 1) * Q if contrast else 0)
