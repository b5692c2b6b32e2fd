"""`python -m bench scaling`: what a step would take on 1 to 1,024 GPUs, from a step that was measured on one.

A prediction, not a measurement.  Each GPU keeps the images that it had (weak scaling), and the batch grows with their
number W.  What one device does alone is taken from a row of `python -m bench step`, the growth of the losses from rows
of `python -m bench loss`; what travels is counted in bytes and messages and divided by link speeds that the options
state.  Two placements (engine.concurrency): every GPU trains both peers, or each group of GPUs one.

Legend
  W  GPUs      n  images of one      N = n W  images of the batch      P  parameters      D  embedding width
  W_p  GPUs of peer p, sizes as the engine would take them (engine/placement.py)      n_p = N / W_p  their images

                every GPU both peers                            split, the group that takes longer
  data          measured                                        half of the views of n_p images
  networks      measured                                        peer p's share, by FLOPs, for n_p images
  losses        measured for n x n, then growing with n x N     the same for n_p x N
  optimizer     measured                                        by parameters
  BatchNorm     6 hops' worth of messages a layer               the same of its own layers, among W_p
  gradients     4 P bytes reduced, behind backward              4 P_p bytes among W_p
  embeddings    4 N D bytes of each peer gathered, the first    4 n_p D bytes between the groups, then 4 N D bytes of
                peer's behind the second's forward              each peer gathered among W_p

What was measured are steps under the profiler, which makes them slower, so look at ratios.  BatchNorm is taken a view
(`bn: per_view`) over all ranks of a peer: a gather forward and a reduction, two phases, backward.

A message to W GPUs takes log2 W hops.  Nothing but the first peer's embeddings overlaps with computing: at ZeRO 0
DeepSpeed averages gradients when backward is over.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.flops import flops_per_image
from bench.providers import BACKWARD
from bench.reference_networks import build_peer
from bench.rows import RESULTS, Row, read_rows
from bench.step_data import REAL
from engine.config import parse_config
from engine.placement import balanced

MOST_GPUS = 1024
SETS_IN = 0.1  # of a step: from here on a part counts as a bottleneck
GRADIENT_BYTES, EMBEDDING_BYTES = 4, 2  # of an entry on the wire: float32; float16 or bfloat16
NORM_MESSAGES = 2 * (1 + 2)  # of a BatchNorm layer: two views, a gather forward and a reduction backward
BOTH, SPLIT = "every GPU both peers", "split"
MEASURED = ("data", "networks", "losses", "optimizer", "other")  # on one device
TRAVEL = ("BatchNorm", "gradients", "embeddings")


class Link(NamedTuple):
    """What joins GPUs."""

    bytes_per_s: float  # of one GPU, each way
    hop_s: float


class Cluster(NamedTuple):
    """Nodes of GPUs."""

    node: int  # GPUs of one
    inside: Link
    between: Link

    def link(self, W: int) -> Link:
        """The slowest that W GPUs need."""
        return self.inside if self.node >= W else self.between

    def gather_ms(self, size: float, W: int) -> float:
        """All-gather after which each of W GPUs has `size` bytes."""
        link = self.link(W)
        return 1e3 * (link.hop_s * math.log2(W) + size * (W - 1) / W / link.bytes_per_s) if W > 1 else 0.0

    def reduce_ms(self, size: float, W: int) -> float:
        """All-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather_ms(size, W)


class Peer(NamedTuple):
    """What a network costs beside another."""

    share: float  # of both peers' FLOPs
    parameters: int
    norms: int  # BatchNorm layers
    width: int  # D


class Step(NamedTuple):
    """A step of one device, in milliseconds."""

    size: int  # side of a view in pixels
    images: int  # n
    data: float
    forward: float
    networks: float  # forward and backward
    losses: float
    optimizer: float
    other: float
    pair: float  # of the losses, for a pair of rows more


# -- the model -------------------------------------------------------------------------------------------------------


def both(step: Step, peers: Sequence[Peer], cluster: Cluster, W: int) -> dict[str, float]:
    """Milliseconds of each part where every GPU trains both peers."""
    n = step.images
    norms = sum(peer.norms for peer in peers)
    a, b = (cluster.gather_ms(2 * EMBEDDING_BYTES * n * W * peer.width, W) for peer in peers)
    return {
        "data": step.data,
        "networks": step.networks,
        "losses": step.losses + step.pair * (2 * n) ** 2 * (W - 1),
        "optimizer": step.optimizer,
        "other": step.other,
        "BatchNorm": norms * NORM_MESSAGES * cluster.gather_ms(0, W),
        "gradients": cluster.reduce_ms(GRADIENT_BYTES * sum(peer.parameters for peer in peers), W),
        "embeddings": max(0.0, a - step.forward * peers[1].share) + b,
    }


