"""Pass 0 of the fused losses: raw embeddings of both views -> scaled unit vectors in 16 bit, norms, positive logits.

Legend
  n  images of this rank     D  embedding width     WIDTH  D padded, zeros behind D     P  power of two >= WIDTH
  pitch  rows that each view takes up in `z`, at least n; the rows behind n are zeros

    z_i = scale * x_i / |x_i|       so that z_i.z_j is the cosine times scale^2: the logit in units of log 2

Zeros behind D and behind n add nothing to a product, so no later tile masks them for the gradient's sake.  16 bit means
float16: its error on unit vectors is an eighth of bfloat16's at the same tensor-core rate (2e-4 against 1.7e-3 of a
gradient at tau = 0.1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles

EPSILON = tl.constexpr(1e-12)  # as in reference.normalize: a row of zeros stays zero


@triton.jit
def _unit(raw, stride_row, stride_col, rows, cols, mask):
    """Unit rows [BLOCK, P] in float32 and 1 / norm [BLOCK]; by the largest entry first, since squares overflow."""
    x = tl.load(raw + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest == 0, 1.0, largest)
    x = x / largest[:, None]
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), EPSILON)
    # At most what float32 holds: infinity times an entry of zero would make the gradient NaN.
    return x / norm[:, None], tl.minimum(1.0 / norm / largest, 3.0e38)


@triton.jit
def embed_kernel(
    x, y,  # [n, D] raw embeddings of the two views
    z,  # [2, pitch, WIDTH] out: scaled unit vectors, view 1 first
    inverse_norm,  # [2, n] out
    positive,  # [n] out: z_x . z_y of each image, from the rounded vectors, so that it cancels what tiles compute
    n, D, pitch, scale,
    x_row, x_col, y_row, y_col,  # strides
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, P).to(tl.int64)
    mask = (rows[:, None] < n) & (cols[None, :] < D)
    unit_x, inverse_x = _unit(x, x_row, x_col, rows, cols, mask)
    unit_y, inverse_y = _unit(y, y_row, y_col, rows, cols, mask)
    z_x = (unit_x * scale).to(z.dtype.element_ty)
    z_y = (unit_y * scale).to(z.dtype.element_ty)
    out = rows[:, None] * WIDTH + cols[None, :]
    inside = (rows[:, None] < pitch) & (cols[None, :] < WIDTH)
    tl.store(z + out, z_x, mask=inside)
    tl.store(z + tl.cast(pitch, tl.int64) * WIDTH + out, z_y, mask=inside)
    tl.store(inverse_norm + rows, inverse_x, mask=rows < n)
    tl.store(inverse_norm + n + rows, inverse_y, mask=rows < n)
    tl.store(positive + rows, tl.sum(z_x.to(tl.float32) * z_y.to(tl.float32), axis=1), mask=rows < n)


def embed(
    x: Tensor,  # [n, D]
    y: Tensor,  # [n, D]
    *,
    scale: float,
    width: int,  # WIDTH
    pitch: int,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z [2, pitch, width], 1 / norms [2, n] float32, positive logits [n] float32) of the two views of n images."""
    n, D = x.shape
    z = x.new_empty((2, pitch, width), dtype=dtype)
    inverse_norm = x.new_empty((2, n), dtype=torch.float32)
    positive = x.new_empty(n, dtype=torch.float32)
    P = triton.next_power_of_2(width)
    block = max(1, 2048 // P)
    tiles.launch(
        embed_kernel, (triton.cdiv(pitch, block),), x, y, z, inverse_norm, positive,
        n, D, pitch, scale, *x.stride(), *y.stride(),
        P=P, WIDTH=width, BLOCK=block,
    )  # fmt: skip
    return z, inverse_norm, positive
