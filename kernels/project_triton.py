"""The end of pass 2: from sums of weighted unit vectors to the gradient of raw embeddings.

Legend
  n  images of this rank     D  embedding width, P padded     g = sum_j W_ij z_j, no positives (gradient_triton.py)
  u_i = x_i / |x_i|, taken from the raw embedding: float16 is for sums over many columns, not for a single vector

    h_i = factor * (g_i + w_i u_pos)                                    gradient of u_i, w of finish_triton.py
    gradient of x_i = (h_i - u_i (u_i . h_i)) / |x_i|                     through the normalisation
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _unit(raw, image, cols, n, D):
    """Unit rows [rows, P] of one view and 1 / norm [rows]; raw = (embeddings, row stride, column stride, 1 / norms)."""
    x, stride_row, stride_col, inverse_norm = raw
    inverse = tl.load(inverse_norm + image, mask=image < n, other=0.0)
    at = image.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    mask = (image < n)[:, None] & (cols < D)[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None], inverse


@triton.jit
def project(g, image, own, other, weight, n, D, factors, P: tl.constexpr):
    """[rows, P] gradient of the raw embeddings `own` of `image`; `other` holds their positives, both as in `_unit`."""
    g_factor, positive_factor = factors
    cols = tl.arange(0, P)
    u_pos, _ = _unit(other, image, cols, n, D)
    h = g * g_factor + u_pos * (weight * positive_factor)[:, None]
    u, inverse = _unit(own, image, cols, n, D)
    return (h - u * tl.sum(u * h, axis=1)[:, None]) * inverse[:, None]


@triton.jit
def store_rows(out, dx, image, n, D, P: tl.constexpr):
    """Rows [rows, P] into out [n, D]."""
    cols = tl.arange(0, P)
    at = image.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out + at, dx, mask=(image < n)[:, None] & (cols < D)[None, :])


@triton.jit
def project_kernel(
    g,  # [splits, 2, rows, WIDTH] float32: images begin .. begin + rows of this rank
    x, y,  # [n, D] raw
    inverse_norm,  # [2, n]
    positive_weights,  # [n]
    out,  # [2, n, D] float32
    begin, rows, n, D, splits, g_factor, positive_factor,
    x_row, x_col, y_row, y_col,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK images a program of one view; P is the power of two that holds WIDTH."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    view = tl.program_id(1)
    cols = tl.arange(0, P)
    inside = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    at = (view * rows + row).to(tl.int64)[:, None] * WIDTH + cols[None, :]
    stride = tl.cast(rows, tl.int64) * (2 * WIDTH)
    total = tl.load(g + at, mask=inside, other=0.0)
    for k in range(1, splits):
        total += tl.load(g + k * stride + at, mask=inside, other=0.0)
    image = tl.where(row < rows, begin + row, n)  # n: nothing there
    weight = tl.load(positive_weights + image, mask=image < n, other=0.0)
    first, second = (x, x_row, x_col, inverse_norm), (y, y_row, y_col, inverse_norm + n)
    factors = (g_factor, positive_factor)
    if view == 0:
        dx = project(total, image, first, second, weight, n, D, factors, P)
    else:
        dx = project(total, image, second, first, weight, n, D, factors, P)
    store_rows(out + view * tl.cast(n, tl.int64) * D, dx, image, n, D, P)


@triton.jit
def strip_product_kernel(
    strip,  # [2, rows, 2 pitch] weights of the images of one strip, both views
    z,  # [2 pitch, WIDTH]
    g,  # [2, rows, WIDTH] float32 out
    rows, N, pitch,
    WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr, CONTRAST: tl.constexpr,
):  # fmt: skip
    """g = strip @ z; without NT-Xent only the columns of the other view have weights."""
    view = tl.program_id(2)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BW + tl.arange(0, BW)
    k = tl.arange(0, BK)
    weights = strip + (view * rows + row).to(tl.int64)[:, None] * (2 * pitch) + k[None, :]
    vectors = z + k.to(tl.int64)[:, None] * WIDTH + col[None, :]
    total = tl.zeros([BM, BW], tl.float32)
    for other in range(0, 2):
        visited = (view != other) | CONTRAST
        start = tl.cast(other * pitch, tl.int64)
        for begin in range(0, tl.where(visited, N, 0), BK):
            inside = begin + k < N  # what lies behind was never written
            w = tl.load(weights + (start + begin), mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            v = tl.load(vectors + (start + begin) * WIDTH, mask=(col < WIDTH)[None, :], other=0.0)
            total = tl.dot(w, v, total, input_precision="ieee")
    at = (view * rows + row).to(tl.int64)[:, None] * WIDTH + col[None, :]
    tl.store(g + at, total, mask=(row < rows)[:, None] & (col < WIDTH)[None, :])
