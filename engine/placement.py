"""Which ranks train which peer: all of them both, or two groups of ranks one each (engine.concurrency: split).

Split, a group's ranks hold the whole batch between them, so that its peer's loss, BatchNorm and gradients are those of
all ranks together.  Of the other peer they need the embeddings of the same images and nothing else.

Legend
  N  images of the global batch      n  images of this rank      D  embedding width
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Config, ConfigError, keyed
from engine.distributed import Ranks, first_rank_does, precision_of
from engine.peers import build_peer

MEASURED_IMAGES = 32  # of the steps that tell what a peer costs
MEASURED_STEPS = 3  # the fastest counts


@dataclass(frozen=True)
class Placement:
    """What this rank trains, and with whom."""

    own: Ranks
    """Those that train what this rank does, ranks counted among them."""
    peers: tuple[int, ...]
    """Places in the configuration of the peers that this rank trains."""
    sizes: tuple[int, int] | None = None
    """Ranks of each peer; None where every rank trains all."""
    group: dist.ProcessGroup | None = None
    """The process group of `own` where the run is split, also if this rank is alone in it."""
    alone: dist.ProcessGroup | None = None
    """The process group of this rank where the run is split."""
    note: str = ""
    """How the sizes were found, where they were measured."""

    def rows_of(self, peer: int, rank: int, batch_size: int) -> range:
        """Images of the global batch that a rank, counted among its peer's, holds."""
        assert self.sizes is not None
        n = batch_size // self.sizes[peer]
        return range(rank * n, (rank + 1) * n)

    # DeepSpeed asks an object with these names for the ranks that share an engine's gradients and shards.

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks of an engine."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """How many."""
        return self.own.world

    def get_data_parallel_rank(self) -> int:
        """This one's place among them."""
        return self.own.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """No peer is cut into pieces by layers: this rank alone (None would be all ranks to its clipping)."""
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        """One piece."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """And it is the first."""
        return 0


def place(cfg: Config, ranks: Ranks, image_size: int, sizes: tuple[int, int] | None = None) -> Placement:
    """Where the peers of this run go; called by all ranks together.

    `sizes`: of the run that is resumed.  Raises ConfigError: too few ranks, or a batch that does not divide.
    """
    if cfg.engine.concurrency != "split":
        return Placement(ranks, tuple(i for i, _ in cfg.trained))
    if ranks.world < 2:
        raise ConfigError(f"engine.concurrency: split takes a rank a peer at least, found {ranks.world} in all")
    sizes, note = cfg.engine.split or sizes, ""
    if sizes is None:
        sizes, note = first_rank_does(ranks, lambda: _measured_sizes(cfg, ranks, image_size))
    _check(sizes, cfg, ranks)
    peer = int(ranks.rank >= sizes[0])
    # Every rank takes part in making each.
    group = cast(dist.ProcessGroup, [dist.new_group(list(members)) for members in _members(sizes)][peer])
    rank, world = ranks.rank - (sizes[0] if peer else 0), sizes[peer]
    own = Ranks(rank, world, ranks.local_rank, ranks.device, group if world > 1 else None)
    alone = dist.new_group([ranks.rank], use_local_synchronization=True)
    return Placement(own, (peer,), sizes, group, cast(dist.ProcessGroup, alone), note)


def describe_placement(cfg: Config, placement: Placement) -> list[str]:
    """A line on which ranks train which peer; none where all train all."""
    if placement.sizes is None:
        return []
    parts = [
        f"{peer.name} on {_span(members)}" for peer, members in zip(cfg.peers, _members(placement.sizes), strict=True)
    ]
    return [f"peers are split between the ranks (engine.concurrency): {', '.join(parts)}{placement.note}"]


def _members(sizes: tuple[int, int]) -> list[range]:
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _span(members: range) -> str:
    return f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]} to {members[-1]}"


def _check(sizes: tuple[int, int], cfg: Config, ranks: Ranks) -> None:
    if sum(sizes) != ranks.world:
        raise ConfigError(
            f"engine.split: {sizes[0]} and {sizes[1]} ranks make {sum(sizes)}, found {ranks.world} in all"
        )
    for (_, peer), size in zip(cfg.trained, sizes, strict=True):
        if cfg.data.batch_size % size:
            raise ConfigError(
                f"data.batch_size: {cfg.data.batch_size} does not divide by the {size} ranks of peer {peer.name} "
                "(engine.split)"
            )


# -- sizes by cost -----------------------------------------------------------------------------------------------------


def _measured_sizes(cfg: Config, ranks: Ranks, image_size: int) -> tuple[tuple[int, int], str]:
    """Sizes, and a note on what they follow."""
    costs = [_seconds(cfg, peer, ranks.device, image_size) for peer in range(2)]
    sizes = balanced(costs, ranks.world, cfg.data.batch_size)
    return sizes, sizes_note(costs, sizes, cfg.data.batch_size)


def sizes_note(costs: list[float], sizes: tuple[int, int], batch_size: int) -> str:
    """What two costs and sizes have to do with each other, and which batch would allow better ones."""
    note = f"; measured: an image of the second costs {costs[1] / costs[0]:.2g} times one of the first"
    world = sum(sizes)
    best = balanced(costs, world, math.lcm(*range(1, world)))
    if best == sizes:
        return note
    whole = math.lcm(*best)
    return (
        f"{note}, for which {best[0]} and {best[1]} ranks would be better; they take a data.batch_size that is a "
        f"multiple of {whole}, found {batch_size}"
    )


def balanced(costs: list[float], world: int, batch_size: int) -> tuple[int, int]:
    """Ranks of two peers such that the slower group's share of its cost is the least; both must divide the batch.

    Raises ConfigError where no sizes do.
    """
    fitting = [(w, world - w) for w in range(1, world) if batch_size % w == 0 and batch_size % (world - w) == 0]
    if not fitting:
        raise ConfigError(
            f"data.batch_size: {batch_size} does not divide by the sizes of any two groups of {world} ranks; "
            "engine.concurrency=serial takes other batches"
        )
    return min(fitting, key=lambda sizes: max(cost / size for cost, size in zip(costs, sizes, strict=True)))


def _seconds(cfg: Config, peer: int, device: torch.device, image_size: int) -> float:
    """Forward and backward of one peer alone on this rank."""
    bf16 = precision_of(cfg, device) == "bf16"
    with keyed(peer):
        network = build_peer(cfg.trained[peer][1], image_size=image_size).to(device)
    network.to(memory_format=torch.channels_last)
    view = torch.randn(MEASURED_IMAGES, 3, image_size, image_size, device=device)
    view = view.contiguous(memory_format=torch.channels_last)
    taken = []
    for _ in range(1 + MEASURED_STEPS):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x, y = network(view, view)
        (x.float().square().mean() + y.float().square().mean()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


# -- what crosses over -------------------------------------------------------------------------------------------------


class Exchange:
    """Embeddings of the same images between the two groups, from rank to rank, without gradient."""

    def __init__(self, placement: Placement, cfg: Config) -> None:
        (peer,) = placement.peers
        other, sizes, N = 1 - peer, placement.sizes, cfg.data.batch_size
        assert sizes is not None
        self._width = cfg.trained[other][1].projector.out
        own = placement.rows_of(peer, placement.own.rank, N)
        self._parts: list[tuple[int, slice]] = []  # a rank of the other group, and the rows that both hold
        for rank, member in enumerate(_members(sizes)[other]):
            rows = placement.rows_of(other, rank, N)
            low, high = max(own.start, rows.start), min(own.stop, rows.stop)
            if low < high:
                self._parts.append((member, slice(low - own.start, high - own.start)))

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The other peer's embeddings [n, D] of both views of this rank's images, for this peer's x and y [n, D]."""
        sent = torch.stack((x, y), dim=1)
        received = sent.new_empty((len(x), 2, self._width))
        transfers = []
        for member, rows in self._parts:
            transfers += [
                dist.P2POp(dist.isend, sent[rows], member),
                dist.P2POp(dist.irecv, received[rows], member),
            ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        of_x, of_y = received.unbind(dim=1)
        return of_x.contiguous(), of_y.contiguous()
