"""DoGo as a competent engineer writes it in an afternoon: the yardstick of `python -m bench step`.

Plain PyTorch: a DataLoader (bench/reference_data.py), networks (bench/reference_networks.py), DistributedDataParallel
where several ranks run, bf16 autocast on a GPU, channels_last, losses from whole similarity matrices, Adam, each peer
its own backward pass and step.  Nothing of this project is used but a run's configuration as plain values
(config.yaml), so that a mistake in the engine cannot be in here too.  What is drawn is what the engine draws, from
torchvision's own random numbers.

Two settings.  plain: eager, and torch.optim.Adam as it comes.  tuned: torch.compile of each peer, the fused optimizer
and, on a GPU, augmentation there, with one set of parameters a batch.

With several ranks the batch is global: embeddings are gathered with their gradient, each rank takes the losses of its
own rows, and the mean over ranks, which DistributedDataParallel takes of the gradients, is that of the batch.
`engine.sync_bn` is torch's SyncBatchNorm, which wants a GPU: on CPUs each rank has its own statistics.

Legend
  N  images of the batch      n  of this rank      S  side of a view in pixels      D  embedding width
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from bench import reference_data
from bench.reference_data import Source
from bench.reference_networks import build_peer

# -- losses ----------------------------------------------------------------------------------------------------------


class Gathered(torch.autograd.Function):
    """Rows [n, ...] of every rank as [N, ...]; the gradients of all ranks go back to the rank that a row is of."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.n = group, len(rows)
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, rows, group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.n)[dist.get_rank(ctx.group)], None


class Embedded(NamedTuple):
    """Normalised embeddings of one peer's two views."""

    x: Tensor  # [n, D]
    y: Tensor
    every_x: Tensor  # [N, D] of all ranks
    every_y: Tensor
    first: int  # row of every_x where x begins


def embedded(x: Tensor, y: Tensor, group: dist.ProcessGroup | None = None) -> Embedded:
    """Embeddings [n, D], raw, normalised and gathered from all ranks with their gradient."""
    x, y = F.normalize(x.float()), F.normalize(y.float())
    if group is None:
        return Embedded(x, y, x, y, 0)
    every = Gathered.apply(torch.stack((x, y), dim=1), group)
    return Embedded(x, y, every[:, 0], every[:, 1], dist.get_rank(group) * len(x))


def ntxent(z: Embedded, tau: float) -> Tensor:
    """NT-Xent of this rank's rows: cross-entropy over the 2n x 2N similarities, those with themselves left out."""
    n, N = len(z.x), len(z.every_x)
    similarity = torch.cat((z.x, z.y)) @ torch.cat((z.every_x, z.every_y)).T / tau
    own = torch.arange(z.first, z.first + n, device=similarity.device)
    own = torch.cat((own, own + N))
    similarity.scatter_(1, own[:, None], float("-inf"))
    return F.cross_entropy(similarity, own.roll(n))


def similarity_kl(own: Embedded, other: Embedded, tau: float, reduction: str) -> Tensor:
    """KL(other || own) of the softmax over this rank's n x N similarities of x with y; the other gets no gradient."""
    log_own, log_other = ((z.x @ z.every_y.T / tau).log_softmax(dim=1) for z in (own, other))
    total = F.kl_div(log_own, log_other.detach(), log_target=True, reduction="sum")
    return total / (len(log_own) if reduction == "batchmean" else log_own.numel())


# -- training --------------------------------------------------------------------------------------------------------


