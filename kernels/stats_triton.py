"""Pass 1 of the fused losses: the sums of each row's exponentials, over half of the pairs.

Legend
  N  images of the global batch   pitch  rows that a view takes up in z (N and padding)   M = 2N rows of both views
  e_ij, x_ij  exponentials of a pair at NT-Xent's and the KL's temperature (pairs_triton.py)
  V.rows x V.cols  a tile;  a chunk is row_chunk x col_chunk pairs of one block, the work of one program
  Q = row_chunk / col_chunk;  R, C  chunks of a view's rows and columns, C = R Q

    l'_i = sum e_ij over both views without i and its positive      t'_i = sum x_ij, row i of view 1, j over view 2,
                                                                      without the positive

The matrix of exponentials is symmetric, since nothing is subtracted from a logit, so a tile serves its rows and its
columns.  Of the four blocks (view 1 or 2) x (view 1 or 2), the two on the diagonal are visited from their diagonal
down, view 1 x view 2 whole, its mirror image never: M^2 / 2 pairs.  A tile that holds a piece of the diagonal serves
its rows alone; the tiles of the square that it belongs to (the tile's longer side) cover both orders of its pairs.

A program keeps V.cols columns where they are and walks down the rows.  Column sums stay in registers, one partial a
thread (a thread owns rows r and r + 8 of a warp's 16 in the layout of a tensor-core product, so the sum over those two
and over warps' slabs needs no exchange; `tl.sum(e, 0)` in the loop cost 18.75 shuffles a pair).  Row sums go to a slot
that no other program touches, in program order, so that a sum has one order of additions: results are equal to the bit
in every run.  The additions there are atomics because those do not wait for an answer, not because anyone competes.

A program has room of its own for the sums of its rows and of its columns, nothing for chunks that are never visited:
R (Q + 1) floats a row of z for l, over all ranks.  gather_tasks_kernel adds them up, in one order.

Left out is the positive pair too (where view 1 meets view 2 on its diagonal): where a row has learned its positive,
what is left beside it decides, and a sum with the positive in it would round that away (finish_triton.py adds it).
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
    """The row tiles under column tile `col`: (first, diagonal, edges, tail, lo, count).

    Edge tiles need masks: the `diagonal` ones from `first` on, and those that reach over N, from `tail` on; `edges`
    counts both.  The `count` others begin at lo; where they meet the diagonal ones they go on behind them.
    SAME: nothing above the diagonal.
    """
    SIDE: tl.constexpr = max(V.rows, V.cols)
    row_hi = tl.minimum(row_hi, N)
    first = col // SIDE * SIDE
    here = (first >= row_lo) & (first < row_hi)
    diagonal = tl.where(here, (tl.minimum(first + SIDE, row_hi) - first + V.rows - 1) // V.rows, 0)
    after = first + diagonal * V.rows
    whole = row_hi // V.rows * V.rows
    covered = here & (after > whole)  # the tile that reaches over N is on the diagonal
    ragged = col + V.cols > N  # no tile of this column is without masks
    if SAME:
        lo = tl.where(here, after, row_lo)
        end = row_hi
        count = tl.maximum(whole - lo, 0) // V.rows
    else:
        lo = row_lo
        end = tl.where(here, first, row_hi)  # where `ragged`: the diagonal's square is the last
        count = tl.where(covered, first - lo, whole - lo) // V.rows - tl.where(here & (after <= whole), diagonal, 0)
    tail = tl.where(ragged, lo, whole)
    beyond = tl.where(
        ragged, (tl.maximum(end - lo, 0) + V.rows - 1) // V.rows, tl.where(covered, 0, (row_hi > whole).to(tl.int32))
    )
    return first, diagonal, diagonal + beyond, tail, lo, tl.where(ragged, 0, count)


@triton.jit
def edge_row(k, first, diagonal, tail, V: tl.constexpr):
    """Where the k-th edge tile begins."""
    return tl.where(k < diagonal, first + k * V.rows, tail + (k - diagonal) * V.rows)


@triton.jit
def inner_row(k, first, diagonal, lo, V: tl.constexpr, SAME: tl.constexpr):
    """Where the k-th tile without masks begins."""
    row = lo + k * V.rows
    if SAME:
        return row
    else:
        return row + tl.where((diagonal > 0) & (row >= first), diagonal * V.rows, 0)


@triton.jit
def _column_partial(e, V: tl.constexpr):
    """[rows, cols] -> [rows / 16, 8, cols]: the part of a column's sum that lies within a thread."""
    return tl.sum(tl.reshape(e, [V.rows // 16, 2, 8, V.cols]), axis=1)


@triton.jit
def _add_peer(
    s, other, columns, slots, row, col, N, below, logits,
    V: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One peer's share of a tile: adds to its rows' slots, returns the column partials [rows / 16, 8, cols]."""
    l_rows, t_rows, u_rows = slots
    e, x = exponentials(s, logits, V)
    if EDGE:
        i = row + tl.arange(0, V.rows)[:, None]
        j = col + tl.arange(0, V.cols)[None, :]
        counts = (i < N) & (j < N) & (i != j)  # not itself, and not its positive
        x = tl.where(counts, x, 0.0)
        e = tl.where(counts, e, 0.0)
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
    z, at, place, columns_a, columns_b, slots_a, slots_b, logits,
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
        columns_b = _add_peer(s_b, s_a, columns_b, slots_b, row, col, N, below, logits, V, SAME, EDGE)
    columns_a = _add_peer(s_a, s_b, columns_a, slots_a, row, col, N, below, logits, V, SAME, EDGE)
    return columns_a, columns_b


@triton.jit
def _add_chunk(z, parts, bounds, view, task, sizes, logits, V: tl.constexpr, SAME: tl.constexpr):
    """All tiles of a chunk, into the room of the `task`-th program of this rank."""
    l_rows, l_cols, t_rows, u_rows = parts
    row_lo, row_hi, col_lo, col_hi = bounds
    N, pitch, row_chunk, col_chunk, tasks, cross_tasks = sizes
    task = tl.cast(task, tl.int64)
    l_rows += task * row_chunk - row_lo + tl.arange(0, V.rows)
    l_cols += task * col_chunk - col_lo + tl.arange(0, V.cols)
    t_rows += task * row_chunk - row_lo + tl.arange(0, V.rows)
    u_rows += task * row_chunk - row_lo + tl.arange(0, V.rows)
    # Peer b's room lies this far behind peer a's.
    peer_l, peer_t = tl.cast(tasks, tl.int64) * row_chunk, tl.cast(cross_tasks, tl.int64) * row_chunk
    slots_a = (l_rows, t_rows, u_rows)
    slots_b = (l_rows + peer_l, t_rows + peer_t, u_rows + peer_t)
    z_row = view * pitch if SAME else pitch * 0
    at = (z_row, z_row if SAME else pitch)
    for col in tl.range(col_lo, col_hi, V.cols, num_stages=1):
        columns_a = tl.full([V.rows // 16, 8, V.cols], 0.0, tl.float32)
        columns_b = columns_a
        first, diagonal, edges, tail, lo, count = walk(col, row_lo, row_hi, N, V, SAME)
        for k in tl.range(0, edges, num_stages=1):
            row = edge_row(k, first, diagonal, tail, V)
            columns_a, columns_b = _add_tile(
                z, at, (row, col, N, lo), columns_a, columns_b, slots_a, slots_b, logits, V, SAME, True
            )
        for k in range(0, count):
            row = inner_row(k, first, diagonal, lo, V, SAME)
            columns_a, columns_b = _add_tile(
                z, at, (row, col, N, lo), columns_a, columns_b, slots_a, slots_b, logits, V, SAME, False
            )
        if V.contrast:
            tl.store(l_cols + col, tl.sum(tl.sum(columns_a, axis=0), axis=0))
            if V.peers == 2:
                behind = tl.cast(tasks, tl.int64) * col_chunk
                tl.store(l_cols + behind + col, tl.sum(tl.sum(columns_b, axis=0), axis=0))


@triton.jit
def stats_kernel(
    a_rows, a_cols, b_rows, b_cols,  # descriptors of z, [2 pitch, P], in blocks of V.rows and of V.cols
    l_rows,  # [peers, tasks, row_chunk] zeros, out: sums of e over a chunk's columns
    l_cols,  # [peers, tasks, col_chunk] zeros, out: sums of e over a chunk's rows
    t_rows,  # [peers, cross_tasks, row_chunk] zeros, out: sums of x over a chunk's columns
    u_rows,  # [peers, cross_tasks, row_chunk] zeros, out: of x (s - the other peer's s), where V.valued
    N, pitch, R, Q, col_chunk, tasks, cross_tasks, rank, world, contrast, distill,
    V: tl.constexpr,
):  # fmt: skip
    """One chunk a program; the chunks go round the ranks, each of which holds all of z."""
    local = tl.program_id(0)
    same, view, row_chunk_index, col_chunk_index = locate(local * world + rank, R, Q)
    row_chunk = col_chunk * Q
    row_lo = row_chunk_index * row_chunk
    col_lo = col_chunk_index * col_chunk
    col_hi = tl.where(view < 2, tl.minimum(col_lo + col_chunk, N), 0)  # the last ranks may have one chunk fewer
    bounds = (row_lo, row_lo + row_chunk, col_lo, col_hi)
    z, parts = (a_rows, a_cols, b_rows, b_cols), (l_rows, l_cols, t_rows, u_rows)
    sizes, logits = (N, pitch, row_chunk, col_chunk, tasks, cross_tasks), (contrast, distill)
    if same:
        if V.contrast:
            _add_chunk(z, parts, bounds, view, local, sizes, logits, V, True)
    else:
        _add_chunk(z, parts, bounds, view, local, sizes, logits, V, False)


@triton.jit
def _of_task(parts, task, chunk, place, rank, world):
    """What `task` has for the block of images at `place` in its chunk; zeros where another rank did it."""
    local = tl.cast(task // world, tl.int64)
    return tl.load(parts + local * chunk + place, mask=place < tl.where(task % world == rank, chunk, 0), other=0.0)


@triton.jit
def gather_tasks_kernel(
    l_rows, l_cols, t_rows, u_rows,  # as stats_kernel left them
    positive_a, positive_b,  # [n] s of each image of this rank with itself in the other view
    sums,  # [peers, 4, pitch] out, of this rank: l' of view 1 and 2, t', s of the positive; VALUED: 5, and u'
    N, n, pitch, first, R, Q, col_chunk, tasks, cross_tasks, rank, world,
    BLOCK: tl.constexpr, CONTRAST: tl.constexpr, DISTILL: tl.constexpr, VALUED: tl.constexpr,
):  # fmt: skip
    """BLOCK images a program, of one peer; `first` is the place of this rank's first image."""
    begin = tl.program_id(0) * BLOCK
    peer = tl.program_id(1)
    i = begin + tl.arange(0, BLOCK)
    row_chunk = col_chunk * Q
    row, col = begin // row_chunk, begin // col_chunk  # its chunks
    in_rows, in_cols = i - row * row_chunk, i - col * col_chunk
    l_rows += tl.cast(peer * tasks, tl.int64) * row_chunk
    l_cols += tl.cast(peer * tasks, tl.int64) * col_chunk
    t_rows += tl.cast(peer * cross_tasks, tl.int64) * row_chunk
    u_rows += tl.cast(peer * cross_tasks, tl.int64) * row_chunk
    sums += tl.cast(peer * (4 + VALUED), tl.int64) * pitch + i
    nothing = tl.zeros([BLOCK], tl.float32)
    t, u = nothing, nothing
    for view in tl.static_range(2):
        total = nothing
        if view == 0:
            for k in range(0, R * Q):
                task = row * R * Q + k
                if CONTRAST:
                    total += _of_task(l_rows, task, row_chunk, in_rows, rank, world)
                if DISTILL:
                    t += _of_task(t_rows, task, row_chunk, in_rows, rank, world)
                if VALUED:
                    u += _of_task(u_rows, task, row_chunk, in_rows, rank, world)
        elif CONTRAST:
            for k in range(0, R):
                total += _of_task(l_cols, k * R * Q + col, col_chunk, in_cols, rank, world)
        if CONTRAST:
            block = R * R * Q + view * (R * (R + 1) // 2 * Q)  # the first task of this view with itself
            for k in range(0, (row + 1) * Q):
                total += _of_task(l_rows, block + row * (row + 1) // 2 * Q + k, row_chunk, in_rows, rank, world)
            for k in range(row, R):
                total += _of_task(l_cols, block + k * (k + 1) // 2 * Q + col, col_chunk, in_cols, rank, world)
        tl.store(sums + view * pitch, total)
    tl.store(sums + 2 * pitch, t)
    own = (i >= first) & (i < first + n)
    if peer == 0:
        tl.store(sums + 3 * pitch, tl.load(positive_a + i - first, mask=own, other=0.0))
    else:
        tl.store(sums + 3 * pitch, tl.load(positive_b + i - first, mask=own, other=0.0))
    if VALUED:
        tl.store(sums + 4 * pitch, u)


def task_count(R: int, Q: int, *, contrast: bool) -> int:
    """Chunks over all ranks; without NT-Xent only those of view 1 x view 2."""
    return R * R * Q + (R * (R + 1) * Q if contrast else 0)
