"""The images of the plain reference: torchvision's transforms in a DataLoader with a process a core.

Each sample has its own views, made of PIL images, which go through the transforms faster than tensors do, and
normalised in the workers, where the tutorials do it.  With `on_device` workers deliver images as they are instead, and
the views of a whole batch are made on the device.  torchvision draws one set of parameters a call there, so that all
images of a batch have the same crop, colours and blur: less work than theirs is, and another method.  Photos are first
brought to one size, as a batch is one tensor.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

VIEWS = 4  # of an image, two a peer
PREFETCH = 2  # batches that each worker has ready, as torch's own default
BLUR_FROM_PX = 100  # smaller views are not blurred
CIFAR = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # mean and standard deviation of the channels
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Source = np.ndarray | Sequence[str | Path]  # uint8 [n, H, W, 3], or image files


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- transforms ------------------------------------------------------------------------------------------------------


class PillowBlur:
    """Gaussian blur of a PIL image, standard deviation of 0.1 to 2 px, as MoCo's and SimSiam's code has it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def view_of(size: int, *, batched: bool) -> Callable[[Any], Tensor]:
    """SimCLR's augmentation: a PIL image -> float32 [3, S, S], or `batched` uint8 [N, 3, H, W] -> float32 [N, 3, S, S].

    Without blur below BLUR_FROM_PX.
    """
    blur = [v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0)) if batched else PillowBlur()], p=0.5)]
    return v2.Compose([
        v2.RandomResizedCrop(size),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        *(blur if size >= BLUR_FROM_PX else []),
        *([] if batched else [v2.ToImage()]),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*(CIFAR if size == 32 else IMAGENET)),
    ])  # fmt: skip


def image_of(size: int, source: Source) -> Callable[[Any], Tensor]:
    """A PIL image -> uint8 [3, H, W]; photos at 8/7 of a view's side (256 px for 224), cut to a square."""
    side = size * 8 // 7
    same_size = [] if isinstance(source, np.ndarray) else [v2.Resize(side), v2.CenterCrop(side)]
    return v2.Compose([*same_size, v2.PILToTensor()])


class Samples(Dataset):
    """What `times` calls of `transform` make of image i."""

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], times: int) -> None:
        self.source, self.transform, self.times = source, transform, times

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> list[Tensor]:
        found = self.source[i]
        image = Image.fromarray(found) if isinstance(found, np.ndarray) else Image.open(found).convert("RGB")
        return [self.transform(image) for _ in range(self.times)]


# -- batches ---------------------------------------------------------------------------------------------------------


def batches(
    source: Source,
    *,
    size: int,  # S
    rows: int,  # n, images of this rank's batches
    workers: int,
    device: torch.device,
    on_device: bool,
    group: dist.ProcessGroup | None,
) -> Generator[list[Tensor]]:
    """VIEWS views float32 [n, 3, S, S] of each batch of endless epochs, on the device; `close` ends the workers.

    Raises ValueError: fewer images than a batch of all ranks.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if len(source) < rows * ranks:
        raise ValueError(f"{len(source)} images are fewer than a batch of {rows * ranks}")
    samples = (
        Samples(source, image_of(size, source), 1)
        if on_device
        else Samples(source, view_of(size, batched=False), VIEWS)
    )
    augment = view_of(size, batched=True)
    sampler: DistributedSampler | None = None
    if group is not None:
        sampler = DistributedSampler(samples, ranks, dist.get_rank(group), shuffle=True, drop_last=True)
    loader = DataLoader(
        samples, batch_size=rows, shuffle=sampler is None, sampler=sampler, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0, prefetch_factor=PREFETCH if workers else None,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    def views_on_device(batch: list[Tensor]) -> list[Tensor]:
        sent = [tensor.to(device, non_blocking=True) for tensor in batch]
        views = [augment(sent[0]) for _ in range(VIEWS)] if on_device else sent
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    for epoch in itertools.count():
        if sampler is not None:
            sampler.set_epoch(epoch)
        iterator = iter(loader)
        while True:
            with record_function("step/data"):
                batch = next(iterator, None)
                if batch is None:
                    break
                views = views_on_device(batch)
            yield views


def same_views(*, size: int, rows: int, device: torch.device) -> Generator[list[Tensor]]:
    """VIEWS views float32 [rows, 3, size, size] of random images, ready on the device, the same in every batch."""
    images = torch.randint(0, 256, (VIEWS, rows, 3, size, size), dtype=torch.uint8, device=device)
    normalise = v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*(CIFAR if size == 32 else IMAGENET)),
    ])  # fmt: skip
    views = [normalise(image).contiguous(memory_format=torch.channels_last) for image in images]
    while True:
        yield views
