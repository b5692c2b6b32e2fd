"""Between and behind the passes: what pass 2 multiplies with, the positive pairs, and the values of the losses.

Legend
  n  images of this rank, N of all ranks     pitch  rows that a view takes up
  l'_i, t'_i  row sums of pass 1, without the positive;  s_pos  the product of an image's two views
  l = l' + e_pos, t = t' + x_pos       safe variant: everything in logarithms of base 2
  weight_scale  what weights W_ij are multiplied with, so that float16 holds them (gradient_triton.py)

    left_i = l'_i / l_i       what a row gives to others than its positive: 1 - P(positive), without cancellation
    ntxent_i = ln l_i - ln e_pos = log1p(l'_i / e_pos)
    KL of view 1's row i, the positive's part: P_b (ln P_b - ln P_a), and with rho = t' / t, P(positive) = 1 - rho

Weight of the positive in the gradient, for both views of an image alike: e_pos / l_1 - 1 + e_pos / l_2 - 1 of NT-Xent
is -(left_1 + left_2); P_a - P_b of the KL is rho_b - rho_a.  Small where a row has learned its positive, and exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _with_positive(rest, s_pos, logit, SAFE: tl.constexpr):
    """(sum or its log2, share of the rest, log1p(rest / positive)) of rows whose sum without the positive is `rest`."""
    pos = s_pos * logit  # log2 of the positive's exponential
    if SAFE:
        total = tl.maximum(rest, pos) + tl.log2(1.0 + tl.exp2(-tl.abs(rest - pos)))
        share = tl.exp2(rest - total)
        ratio = tl.exp2(rest - pos)
        log_total = total
    else:
        e_pos = tl.exp2(pos)
        total = rest + e_pos
        share = rest / total
        ratio = rest / e_pos
        log_total = tl.log2(total)
    # log1p(r) = 2 artanh(r / (2 + r)); at r = 0.5 the first term left out is 1e-9 of the sum.  The hardware's logarithm
    # has an absolute error of 1e-7 near 1.
    q = ratio / (2.0 + ratio)
    q2 = q * q
    series = 2.0 * q * (1.0 + q2 * (1 / 3 + q2 * (1 / 5 + q2 * (1 / 7 + q2 * (1 / 9 + q2 * (1 / 11))))))
    return total, share, tl.where(ratio < 0.5, series, (log_total - pos) * LN_2)


@triton.jit
def _inverse(total, real, weight_scale, SAFE: tl.constexpr):
    """weight_scale / total, or the logarithm that it is given; such that rows that are not there weigh nothing."""
    if SAFE:
        return tl.where(real, total, float("inf"))
    else:
        return tl.where(real, weight_scale / total, 0.0)


@triton.jit
def _load_sums(sums, peer, which, wide, i, real, VALUED: tl.constexpr):
    return tl.load(sums + (peer * (4 + VALUED) + which) * wide + i, mask=real, other=1.0)


@triton.jit
def finish_kernel(
    sums,  # [peers, 4, pitch] l' of view 1 and 2, t', s of the positive;  VALUED: 5, and u';  SAFE: log2 of l', t'
    inverse_l,  # [peers, 2, pitch] out: weight_scale / l, 0 behind N;  SAFE: log2 l, infinite behind N
    inverse_t,  # [peers, pitch] out: likewise 1 / t
    positive_weights,  # [peers, n] out: the positive's weight in the gradient of either view
    contrast_terms,  # [peers, 2, n] out: NT-Xent of each row of this rank
    kl_terms,  # [peers, splits + 1, n] out, in the last place: the positive's part of the KL;  VALUED: all of it
    N, n, pitch, splits, first, contrast, distill, kappa_a, kappa_b, weight_scale_a, weight_scale_b,
    BLOCK: tl.constexpr, PEERS: tl.constexpr,
    CONTRAST: tl.constexpr, DISTILL: tl.constexpr, VALUED: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """BLOCK images a program, both views and peers; `first` is the place of this rank's first image."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = i - first
    own = (local >= 0) & (local < n)
    real = i < N
    wide = tl.cast(pitch, tl.int64)
    for peer in tl.static_range(PEERS):
        s_pos = _load_sums(sums, peer, 3, wide, i, real, VALUED)
        weight = tl.zeros([BLOCK], tl.float32)
        if CONTRAST:
            for view in tl.static_range(2):
                rest = _load_sums(sums, peer, view, wide, i, real, VALUED)
                total, left, term = _with_positive(rest, s_pos, contrast, SAFE)
                scale = weight_scale_a if peer == 0 else weight_scale_b
                tl.store(inverse_l + (peer * 2 + view) * wide + i, _inverse(total, real, scale, SAFE))
                tl.store(contrast_terms + (peer * 2 + view) * n + local, term, mask=own)
                weight -= left
        if DISTILL:
            rest = _load_sums(sums, peer, 2, wide, i, real, VALUED)
            rest_other = _load_sums(sums, 1 - peer, 2, wide, i, real, VALUED)
            other_s_pos = _load_sums(sums, 1 - peer, 3, wide, i, real, VALUED)
            t, rho, log_ratio = _with_positive(rest, s_pos, distill, SAFE)
            t_other, rho_other, log_ratio_other = _with_positive(rest_other, other_s_pos, distill, SAFE)
            tl.store(inverse_t + peer * wide + i, _inverse(t, real, 1.0, SAFE))
            weight += (kappa_a if peer == 0 else kappa_b) * (rho_other - rho)
            kl = (1.0 - rho_other) * (log_ratio - log_ratio_other)
            if VALUED:
                # Logits against the positive's own, so that every term is small where rows have learned it.
                u_other = _load_sums(sums, 1 - peer, 4, wide, i, real, VALUED) / t_other
                kl = LN_2 * distill * (u_other - (other_s_pos - s_pos) * rho_other) + log_ratio - log_ratio_other
            tl.store(kl_terms + (peer * (splits + 1) + splits) * n + local, kl, mask=own)
        tl.store(positive_weights + peer * n + local, weight, mask=own)


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
    kl_terms,  # [peers, splits + 1, n]
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
            kl = _sum_rows(kl_terms + peer * (splits + 1) * n, (splits + 1) * n, BLOCK) * kl_share
        tl.store(loss_a if peer == 0 else loss_b, ntxent + kl * (weight_a if peer == 0 else weight_b))
        tl.store(terms + peer, ntxent)
        tl.store(terms + 2 + peer, kl)
