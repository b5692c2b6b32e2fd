"""The torchvision loader: views made by worker processes, one image at a time.

Legend
  N  images of the global batch      n  images of this rank      V  views of an image      S  side in pixels

A batch is a pure function of (seed, step): step -> epoch and place in its permutation -> images -> their uniform
numbers -> views.  So the stream does not depend on workers or ranks, and resuming is starting at another step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.augment import AugmentPolicy, permutation, uniforms
from engine.data.dataset import DataError, ImageDataset, UnreadableImage
from engine.distributed import Ranks, gather_objects, rows_per_rank

log = logging.getLogger(__name__)

CHUNK = 64  # images a worker makes at once: bounds latency and memory at 224 px


class Batch(NamedTuple):
    """One step's share of this rank."""

    step: int
    views: list[Tensor]  # V tensors [n, 3, S, S], float32, normalised, channels_last strides, on the device
    indices: Tensor  # [n] images in the data set, on the CPU


def readable_image(dataset: ImageDataset, index: int) -> tuple[Image.Image, int]:
    """The image as PIL RGB and its index; an unreadable one gives its place to another, always the same, that reads.

    Raises DataError where the whole data set is unreadable.
    """
    n = len(dataset)
    for candidate in ((index + k * _stride(n)) % n for k in range(n)):
        try:
            image = dataset.image(candidate)
        except UnreadableImage:
            continue
        return (image if isinstance(image, Image.Image) else Image.fromarray(image)), candidate
    raise DataError(f"{dataset.name}: none of its {n} images can be read, as {dataset.describe(index)}")


@lru_cache(maxsize=4)
def _stride(n: int) -> int:
    """Steps of this size visit all of n, and leave at once a neighbourhood that is damaged as a whole."""
    stride = max(1, int(n * 0.618))
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


class SkippedImages:
    """Unreadable images met so far by any loader, with the reason: counted, and reported once over all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, dataset: ImageDataset, wanted: Tensor, read: Tensor) -> None:
        """Takes down the indices that others stand in for; local to this rank until `share`."""
        for index in wanted[wanted != read].tolist():
            name = dataset.describe(index)
            if name not in self._known and name not in self._new:
                self._new[name] = _reason(dataset, index)

    def share(self) -> None:
        """Brings the ranks to one list, and rank 0 reports what is new; called by all ranks together."""
        for found in gather_objects(self._ranks, self._new):
            for name, reason in found.items():
                if name not in self._known:
                    self._known[name] = reason
                    if self._ranks.is_first:
                        log.warning("skipped %s", reason)
        self._new = {}


class TorchLoader:
    """Draws V views of every image in a seeded, endless sequence of epochs; incomplete batches are dropped.

    Raises DataError: fewer images than one global batch.  ConfigError: a batch that does not divide by the ranks.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        policy: AugmentPolicy,
        *,
        views: int,  # V
        batch_size: int,  # N
        seed: int,
        workers: int,
        ranks: Ranks,
        skipped: SkippedImages,
    ) -> None:
        if len(dataset) < batch_size:
            raise DataError(
                f"data.batch_size: {batch_size} is more than the {len(dataset)} readable images of {dataset.name}; "
                "use a smaller batch or more images"
            )
        self.dataset = dataset
        self.policy = policy
        self.ranks = ranks
        self.workers = workers
        self.images = len(dataset)
        self.steps_per_epoch = len(dataset) // batch_size
        self.skipped = skipped
        self._chunks = _Chunks(dataset, policy, views, batch_size, seed, ranks)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        mean, std = (torch.tensor(s, device=self.ranks.device).view(1, 3, 1, 1) * 255 for s in self.policy.statistics)
        loader = _workers(self._chunks, self._chunks.keys(start, stop), self.workers, self.ranks)
        parts = map(_received, loader)
        for step in range(start, stop):
            images, wanted, read = zip(*(next(parts) for _ in range(self._chunks.per_step)), strict=True)
            index = torch.cat(read)
            self.skipped.note(self.dataset, torch.cat(wanted), index)
            device_images = [chunk.to(self.ranks.device, non_blocking=True) for chunk in images]  # [V, c, S, S, 3]
            stacked = torch.cat(device_images, dim=1) if len(device_images) > 1 else device_images[0]
            views = [normalized(view, mean, std) for view in stacked]
            yield Batch(step, views, index)


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
    mean, std = (torch.tensor(s, device=ranks.device).view(1, 3, 1, 1) * 255 for s in statistics)
    keys = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    loader = _workers(_PlainChunks(dataset, size), keys, workers, ranks)
    for key, (images, read) in zip(keys, map(_received, loader), strict=True):
        skipped.note(dataset, torch.from_numpy(key), read)
        yield normalized(images.to(ranks.device, non_blocking=True), mean, std), read


def _reason(dataset: ImageDataset, index: int) -> str:
    try:
        dataset.image(index)
    except UnreadableImage as error:
        return str(error)
    return f"{dataset.describe(index)} (readable again now)"


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


def _received(item: Any) -> Any:
    """What a worker made; it hands a DataError over as a value, as torch would bury its text in a traceback."""
    if isinstance(item, DataError):
        raise item
    return item


class _Chunks(Dataset):
    """(step, k) -> views of the k-th chunk of this rank's images, uint8 [V, c, S, S, 3]; indices wanted and read."""

    def __init__(
        self, dataset: ImageDataset, policy: AugmentPolicy, views: int, batch_size: int, seed: int, ranks: Ranks
    ) -> None:
        self.dataset, self.policy, self.views, self.seed = dataset, policy, views, seed
        self.batch_size = batch_size
        self.rows = rows_per_rank(batch_size, ranks)  # n
        self.first_row = ranks.rank * self.rows
        self.steps_per_epoch = len(dataset) // batch_size
        self.per_step = -(-self.rows // CHUNK)

    def keys(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(step, k) for step in range(start, stop) for k in range(self.per_step)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor] | DataError:
        try:
            return self._make(*key)
        except DataError as error:
            return error

    def _make(self, step: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size + self.first_row + k * CHUNK
        last = place * self.batch_size + self.first_row + min(self.rows, (k + 1) * CHUNK)
        wanted = _epoch_order(self.seed, epoch, len(self.dataset))[first:last]
        found = [readable_image(self.dataset, int(i)) for i in wanted]
        read = np.array([index for _, index in found])
        # The numbers belong to the place, so that a substitute does not repeat the views it has elsewhere.
        numbers = np.concatenate([uniforms(self.seed, epoch, int(i), self.views) for i in wanted])
        sizes = np.repeat([image.size for image, _ in found], self.views, axis=0).astype(float)
        params = self.policy.draw(numbers, sizes[:, 0], sizes[:, 1])
        side = self.policy.size
        out = np.empty((self.views, len(found), side, side, 3), dtype=np.uint8)
        for i, (image, _) in enumerate(found):
            for view in range(self.views):
                out[view, i] = self.policy.apply(image, params, i * self.views + view)
        return torch.from_numpy(out), torch.from_numpy(wanted), torch.from_numpy(read)


class _PlainChunks(Dataset):
    """Indices -> images resized and cropped at the centre, uint8 [c, S, S, 3], and the indices read."""

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor] | DataError:
        try:
            found = [readable_image(self.dataset, int(i)) for i in indices]
        except DataError as error:
            return error
        images = np.stack([_center(image, self.size) for image, _ in found])
        return torch.from_numpy(images), torch.tensor([index for _, index in found])


def _center(image: Image.Image, size: int) -> NDArray[np.uint8]:
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n)
