"""What passes 1 and 2 do to a tile of pairs (i, j) before either adds it up.

Legend
  s = z_i.z_j      logit of base 2: log2(e) / tau times the cosine, of the temperature that `scale` was chosen for
  e = 2^(s contrast), x = 2^(s distill)      the terms of NT-Xent's and of the KL's softmax, no offset (tiles.py)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(z_rows, z_cols, row, col, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Products [rows, cols] of the blocks of z that begin at `row` and `col`, in float32."""
    if WIDTH == DEPTH:
        return tl.dot(z_rows.load([row, 0]), z_cols.load([col, 0]).T, input_precision="ieee")
    else:
        s = tl.dot(z_rows.load([row, 0]), z_cols.load([col, 0]).T, input_precision="ieee")
        for k in range(DEPTH, WIDTH, DEPTH):
            s = tl.dot(z_rows.load([row, k]), z_cols.load([col, k]).T, s, input_precision="ieee")
        return s


@triton.jit
def power(x, K: tl.constexpr):
    """x^K for K in 1..8, at most three multiplications deep (an exponential is four times as slow)."""
    if K == 1:
        return x
    elif K == 2:
        return x * x
    elif K == 3:
        return x * x * x
    elif K == 4:
        return power(x * x, 2)
    elif K == 5:
        return x * power(x * x, 2)
    elif K == 6:
        return power(x * x * x, 2)
    elif K == 7:
        return x * power(x * x * x, 2)
    else:
        return power(power(x * x, 2), 2)


@triton.jit
def exponentials(s, logits, V: tl.constexpr):
    """(e, x) of a tile: one exponential where the temperatures are a small integer apart, else two."""
    contrast, distill = logits
    if V.power > 0:
        e = tl.exp2(s)
        return e, power(e, V.power)
    elif V.power < 0:
        x = tl.exp2(s)
        return power(x, -V.power), x
    else:
        return tl.exp2(s * contrast), tl.exp2(s * distill)
