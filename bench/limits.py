"""The work of the two-pass algorithm, and the time below which a GPU cannot do it.

Legend
  M = 2N  rows of one peer      D  embedding width      both peers are counted together
  pass 1  row sums; a tile of the symmetric matrix serves its rows and its columns, so M^2 / 2 pairs
  pass 2  gradients, row by row: M^2 pairs; similarities are computed again, then multiplied as weights with z
  The KL lives on the N x N cross-view block: M^2 / 4 pairs, whose transpose pass 2 meets too (M^2 / 2).

Instructions are counted by hand, the fewest that the arithmetic between the two matrix products can do with; address
arithmetic, masks and the products' own instructions come on top.  Programs of this kind have been seen to compile to
17 (pass 1) and 23 (pass 2) a pair, so this limit is far looser than the other two.  Memory traffic is no limit: the
embeddings stay in the L2 cache.  Temperatures: tau_contrast / tau_distill is an integer, so that one exponential serves
both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

POWER = 3  # multiplications of x^5 = x (x^2)^2: tau 0.5 and 0.1

# Instructions a pair, both peers.
STATS_PAIR = 2 * 3  # exponential, sum of the row, sum of the column
STATS_CROSS = 2 * (POWER + 1)  # power, sum of the row
VALUE_CROSS = 1 + 2  # difference of both peers' logits, sum of its products with both peers' exponentials
GRADIENT_PAIR = 2 * 3.5  # exponential, 1 / l_i + 1 / l_j, product, conversion to 16 bit (two values at once)
GRADIENT_CROSS = 2 * (POWER + 2) + 1  # power, P, sum into the weight; difference of both peers' P


class Rates(NamedTuple):
    """What a device does in a second."""

    flops: float  # 16-bit tensor cores
    exponentials: float
    instructions: float  # of single threads


# Tensor cores: what large matrix products reach.  Others: units x clock (132 SM x 1.83 GHz; 16 and 128 a cycle).
RATES = {"NVIDIA H200": Rates(790e12, 3.86e12, 30.9e12)}


@dataclass(frozen=True)
class Work:
    """What one pass over both peers computes."""

    flops: float
    exponentials: float
    instructions: float


class Limits(NamedTuple):
    """Milliseconds that each unit of a device needs, were it the only one at work; None for an unknown device."""

    tensor_core: float
    exponentials: float
    issue: float


def stats_work(M: int, D: int, *, distill: bool, value: bool) -> Work:
    """Pass 1.  `value`: the KL's value is summed here, because no pass 2 follows."""
    cross = (STATS_CROSS + value * VALUE_CROSS) / 4 if distill else 0.0
    return Work(2.0 * M * M * D, M * M, (STATS_PAIR / 2 + cross) * M * M)


def gradient_work(M: int, D: int, *, distill: bool) -> Work:
    """Pass 2."""
    cross = GRADIENT_CROSS / 2 + VALUE_CROSS / 4 if distill else 0.0
    return Work(8.0 * M * M * D, 2 * M * M, (GRADIENT_PAIR + cross) * M * M)


def passes(M: int, D: int, *, distill: bool, backward: bool) -> list[Work]:
    """The passes of forward alone, or of forward and backward."""
    stats = stats_work(M, D, distill=distill, value=distill and not backward)
    return [stats, gradient_work(M, D, distill=distill)] if backward else [stats]


def limits(work: Work, rates: Rates) -> Limits:
    """The three limits of one pass in milliseconds."""
    return Limits(
        1e3 * work.flops / rates.flops,
        1e3 * work.exponentials / rates.exponentials,
        1e3 * work.instructions / rates.instructions,
    )


def total_limits(works: list[Work], device_name: str) -> Limits | None:
    """Each unit's milliseconds summed over the passes; None for a device whose rates are not in the table."""
    if device_name not in RATES:
        return None
    each = [limits(work, RATES[device_name]) for work in works]
    return Limits(*(sum(unit) for unit in zip(*each, strict=True)))


def floor_ms(works: list[Work], device_name: str) -> float | None:
    """The busiest unit of each pass, summed over passes, which run one after the other."""
    if device_name not in RATES:
        return None
    return sum(max(limits(work, RATES[device_name])) for work in works)