def split(step: Step, peers: Sequence[Peer], cluster: Cluster, W: int) -> dict[str, float]:
    """Milliseconds of each part where the peers are split between the GPUs, of the group that takes longer."""
    sizes = balanced([peer.share for peer in peers], W, step.images * W)
    of_groups = [
        _group(step, peer, other, size, cluster, W)
        for peer, other, size in zip(peers, reversed(peers), sizes, strict=True)
    ]
    return max(of_groups, key=lambda parts: sum(parts.values()))


def _group(step: Step, peer: Peer, other: Peer, size: int, cluster: Cluster, W: int) -> dict[str, float]:
    n = step.images
    more = W / size  # images of a GPU, beside n
    link = cluster.link(W)
    crossing = 2 * EMBEDDING_BYTES * n * more * max(peer.width, other.width)
    gathered = 2 * EMBEDDING_BYTES * n * W * (peer.width + other.width)  # of both peers, inside of the group
    return {
        "data": step.data * more / 2,  # two of four views
        "networks": step.networks * peer.share * more,
        "losses": step.losses + step.pair * (2 * n) ** 2 * (more * W - 1),
        "optimizer": step.optimizer * peer.parameters / (peer.parameters + other.parameters),
        "other": step.other,
        "BatchNorm": peer.norms * NORM_MESSAGES * cluster.gather_ms(0, size),
        "gradients": cluster.reduce_ms(GRADIENT_BYTES * peer.parameters, size),
        "embeddings": 1e3 * (link.hop_s + crossing / link.bytes_per_s) + cluster.gather_ms(gathered, size),
    }


def sets_in(by_gpus: Mapping[int, Mapping[str, float]]) -> dict[str, int]:
    """For each part that grows with the number of GPUs, the first number at which it takes SETS_IN of the step."""
    found: dict[str, int] = {}
    for W, parts in sorted(by_gpus.items()):
        for part in ("losses", *TRAVEL):
            if part not in found and parts[part] >= SETS_IN * sum(parts.values()):
                found[part] = W
    return found


# -- what was measured -----------------------------------------------------------------------------------------------


def measured_step(rows: Sequence[Row], pair_ms: float, *, pair: str, batch: int | None, provider: str) -> Step:
    """The newest step of one device, on real data, whose parts were measured.

    Raises ValueError: there is none.
    """
    fitting = [
        row for row in rows
        if row.metric == "ms" and row.provider == provider and row.case["pair"] == pair
        and row.case["ranks"] == 1 and row.case["data"] == REAL and batch in (None, row.case["batch"])
    ]  # fmt: skip
    if not fitting:
        raise ValueError(f"no parts of a step of {provider} with {pair} on one device: run python -m bench step first")
    last = fitting[-1]
    case = {key: value for key, value in last.case.items() if key != "part"}
    ms = {
        row.case["part"]: row.p50
        for row in fitting
        if {key: value for key, value in row.case.items() if key != "part"} == case
        and (row.commit, row.date, row.command) == (last.commit, last.date, last.command)
    }
    alone = ms.get("other", 0.0) + ms.get("idle", 0.0) + ms.get("communication", 0.0)
    return Step(
        case["size"], case["batch"], ms.get("data", 0.0), ms["forward"], ms["forward"] + ms["backward"], ms["loss"],
        ms["optimizer"], alone, pair_ms,
    )  # fmt: skip


def milliseconds_of_a_pair(rows: Sequence[Row], provider: str) -> float:
    """Of the losses of both peers, forward and backward, from the largest of the measured sizes M x M.

    Raises ValueError: none was measured.
    """
    fitting = [
        row for row in rows
        if (row.metric, row.provider, row.case["D"]) == ("ms", provider, 128)
        and row.case["mode"].startswith(BACKWARD)
    ]  # fmt: skip
    if not fitting:
        raise ValueError(f"no losses of {provider} were measured: run python -m bench loss first")
    largest = max(fitting, key=lambda row: row.case["M"])
    return largest.p50 / largest.case["M"] ** 2


