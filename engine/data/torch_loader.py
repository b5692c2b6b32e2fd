"""The torchvision loader: views made by worker processes, one image at a time.

Legend
  N  images of the global batch      n  images of this rank      V  views of an image      S  side in pixels

A batch is a pure function of (seed, step): step -> epoch and place in its permutation (order.py) -> images -> their
uniform numbers -> views (augment.py).  So the stream does not depend on workers or ranks, and resuming is starting at
another step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.augment import AugmentPolicy, draw_views
from engine.data.dataset import ArrayDataset, DataError, ImageDataset
from engine.data.order import Batch, BatchOrder
from engine.data.skipped import SkippedImages, readable
from engine.distributed import Ranks

CHUNK = 64  # images a worker makes at once: bounds latency and memory at 224 px


class TorchLoader:
    """Draws V views of every image, from `first_view` on, in the order of a BatchOrder, in worker processes."""

    def __init__(
        self,
        dataset: ImageDataset,
        policy: AugmentPolicy,
        order: BatchOrder,
        *,
        views: int,  # V
        workers: int,
        ranks: Ranks,
        skipped: SkippedImages,
        first_view: int = 0,
    ) -> None:
        self.dataset = dataset
        self.policy = policy
        self.ranks = ranks
        self.workers = workers
        self.skipped = skipped
        self._chunks = _Chunks(dataset, policy, order, views, first_view)

    def fingerprint(self) -> str:
        """What makes the views, beside the configuration."""
        return "torchvision"

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        mean, std = pixel_statistics(self.policy.statistics, self.ranks.device)
        loader = _workers(self._chunks, self._chunks.keys(start, stop), self.workers, self.ranks)
        parts = map(_received, _started(loader))
        for step in range(start, stop):
            images, wanted, read = zip(*(next(parts) for _ in range(self._chunks.per_step)), strict=True)
            index = torch.cat(read)
            self.skipped.note(self.dataset, torch.cat(wanted), index)
            device_images = [chunk.to(self.ranks.device, non_blocking=True) for chunk in images]  # [V, c, S, S, 3]
            stacked = torch.cat(device_images, dim=1) if len(device_images) > 1 else device_images[0]
            views = [normalized(view, mean, std) for view in stacked]
            yield Batch(step, views, index)


def pil_image(dataset: ImageDataset, index: int) -> tuple[Image.Image, int]:
    """The image as PIL RGB and its index; `readable` says which takes the place of an unreadable one."""
    image, read = readable(dataset, index, dataset.image)
    return (image if isinstance(image, Image.Image) else Image.fromarray(image)), read


def pixel_statistics(
    statistics: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of channels, of values in [0, 1] -> in [0, 255], [1, 3, 1, 1] each."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in statistics)
    return mean, std


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] with channels_last strides; statistics of values in [0, 255]."""
    return (images.permute(0, 3, 1, 2).float() - mean) / std


def plain_images(
    dataset: ImageDataset,
    indices: NDArray[np.int64],
    *,
    size: int,  # S
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    batch_size: int,
    workers: int,
    ranks: Ranks,
    skipped: SkippedImages,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Unaugmented images in the order given, for evaluation: [c, 3, S, S], normalised, on the device, and indices.

    c is `batch_size` but for the last; the indices [c], on the CPU, differ from those asked for where an image could
    not be read.
    """
    mean, std = pixel_statistics(statistics, ranks.device)
    keys = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    if isinstance(dataset, ArrayDataset) and dataset.images.shape[1:3] == (size, size):
        for key in keys:  # nothing to decode
            images = torch.from_numpy(np.asarray(dataset.images[key])).to(ranks.device)
            yield normalized(images, mean, std), torch.from_numpy(key)
        return
    loader = _workers(_PlainChunks(dataset, size), keys, workers, ranks)
    for key, (images, read) in zip(keys, map(_received, _started(loader)), strict=True):
        skipped.note(dataset, torch.from_numpy(key), read)
        yield normalized(images.to(ranks.device, non_blocking=True), mean, std), read


def plain_pixels(
    dataset: ImageDataset, indices: NDArray[np.int64], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of `plain_images` as they are, uint8 [c, S, S, 3], and the indices read, int64 [c]."""
    found = [pil_image(dataset, int(i)) for i in indices]
    return np.stack([_center(image, size) for image, _ in found]), np.array([index for _, index in found], np.int64)


def _workers(chunks: Dataset, keys: Any, workers: int, ranks: Ranks) -> DataLoader:
    return DataLoader(
        chunks,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=ranks.device.type == "cuda",
        # Its own generator: the default would draw the workers' seed from torch's global one and so change a run.
        generator=torch.Generator().manual_seed(0),
    )


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, its processes forked.

    They inherit what this process has, and must not collect it: the destructor of a DALI pipeline, whose threads are
    not theirs, waits for ever (seen with DALI 2.4).
    """
    gc.freeze()  # what is there now is never garbage to them
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _received(item: Any) -> Any:
    """What a worker made; it hands a DataError over as a value, as torch would bury its text in a traceback."""
    if isinstance(item, DataError):
        raise item
    return item


class _Chunks(Dataset):
    """(step, k) -> views of the k-th chunk of this rank's images, uint8 [V, c, S, S, 3]; indices wanted and read."""

    def __init__(self, dataset: ImageDataset, policy: AugmentPolicy, order: BatchOrder, views: int, first: int) -> None:
        self.dataset, self.policy, self.order, self.views, self.first = dataset, policy, order, views, first
        self.per_step = -(-order.rows // CHUNK)

    def keys(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(step, k) for step in range(start, stop) for k in range(self.per_step)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor] | DataError:
        try:
            return self._make(*key)
        except DataError as error:
            return error

    def _make(self, step: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        wanted = self.order.indices(step, k * CHUNK, (k + 1) * CHUNK)
        images, read = zip(*(pil_image(self.dataset, int(i)) for i in wanted), strict=True)
        # The numbers belong to the place, so that a substitute does not repeat the views it has elsewhere.
        params = draw_views(
            self.policy, seed=self.order.seed, epoch=self.order.epoch(step), indices=wanted,
            sizes=np.array([image.size for image in images]), views=self.views, first=self.first,
        )  # fmt: skip
        side, c = self.policy.size, len(wanted)
        out = np.empty((self.views, c, side, side, 3), dtype=np.uint8)
        for view in range(self.views):
            for i, image in enumerate(images):
                out[view, i] = self.policy.apply(image, params, view * c + i)
        return torch.from_numpy(out), torch.from_numpy(wanted), torch.tensor(read)


class _PlainChunks(Dataset):
    """Indices -> images resized and cropped at the centre, uint8 [c, S, S, 3], and the indices read."""

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor] | DataError:
        try:
            images, read = plain_pixels(self.dataset, indices, self.size)
        except DataError as error:
            return error
        return torch.from_numpy(images), torch.from_numpy(read)


def _center(image: Image.Image, size: int) -> NDArray[np.uint8]:
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image)
