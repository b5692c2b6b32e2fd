"""Between and behind the passes: sums of slots, what pass 2 multiplies with, and the values of the losses.

Legend
  n  images of this rank, N of all ranks     pitch  rows that a view takes up     S, C  slots of l and of t
  l_i, t_i  row sums of pass 1;  in the safe variant their logarithms of base 2
  W_ij  weight of row j in the gradient of row i, times `weight_scale`, so that float16 holds it (gradient_triton.py)

    ntxent = mean_i ln l_i - positive_i        kl_a = mean_i sum_j P_b (ln P_b - ln P_a)

Sums run in a fixed order: slots one after another, rows by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sum_slots(parts, slots, stride, offsets):
    """sum_k parts[k * stride + offsets], k in order."""
    total = tl.load(parts + offsets)
    for k in range(1, slots):
        total += tl.load(parts + k * stride + offsets)
    return total


@triton.jit
def gather_slots_kernel(
    parts,  # [outer, slots, inner]
    sums,  # [outer, inner] out
    slots, inner,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    outer = tl.program_id(1).to(tl.int64)
    wide = tl.cast(inner, tl.int64)
    tl.store(sums + outer * wide + offsets, sum_slots(parts + outer * slots * wide, slots, wide, offsets))


@triton.jit
def _inverse(total, real, weight_scale, SAFE: tl.constexpr):
    """weight_scale / total, or the logarithm that it is given; such that rows that are not there weigh nothing."""
    if SAFE:
        return tl.where(real, total, float("inf"))
    else:
        return tl.where(real, weight_scale / tl.where(real, total, 1.0), 0.0)


@triton.jit
def finish_kernel(
    l_parts,  # [peers, S, 2, pitch] parts of l;  SAFE: log2 l, S = 1
    t_parts,  # [peers, C, pitch] parts of t;  SAFE: log2 t, C = 1
    u_parts,  # [peers, C, pitch] parts of sum_j x_ij (s_ij - the other peer's s_ij), where VALUE
    positive_a, positive_b,  # [n] s of each image's two views
    inverse_l,  # [peers, 2, pitch] out: weight_scale / l, 0 behind N;  SAFE: log2 l, infinite behind N
    inverse_t,  # [peers, pitch] out: likewise for t
    contrast_terms,  # [peers, 2, n] out: NT-Xent of each row of this rank
    kl_terms,  # [peers, n] out, where VALUE: KL of each row of this rank
    N, n, pitch, S, C, first, contrast, distill, weight_scale,
    BLOCK: tl.constexpr, PEERS: tl.constexpr,
    CONTRAST: tl.constexpr, DISTILL: tl.constexpr, VALUE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """BLOCK images a program, both views and peers; `first` is the place of this rank's first image."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = i - first
    own = (local >= 0) & (local < n)
    wide = tl.cast(pitch, tl.int64)
    if CONTRAST:
        for peer in tl.static_range(PEERS):
            positive = positive_a if peer == 0 else positive_b
            pos = tl.load(positive + local, mask=own, other=0.0) * contrast
            for view in tl.static_range(2):
                total = sum_slots(l_parts + (peer * S * 2 + view) * wide, S, 2 * wide, i)
                log_l = total if SAFE else tl.log2(total)
                tl.store(inverse_l + (peer * 2 + view) * wide + i, _inverse(total, i < N, weight_scale, SAFE))
                tl.store(contrast_terms + (peer * 2 + view) * n + local, (log_l - pos) * LN_2, mask=own)
    if DISTILL:
        for peer in tl.static_range(PEERS):
            total = sum_slots(t_parts + peer * C * wide, C, wide, i)
            tl.store(inverse_t + peer * wide + i, _inverse(total, i < N, weight_scale, SAFE))
        if VALUE:
            t_a, t_b = sum_slots(t_parts, C, wide, i), sum_slots(t_parts + C * wide, C, wide, i)
            u_a, u_b = sum_slots(u_parts, C, wide, i), sum_slots(u_parts + C * wide, C, wide, i)
            log_ratio = tl.log2(t_a) - tl.log2(t_b)
            tl.store(kl_terms + local, (distill * (u_b / t_b) + log_ratio) * LN_2, mask=own)
            tl.store(kl_terms + n + local, (distill * (u_a / t_a) - log_ratio) * LN_2, mask=own)


@triton.jit
def _sum_rows(terms, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        total += tl.load(terms + rows, mask=rows < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def collect_kernel(
    contrast_terms,  # [peers, 2, n]
    kl_terms,  # [peers, splits, n]
    loss_a, loss_b,  # scalars out
    terms,  # [4] out: ntxent_a, ntxent_b, kl_a, kl_b; all of them this rank's share
    n, splits, contrast_share, kl_share, weight_a, weight_b,
    BLOCK: tl.constexpr, PEERS: tl.constexpr, CONTRAST: tl.constexpr, DISTILL: tl.constexpr,
):  # fmt: skip
    for peer in tl.static_range(2):
        ntxent = 0.0
        kl = 0.0
        if CONTRAST and peer < PEERS:
            ntxent = _sum_rows(contrast_terms + peer * 2 * n, 2 * n, BLOCK) * contrast_share
        if DISTILL and peer < PEERS:
            kl = _sum_rows(kl_terms + peer * splits * n, splits * n, BLOCK) * kl_share
        tl.store(loss_a if peer == 0 else loss_b, ntxent + kl * (weight_a if peer == 0 else weight_b))
        tl.store(terms + peer, ntxent)
        tl.store(terms + 2 + peer, kl)
