"""Shapes of the tiles, chosen on the host from sizes alone, and what the temperatures mean to the kernels.

Legend
  N  images of the global batch, M = 2N rows     D  embedding width     P  D padded
  a tile is `rows` x `cols` pairs; a chunk is the block of tiles that one program of pass 1 works through
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

LOG2_E = math.log2(math.e)
# Exponentials without an offset stay in float32's range for any data as long as a logit stays under 100 (in log 2):
# 2^100 times 2^26 rows is the largest sum.  With both signs that reaches to tau = 0.0145; an offset of 1 / tau, whose
# exponentials lie between 2^-200 and 1, would underflow already at 0.0229.
LARGEST_LOGIT = 100.0
LARGEST_POWER = 8  # beyond it a second exponential costs no more than the multiplications
BLOCK = 128  # every tile side divides it
WIDEST = 2048  # D that is tested


class Temperatures(NamedTuple):
    """How the kernels turn s = z_i.z_j into logits of base 2: s * contrast for NT-Xent, s * distill for the KL.

    `scale` is what unit vectors are multiplied with.  `power` k > 0: 2^(s distill) is (2^s)^k; k < 0: the other way
    round; 0: two exponentials.  `safe`: logits too large for sums without an offset.
    """

    scale: float
    contrast: float
    distill: float
    power: int
    safe: bool


def temperatures(tau_contrast: float | None, tau_distill: float | None) -> Temperatures:
    """The plan for NT-Xent at `tau_contrast` and a KL at `tau_distill`; None where the loss has no such term."""
    tau_c = tau_contrast if tau_contrast is not None else tau_distill
    tau_d = tau_distill if tau_distill is not None else tau_contrast
    assert tau_c is not None and tau_d is not None
    if LOG2_E / min(tau_c, tau_d) > LARGEST_LOGIT:
        # Not scaled: products of 16-bit numbers as large as these temperatures ask for could overflow.
        return Temperatures(1.0, LOG2_E / tau_c, LOG2_E / tau_d, 0, True)
    up, down = _integer(tau_c / tau_d), _integer(tau_d / tau_c)
    # 2^s serves the loss whose temperature is the integer multiple, its power the other; without one, the colder of the
    # two scales, so that float16 holds what matters to it.
    base = tau_c if up else tau_d if down else min(tau_c, tau_d)
    return Temperatures(math.sqrt(LOG2_E / base), base / tau_c, base / tau_d, up or -down, False)


def _integer(ratio: float) -> int:
    """`ratio` as a small integer, 0 where it is none."""
    nearest = round(ratio)
    # 0.3 / 0.1 is 2.9999999999999996; a relative 1e-9 of a logit below 100 is far below float32's rounding.
    return nearest if 1 <= nearest <= LARGEST_POWER and abs(ratio - nearest) < 1e-9 * nearest else 0


class Tile(NamedTuple):
    """One kernel's tile: rows x cols pairs, warps and stages as Triton means them."""

    rows: int
    cols: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of one generation of GPUs."""

    stats: Tile  # pass 1
    stats_value: Tile  # pass 1 with both peers at once, for the KL's value: forward alone
    gradient: Tile  # pass 2
    value_cols: int  # columns of pass 2's tiles where the KL's value is summed too
    narrow: int  # columns of pass 2's tiles with masks


# By compute capability, the newest that is not above the device's.  Chosen from what the compiler makes of them, at
# D = 128 and two peers (instructions, registers, spills: bench/budgets.json); no GPU has run them yet.
# sm_90: 64 rows and 4 warps leave room for two programs on a multiprocessor, which overlap products and exponentials of
# one another; 128 columns in pass 1 take 5.0 instructions a pair and peer, 64 columns 6.9.  Pass 2 at 64 columns uses
# every register: with masks (16 columns instead) and with the KL's value (32) it would spill 130 to 900 bytes.
# sm_80 has no wgmma and no bulk copies: 2 to 10 times the instructions, and with triton 3.6 up to 976 spilled bytes.
BY_CAPABILITY = {
    80: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), 32, 16),
    90: Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), 32, 16),
    100: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), 32, 16),
}


class Plan(NamedTuple):
    """Everything that follows from the sizes of one loss."""

    pitch: int  # rows that a view takes up
    width_a: int  # P of peer a
    width_b: int  # P of peer b; a's where there is one peer
    fused: bool  # pass 2 keeps the gradients of both peers in registers; else it writes strips of weights
    tiles: Tiles
    row_chunk: int
    col_chunk: int
    split: int  # programs that share the columns of one row block in pass 2

    def depths(self) -> tuple[int, int]:
        """Columns of z that one product takes, a peer: all of them, or a part where the rows do not fit."""
        return (self.width_a, self.width_b) if self.fused else (min(self.width_a, 64), min(self.width_b, 64))


# Columns of float32 gradient a row, both peers: 128 registers a thread at 64 rows and 4 warps, half of what there is.
FUSED_WIDTH = 256
PROGRAMS = 132  # multiprocessors of an H100 or H200


def padded_width(D: int) -> int:
    """The width that embeddings are stored with: what a tensor-core product takes, 16 at least."""
    return max(16, 1 << (D - 1).bit_length()) if D <= FUSED_WIDTH else -(-D // 64) * 64


def pitch(N: int) -> int:
    """Rows that a view of N images takes up: whole blocks, the last ones zeros."""
    return _up(N, BLOCK)


def plan(n: int, world: int, D_a: int, D_b: int | None = None, *, capability: int = 90) -> Plan:
    """The tiles for n images on each of `world` ranks and embeddings of width D_a (and D_b, with two peers).

    Raises ValueError for a device older than the first in the table.
    """
    known = [found for found in BY_CAPABILITY if found <= capability]
    if not known:
        raise ValueError(
            f"backend: 'triton' needs compute capability {min(BY_CAPABILITY) / 10}, found {capability / 10}"
        )
    chosen = BY_CAPABILITY[max(known)]
    width_a = padded_width(D_a)
    width_b = padded_width(D_b) if D_b is not None else width_a
    fused = width_a + (width_b if D_b is not None else 0) <= FUSED_WIDTH
    rows = pitch(n * world)
    return Plan(
        rows, width_a, width_b, fused, chosen, *_chunks(rows, world), _split(n, rows, chosen.gradient) if fused else 1
    )


def _chunks(pitch_rows: int, world: int) -> tuple[int, int]:
    """Sides of pass 1's chunks: R row chunks a view and q column chunks in each, about 2 R^2 q = 512 programs a rank.

    That is four for each multiprocessor.  Room for their sums is R (q + 1) floats a row and peer over all ranks, so
    q = 1 where the batch is large; where it is small, that would leave too few row tiles under a column for loads to
    overlap.
    """
    R, q = (8, 4) if pitch_rows < 131_072 else (16, 1)
    R = min(64, R * math.ceil(math.sqrt(world)))
    col_chunk = _up(-(-pitch_rows // (R * q)), BLOCK)
    return _up(-(-pitch_rows // R), col_chunk), col_chunk


def _split(n: int, pitch_rows: int, tile: Tile) -> int:
    """Two programs for every multiprocessor, and at least two column tiles of each view for a program."""
    blocks = 2 * -(-n // tile.rows)
    return max(1, min(2 * PROGRAMS // blocks, pitch_rows // tile.cols // 2, 8))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: one constant of the kernels, `V`."""

    width_a: int
    depth_a: int
    width_b: int
    depth_b: int
    rows: int
    cols: int
    peers: int  # 1 or 2
    contrast: bool  # NT-Xent
    distill: bool  # KL between the peers
    power: int  # see Temperatures
    safe: bool
    valued: bool = False  # pass 1 sums the KL's value too
    fused: bool = True  # pass 2, and the next three
    split: int = 1
    value_cols: int = 0
    narrow: int = 0


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Launches a Triton kernel."""
    # Fused multiply-add asked for by name: triton 3.10 will leave it out by default.
    kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)
