"""What one call of a fused loss asks for, in the numbers that the kernels take.

Legend
  n, N  images of this rank and of all W ranks, M = 2N rows     D  embedding width
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from kernels import tiles
from kernels.collectives import rank_in, world_size
from kernels.tiles import Plan, Temperatures, Tile, Variant

# Weights W_ij lie between 0 and 2 + kappa; their largest is brought to half of float16's, so that those of 2^20 rows,
# about 2^-19, are normal numbers still.
LARGEST_WEIGHT = 32768.0


class Problem(NamedTuple):
    """One loss on the host: what is asked, for how many images, and the tiles."""

    n: int
    rank: int
    world: int
    D: tuple[int, ...]  # a peer
    contrast: bool
    distill: bool
    weights: tuple[float, float]
    factor: float  # what weighted sums are multiplied with to be gradients of this rank's rows (W times the true one)
    kappas: tuple[float, float]  # the KL's part of a weight, against NT-Xent's (or against 1, alone)
    kl_share: float  # a row's KL in the value of the global batch
    temperatures: Temperatures
    plan: Plan

    @property
    def peers(self) -> int:
        return len(self.D)

    @property
    def N(self) -> int:  # noqa: N802
        return self.n * self.world

    @property
    def first(self) -> int:
        """The place of this rank's first image among those of all ranks."""
        return self.rank * self.n

    @property
    def chunks(self) -> tuple[int, int]:
        """R row chunks of a view and Q column chunks in each (stats_triton.py)."""
        return -(-self.N // self.plan.row_chunk), self.plan.row_chunk // self.plan.col_chunk

    def variant(self, tile: Tile, *, peers: slice = slice(2), **options: Any) -> Variant:
        """What a kernel over `peers` is compiled for; with one peer, b's sizes are a's."""
        widths, depths = [self.plan.width_a, self.plan.width_b][peers], [*self.plan.depths()][peers]
        return Variant(
            widths[0], depths[0], widths[-1], depths[-1], tile.rows, tile.cols, min(self.peers, len(widths)),
            self.contrast, self.distill, self.temperatures.power, self.temperatures.safe, **options,
        )  # fmt: skip

    @property
    def weight_scales(self) -> tuple[float, float]:
        """The powers of two that bring either peer's largest weight W_ij to LARGEST_WEIGHT or half of it."""
        a, b = (2.0 ** math.floor(math.log2(LARGEST_WEIGHT / (2.0 * self.contrast + k))) for k in self.kappas)
        return a, b


def capability_of(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; the interpreter runs the tiles of that."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pose(
    n: int, D: tuple[int, ...], group: dist.ProcessGroup | None,
    tau_contrast: float | None, tau_distill: float | None, weights: tuple[float, float], mean: bool,
    device: torch.device,
) -> Problem:  # fmt: skip
    """NT-Xent where `tau_contrast` is given, the KL where `tau_distill` is; `mean`: over all N^2 entries, not rows."""
    world = world_size(group)
    N = n * world
    kl_share = 1.0 / N**2 if mean else 1.0 / N
    if tau_contrast is not None:
        factor = world / (2 * N * tau_contrast)
        ratio = 2 * N * tau_contrast * kl_share / tau_distill if tau_distill is not None else 0.0
    else:
        assert tau_distill is not None
        factor, ratio = world * kl_share / tau_distill, 1.0
    return Problem(
        n, rank_in(group), world, D, tau_contrast is not None, tau_distill is not None, weights, factor,
        (weights[0] * ratio, weights[1] * ratio), kl_share,
        tiles.temperatures(tau_contrast, tau_distill), tiles.plan(n, world, *D, capability=capability_of(device)),
    )  # fmt: skip