class Reference:
    """Two peers and their optimizers; `cfg` holds the plain values of a configuration, `group` all ranks, None alone.

    Raises ValueError: a configuration of another method than the one that is written here.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        device: torch.device,
        *,
        size: int,  # S
        tuned: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _refuse_other_methods(cfg)
        ranks = 1 if group is None else dist.get_world_size(group)
        batch = cfg["data"]["batch_size"]
        if batch % ranks:
            raise ValueError(f"data.batch_size: {batch} does not divide by {ranks} ranks")
        self.device, self.size, self.tuned, self.group, self.rows = device, size, tuned, group, batch // ranks
        gpu = device.type == "cuda"
        self.bf16 = cfg["engine"]["precision"] == "bf16" or (cfg["engine"]["precision"] == "auto" and gpu)
        self.taus = [peer["tau"] for peer in cfg["peers"]]
        self.distill = cfg["distill"]
        weight = self.distill["weight"]
        self.weights = weight if isinstance(weight, list | tuple) else [weight, weight]
        self.peers: list[nn.Module] = []
        for of in cfg["peers"]:
            peer: nn.Module = build_peer(of, size=size).to(device)
            peer.to(memory_format=torch.channels_last)
            if group is not None and gpu and cfg["engine"]["sync_bn"]:
                peer = nn.SyncBatchNorm.convert_sync_batchnorm(peer, group)
            self.peers.append(peer)
        self.run = [self._to_run(peer) for peer in self.peers]
        self.optimizers = [
            torch.optim.Adam(
                peer.parameters(), of["optimizer"]["lr"], betas=tuple(of["optimizer"]["betas"]),
                weight_decay=of["optimizer"]["weight_decay"], fused=tuned or None,
            )
            for peer, of in zip(self.peers, cfg["peers"], strict=True)
        ]  # fmt: skip

    def _to_run(self, peer: nn.Module) -> Any:
        if self.group is not None:
            devices = [self.device.index] if self.device.type == "cuda" else None
            peer = DistributedDataParallel(peer, device_ids=devices, process_group=self.group)
        return torch.compile(peer, dynamic=False) if self.tuned else peer

    def step(self, views: list[Tensor]) -> list[Tensor]:
        """Trains on four views [n, 3, S, S] of each image, the first two of peer a; the loss of each peer.

        Losses are those of this rank's rows, whose mean over ranks is that of the batch.
        """
        with record_function("step/forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            raw = [peer(*views[2 * p : 2 * p + 2]) for p, peer in enumerate(self.run)]
        with record_function("step/loss"):
            a, b = (embedded(x, y, self.group) for x, y in raw)
            losses = [
                ntxent(own, tau) + weight * similarity_kl(own, other, self.distill["tau"], self.distill["reduction"])
                for own, other, tau, weight in zip((a, b), (b, a), self.taus, self.weights, strict=True)
            ]
        for loss, optimizer in zip(losses, self.optimizers, strict=True):
            with record_function("step/backward"):
                optimizer.zero_grad()
                loss.backward()
            with record_function("step/optimizer"):
                optimizer.step()
        return [loss.detach() for loss in losses]

    def batches(self, source: Source, *, workers: int) -> Generator[list[Tensor]]:
        """The views of endless epochs over images uint8 [n, H, W, 3] or image files; `close` ends its processes.

        Raises ValueError: fewer images than a batch.
        """
        return reference_data.batches(
            source, size=self.size, rows=self.rows, workers=workers, device=self.device,
            on_device=self.tuned and self.device.type == "cuda", group=self.group,
        )  # fmt: skip

    def same_views(self) -> Generator[list[Tensor]]:
        """The same random views in every batch, ready on the device: what is left of a step without its loader."""
        return reference_data.same_views(size=self.size, rows=self.rows, device=self.device)


def _refuse_other_methods(cfg: Mapping[str, Any]) -> None:
    if cfg["distill"] is None or cfg["data"]["views"] != "per_peer":
        raise ValueError("the reference trains two peers, each on its own two views")
    augment = {key: value for key, value in cfg["data"]["augment"].items() if value is not None}
    if augment != {"preset": "simclr"}:
        raise ValueError(f"data.augment: the reference has simclr without changes, found {augment}")
    for peer in cfg["peers"]:
        of = peer["optimizer"]
        constant = of["schedule"] == "constant" and of["lr_scaling"] == "none" and not of["warmup_epochs"]
        if of["name"] != "adam" or not constant or of["exclude_bias_and_norm"]:
            raise ValueError(f"the reference has adam of all parameters at a constant rate, found {of}")