def peers_of(pair: str, size: int, width: int) -> list[Peer]:
    """Both networks of A+B, with the default projector."""
    plain = [_plain(backbone, width) for backbone in pair.split("+")]
    flops = [flops_per_image([peer], size=size) for peer in plain]
    peers = []
    for peer, own in zip(plain, flops, strict=True):
        with torch.device("meta"):
            network = build_peer(peer, size=size)
        norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        peers.append(Peer(own / sum(flops), sum(p.numel() for p in network.parameters()), norms, width))
    return peers


def _plain(backbone: str, width: int) -> dict[str, Any]:
    peer = {"name": "a", "backbone": backbone, "projector": {"out": width}}
    return parse_config({"run": {"output_dir": "unused", "steps": 1}, "peers": [peer]}).resolved()["peers"][0]


# -- the command -----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; exits with 2 where there are no rows of such a step."""
    parser = argparse.ArgumentParser("python -m bench scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h200", help="folder of bench/results whose rows are taken")
    parser.add_argument("--pair", metavar="A+B", required=True, help="as the rows have it")
    parser.add_argument("--batch", type=int, metavar="n", help="images of a GPU; the newest row's by default")
    parser.add_argument("--provider", default="engine", help="of python -m bench step")
    parser.add_argument("--loss", default=None, help="backend of python -m bench loss; by default the device's own")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--inside", type=float, default=450.0, metavar="GB/s", help="of a GPU to its node, each way")
    parser.add_argument("--between", type=float, default=50.0, metavar="GB/s", help="of a GPU to other nodes")
    parser.add_argument(
        "--hop", type=float, nargs=2, default=(5.0, 15.0), metavar="us", help="inside and between nodes"
    )
    options = parser.parse_args(argv)
    backend = options.loss or ("native" if options.device == "cpu" else "triton")
    try:
        pair_ms = milliseconds_of_a_pair(_rows(options.device, "loss"), backend)
        rows = _rows(options.device, "step")
        options.step = measured_step(rows, pair_ms, pair=options.pair, batch=options.batch, provider=options.provider)
    except ValueError as error:
        parser.error(str(error))
    return options


def _rows(device: str, subject: str) -> list[Row]:
    path = RESULTS / device / f"{subject}.jsonl"
    if not path.exists():
        raise ValueError(f"argument --device: {_short(path)} is not there")
    return read_rows(path)


def _short(path: Path) -> str:
    return str(path.relative_to(RESULTS.parent.parent))


def main(argv: list[str]) -> int:
    """Prints both placements for 1 to MOST_GPUS GPUs, and where each bottleneck sets in."""
    options = parse(argv)
    inside, between = (
        Link(1e9 * rate, 1e-6 * hop) for rate, hop in zip((options.inside, options.between), options.hop, strict=True)
    )
    cluster, step = Cluster(options.node, inside, between), options.step
    peers = peers_of(options.pair, step.size, 128)
    counts = [2**i for i in range(int(math.log2(MOST_GPUS)) + 1)]
    found = {
        BOTH: {W: both(step, peers, cluster, W) for W in counts},
        SPLIT: {W: split(step, peers, cluster, W) for W in counts[1:]},
    }
    console = Console(width=140)
    console.print(
        f"A prediction for {options.pair}, {step.images} images a GPU: links of {options.inside:g} GB/s in nodes of "
        f"{options.node} and {options.between:g} GB/s between them, "
        f"hops of {options.hop[0]:g} and {options.hop[1]:g} us"
    )
    for placement, by_gpus in found.items():
        console.print(table(placement, by_gpus, step))
        for part, W in sets_in(by_gpus).items():
            console.print(f"{placement}: {part}: {SETS_IN:.0%} of a step from {W} GPUs on")
    return 0


def table(placement: str, by_gpus: Mapping[int, Mapping[str, float]], step: Step) -> Table:
    """Milliseconds by part, images a second, and the share of W times one device's rate."""
    alone = sum(getattr(step, part) for part in MEASURED)
    made = Table(
        "GPUs", *MEASURED, *TRAVEL, "ms a step", "images/s", "of linear", title=placement, title_justify="left"
    )
    for W, parts in by_gpus.items():
        total = sum(parts.values())
        made.add_row(
            str(W), *(f"{parts[part]:.2f}" for part in (*MEASURED, *TRAVEL)), f"{total:.2f}",
            f"{1e3 * step.images * W / total:,.0f}", f"{alone / total:.0%}",
        )  # fmt: skip
    return made
