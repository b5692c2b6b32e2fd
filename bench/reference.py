"""DoGo as a competent engineer writes it in an afternoon: the yardstick of `python -m bench step`.

Plain PyTorch and torchvision: transforms of each sample in a DataLoader with a process a core, bf16 autocast on a GPU,
channels_last, losses from whole similarity matrices, torch.optim.Adam, each peer its own backward pass and step.  Of
this project it takes the configuration and the networks (engine.config, engine.peers) and nothing else, so that only
the training differs.  What is drawn is what the engine draws, from torchvision's own random numbers.

The transforms take PIL images, which go through them faster than tensors do, and normalise in the workers, where the
tutorials do it.

Legend
  N  images of a batch      S  side of a view in pixels      D  embedding width
"""

from __future__ import annotations

import os
from collections.abc import Generator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from engine.config import Config, PeerConfig
from engine.peers import build_peer

VIEWS = 4  # of an image, two a peer
PREFETCH = 2  # batches that each worker has ready, as torch's own default
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # of CIFAR-10's channels


class Views(Dataset):
    """Image i of uint8 [n, H, W, 3] as VIEWS random views, each [3, S, S]: SimCLR's, without the blur."""

    def __init__(self, images: np.ndarray, size: int) -> None:
        self.images = images
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        image = Image.fromarray(self.images[i])
        return [self.transform(image) for _ in range(VIEWS)]


def ntxent(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """NT-Xent of normalised embeddings [N, D]: cross-entropy over the 2N x 2N similarities, the diagonal left out."""
    z = torch.cat((x, y))
    n = len(x)
    similarity = z @ z.T / tau
    similarity.fill_diagonal_(float("-inf"))
    return F.cross_entropy(similarity, torch.arange(2 * n, device=z.device).roll(n))


def similarity_kl(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tau: float, reduction: str) -> Tensor:
    """KL(other || own) of the softmax over the N x N similarities of x with y; the other peer gets no gradient."""
    log_own, log_other = ((x @ y.T / tau).log_softmax(dim=1) for x, y in (own, other))
    total = F.kl_div(log_own, log_other.detach(), log_target=True, reduction="sum")
    return total / (len(log_own) if reduction == "batchmean" else log_own.numel())


class Reference:
    """Two peers and their optimizers.

    Raises ValueError: a configuration of another method than the one that is written here.
    """

    def __init__(self, cfg: Config, device: torch.device, *, size: int = 32) -> None:
        if cfg.distill is None or cfg.data.views != "per_peer":
            raise ValueError("the reference trains two peers, each on its own two views")
        self.cfg, self.distill, self.device, self.size = cfg, cfg.distill, device, size
        self.bf16 = cfg.engine.precision == "bf16" or (cfg.engine.precision == "auto" and device.type == "cuda")
        self.peers = [build_peer(peer, image_size=size).to(device) for peer in cfg.peers]
        for peer in self.peers:
            peer.to(memory_format=torch.channels_last)
        self.optimizers = [_adam(peer, of) for peer, of in zip(self.peers, cfg.peers, strict=True)]

    def step(self, views: list[Tensor]) -> list[Tensor]:
        """Trains on VIEWS views [N, 3, S, S] of each image, the first two of peer a; the loss of each peer."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embedded = [self.peers[0](*views[:2]), self.peers[1](*views[2:])]
        a, b = ((F.normalize(x.float()), F.normalize(y.float())) for x, y in embedded)
        losses = []
        for own, other, peer, weight in zip((a, b), (b, a), self.cfg.peers, self.distill.weights, strict=True):
            kl = similarity_kl(own, other, self.distill.tau, self.distill.reduction)
            losses.append(ntxent(*own, peer.tau) + weight * kl)
        for loss, optimizer in zip(losses, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [loss.detach() for loss in losses]

    def batches(self, images: np.ndarray, *, workers: int) -> Generator[list[Tensor]]:
        """The views of endless epochs over images uint8 [n, H, W, 3], on the device; `close` ends its processes.

        Raises ValueError: fewer images than a batch.
        """
        if len(images) < self.cfg.data.batch_size:
            raise ValueError(f"{len(images)} images are fewer than a batch of {self.cfg.data.batch_size}")
        loader = DataLoader(
            Views(images, self.size), batch_size=self.cfg.data.batch_size, shuffle=True, drop_last=True,
            num_workers=workers, persistent_workers=workers > 0, prefetch_factor=PREFETCH if workers else None,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        while True:
            for views in loader:
                yield [self._sent(view) for view in views]

    def _sent(self, view: Tensor) -> Tensor:
        return view.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def _adam(peer: torch.nn.Module, cfg: PeerConfig) -> torch.optim.Adam:
    of = cfg.optimizer
    if of.name != "adam" or of.schedule != "constant" or of.lr_scaling != "none" or of.warmup_epochs:
        raise ValueError(f"the reference has adam at a constant rate, found {of.name}")
    return torch.optim.Adam(peer.parameters(), of.lr, betas=of.betas, weight_decay=of.weight_decay)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
