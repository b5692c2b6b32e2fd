"""Divergences between the similarity distributions of one strip of rows, and their derivatives.

Legend
  r, C  rows of the strip, and columns        D  embedding width        tau  temperature
  P, Q  distributions of a row, of the student and of its teachers        M = (P + Q) / 2

Derivatives G [r, C] are with respect to the student's logits, Q held:

    kl            KL(Q || P)              G_j = P_j - Q_j
    reverse_kl    KL(P || Q)                  = P_j (log(P_j / Q_j) - KL(P || Q))
    jeffreys      1/2 the sum of both         = 1/2 the sum of both
    js            definition in               = 1/2 P_j (log(P_j / M_j) - KL(P || M))
                  reference_distill.py

Everything is kept in logarithms, where a temperature of 0.02 takes no digits away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference_distill import Term

# A logit of self-similarity, which is to be no column: finite, as 0 times infinity would be NaN, and so far below any
# other that its probability is exactly zero.
LEFT_OUT = -1e30

Networks = tuple[int, ...]  # one, or several whose distributions are averaged


class Strip:
    """The distributions of a strip of rows, each computed when it is first asked for and kept for other terms."""

    def __init__(
        self,
        rows: dict[int, Tensor],  # unit rows [r, D] a network
        columns: dict[int, Tensor],  # unit rows [C, D] a network
        tau: float,
        self_column: int | None,  # of the first row; None where self-similarity is a column like any other
    ):
        self.rows, self.columns, self.tau, self.self_column = rows, columns, tau, self_column
        self._logs: dict[Networks, Tensor] = {}
        self._exps: dict[Networks, Tensor] = {}

    def log(self, networks: Networks) -> Tensor:
        """Log of the mean of the networks' distributions, [r, C]."""
        if networks not in self._logs:
            first, *others = networks
            self._logs[networks] = self._log_mean(networks) if others else self._log_softmax(first)
        return self._logs[networks]

    def exp(self, networks: Networks) -> Tensor:
        """The mean of the networks' distributions, [r, C]."""
        if networks not in self._exps:
            self._exps[networks] = self.log(networks).exp()
        return self._exps[networks]

    def _log_softmax(self, network: int) -> Tensor:
        logits = (self.rows[network] @ self.columns[network].T).div_(self.tau)
        if self.self_column is not None:
            logits.diagonal(self.self_column).fill_(LEFT_OUT)
        return logits.log_softmax(dim=1)

    def _log_mean(self, networks: Networks) -> Tensor:
        total = torch.logaddexp(self.log(networks[:1]), self.log(networks[1:2]))
        for network in networks[2:]:
            torch.logaddexp(total, self.log((network,)), out=total)
        return total.sub_(math.log(len(networks)))


def matrices(terms: Sequence[Term]) -> int:
    """How many matrices [r, C] a strip holds at once, at most."""
    distributions: set[Networks] = {(network,) for student, teachers in terms for network in (student, *teachers)}
    distributions |= {tuple(teachers) for _, teachers in terms}
    return 2 * len(distributions) + 3  # with their logarithms; and three that a divergence works in


def divergence(
    strip: Strip, p: Networks, q: Networks, kind: str, partition: bool, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [r], G [r, C] where wanted, 1 or 0 [r] for rows that count or not) of student p and teachers q."""
    value, slope = _KINDS[kind](strip, p, q, wanted)
    if not partition:
        return value, slope, torch.ones_like(value)
    # The comparison is one that NaN fails: a row of NaN counts.
    left_out = strip.log(q).amax(dim=1) <= strip.log(p).amax(dim=1)
    if wanted:
        slope.masked_fill_(left_out[:, None], 0)
    return value.masked_fill_(left_out, 0), slope, (~left_out).to(value.dtype)


def _kl(strip: Strip, p: Networks, q: Networks, wanted: bool) -> tuple[Tensor, Tensor]:
    room = strip.log(q) - strip.log(p)
    value = room.mul_(strip.exp(q)).sum(dim=1)
    return value, torch.sub(strip.exp(p), strip.exp(q), out=room) if wanted else room


def _reverse_kl(strip: Strip, p: Networks, q: Networks, wanted: bool) -> tuple[Tensor, Tensor]:
    room = torch.sub(strip.log(p), strip.log(q)).mul_(strip.exp(p))
    return _own(room, strip.exp(p), wanted)


def _jeffreys(strip: Strip, p: Networks, q: Networks, wanted: bool) -> tuple[Tensor, Tensor]:
    ratio = strip.log(p) - strip.log(q)
    room = ratio * strip.exp(q)
    forward = room.sum(dim=1)
    reverse, slope = _own(ratio.mul_(strip.exp(p)), strip.exp(p), wanted)
    if wanted:
        slope.add_(torch.sub(strip.exp(p), strip.exp(q), out=room)).mul_(0.5)
    return (reverse - forward).mul_(0.5), slope


def _js(strip: Strip, p: Networks, q: Networks, wanted: bool) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(strip.log(p), strip.log(q)).sub_(math.log(2))
    theirs = torch.sub(strip.log(q), log_m).mul_(strip.exp(q)).sum(dim=1)
    ours, slope = _own(torch.sub(strip.log(p), log_m, out=log_m).mul_(strip.exp(p)), strip.exp(p), wanted)
    return (ours + theirs).mul_(0.5), slope.mul_(0.5) if wanted else slope


def _own(products: Tensor, p: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """KL(P || A) [r] and P_j (log(P_j / A_j) - KL(P || A)), in place, from P_j log(P_j / A_j) [r, C]."""
    value = products.sum(dim=1)
    return value, products.addcmul_(p, value[:, None], value=-1) if wanted else products


_KINDS = {"kl": _kl, "reverse_kl": _reverse_kl, "jeffreys": _jeffreys, "js": _js}
