"""The resident loader: the whole data set in memory, all views of a batch made by one call of `kernels.augment_views`.

Legend
  N  images of the data set      n  images of this rank's batch      V  views of an image      S  side in pixels

For images of one size.  On a GPU they lie in its memory; where they would take more of it than they may, they stay in
the host's, and each batch's go through pinned memory.  On a CPU they stay where the data set has them.

Images, order and the parameters of views are those of the other loaders, and so are the views, byte for byte before
they are normalised: a batch is a function of seed and step, and resuming is starting at another step.  A thread draws
parameters ahead; what it hands over is one table of 64 bytes a view (kernels/augment_table.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.augment import AugmentPolicy, ViewParams, draw_views
from engine.data.dataset import ArrayDataset, DataError, ImageDataset
from engine.data.encoded import EncodedDataset
from engine.data.manifest import progress
from engine.data.order import Batch, BatchOrder
from engine.data.skipped import SkippedImages, readable
from engine.distributed import Ranks
from kernels.augment import augment_views, new_views, scale_and_shift
from kernels.augment_table import WIDTH, table_of

AHEAD = 3  # batches whose parameters are drawn before they are needed
GIB = 2**30
FREE_SHARE = 0.5  # of the GPU's free memory that images may take unless told otherwise
PART = 8192  # images that go to the device at once
ONE_SIZE = "data.loader: resident takes images of one size; use data.loader=dali or torchvision"


class _Drawn(NamedTuple):
    """The parameters of one batch."""

    step: int
    wanted: NDArray[np.int64]  # [n] images
    images: NDArray[np.uint8] | None  # [n, H, W, 3], where they are not on the device
    params: ViewParams  # of V * n views, those of a view together


class ResidentLoader:
    """Draws V views of every image, from `first_view` on, in the order of a BatchOrder, from memory.

    Raises DataError: images of several sizes, or more than there is memory for.
    """

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
        dtype: torch.dtype = torch.float32,  # of the views on a GPU
        limit_gib: float | None = None,
    ) -> None:
        self.dataset, self.policy, self.order, self.views, self._first = dataset, policy, order, views, first_view
        self.skipped = skipped
        self.images, self._read = all_images(dataset, max(1, workers))
        self._sides = self.images.shape[1:3]
        self._gpu = None
        if ranks.device.type == "cuda":
            self._gpu = _OnGpu(
                self.images, policy, rows=order.rows, views=views, device=ranks.device, dtype=dtype, limit_gib=limit_gib
            )
            if self._gpu.resident:
                self.images = np.empty((0, *self.images.shape[1:]), np.uint8)  # the host's are not needed any more

    def fingerprint(self) -> str:
        """What makes the views, beside the configuration."""
        return "resident"

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        with ThreadPoolExecutor(1) as drawer:
            begun: deque[Future[_Drawn]] = deque()
            try:
                for step in range(start, stop):
                    while len(begun) < min(AHEAD, stop - step):
                        begun.append(drawer.submit(self._draw, step + len(begun)))
                    yield self._made(begun.popleft().result())
            finally:
                drawer.shutdown(cancel_futures=True)

    def leave_launch(self) -> Callable[[], None]:
        """From now on batches hold the same tensors in every step, not yet filled: the function returned fills them.

        On a GPU only.
        """
        assert self._gpu is not None
        self._gpu.launched_outside = True
        return self._gpu.launch

    def _draw(self, step: int) -> _Drawn:
        wanted, (height, width) = self.order.indices(step), self._sides
        params = draw_views(
            self.policy, seed=self.order.seed, epoch=self.order.epoch(step), indices=wanted,
            sizes=np.tile([width, height], (len(wanted), 1)), views=self.views, first=self._first,
        )  # fmt: skip
        # A copy in the order of its axes, whatever that of a memory map is.
        images = np.ascontiguousarray(self.images[wanted]) if len(self.images) else None
        return _Drawn(step, wanted, images, params)

    def _made(self, drawn: _Drawn) -> Batch:
        read = self._read[drawn.wanted]
        self.skipped.note(self.dataset, torch.from_numpy(drawn.wanted), torch.from_numpy(read))
        views = self._views_on_cpu(drawn) if self._gpu is None else self._gpu.views(drawn)
        return Batch(drawn.step, list(views.split(len(drawn.wanted))), torch.from_numpy(read))

    def _views_on_cpu(self, drawn: _Drawn) -> Tensor:
        """[V * n, 3, S, S], float32."""
        assert drawn.images is not None
        mean, std = self.policy.statistics
        return augment_views(
            torch.from_numpy(drawn.images), source=np.tile(np.arange(len(drawn.wanted)), self.views),
            size=self.policy.size, mean=mean, std=std, **drawn.params._asdict(),
        )  # fmt: skip


def all_images(dataset: ImageDataset, threads: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images of a data set, uint8 [N, H, W, 3], and the index of the one in each place.

    Raises DataError: images of several sizes, or more than there is memory for.
    """
    n = len(dataset)
    if isinstance(dataset, ArrayDataset):
        return dataset.images, np.arange(n)
    if isinstance(dataset, EncodedDataset):
        _check_sizes(dataset)

    def image(index: int) -> tuple[NDArray[np.uint8], int]:
        pixels, read = readable(dataset, index, dataset.image)
        return np.asarray(pixels), read

    first, _ = image(0)
    needed, free = n * first.nbytes, psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"data.loader: resident would decode {dataset.name} to {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB of "
            "memory are free; use data.loader=dali or torchvision"
        )
    pixels, read = np.empty((n, *first.shape), np.uint8), np.empty(n, np.int64)
    with ThreadPoolExecutor(threads) as pool, progress("decoding images", n) as advance:  # decoders hold no lock
        for i, (found, index) in enumerate(pool.map(image, range(n))):
            if found.shape != first.shape:
                height, width, _ = found.shape
                raise DataError(f"{dataset.describe(index)} is {width} x {height} px, unlike the first; {ONE_SIZE}")
            pixels[i], read[i] = found, index
            advance(1)
    return pixels, read


def _check_sizes(dataset: EncodedDataset) -> None:
    """Raises DataError where the scan found several, before anything is decoded."""
    sizes, counts = np.unique(dataset.facts.sizes, axis=0, return_counts=True)
    if len(sizes) > 1:
        odd = int(np.flatnonzero((dataset.facts.sizes != sizes[counts.argmax()]).any(axis=1))[0])
        width, height = dataset.facts.sizes[odd]
        raise DataError(
            f"{dataset.describe(odd)} is {width} x {height} px, one of {len(sizes)} sizes in {dataset.name}; {ONE_SIZE}"
        )


class _OnGpu:
    """The images on a device, or as many as a batch has where they do not fit, and the memory of its views."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        policy: AugmentPolicy,
        *,
        rows: int,  # n
        views: int,  # V
        device: torch.device,
        dtype: torch.dtype,
        limit_gib: float | None,
    ) -> None:
        N, height, width, _ = images.shape
        free, _ = torch.cuda.mem_get_info(device)
        limit = FREE_SHARE * free if limit_gib is None else limit_gib * GIB
        self.resident = images.nbytes <= limit
        self.launched_outside = False
        self._views, self._blur = views, policy.blur > 0
        # Three bytes a pixel: with four, one load each, a launch takes as long (bench/results/h200/augment.jsonl).
        self._pixels = torch.empty((N if self.resident else rows, height, width, 3), dtype=torch.uint8, device=device)
        if self.resident:
            for i in range(0, N, PART):
                # A copy on the host first: torch does not take read-only memory.
                self._pixels[i : i + PART].copy_(torch.from_numpy(np.array(images[i : i + PART])))
        self._statistics = scale_and_shift(*policy.statistics).to(device)
        m, S = views * rows, policy.size
        self._new = lambda: new_views(m, S, dtype, device)
        self._out = self._new()
        self._passes = torch.empty((2, m, S, S, 3), dtype=torch.uint8, device=device) if self._blur else None
        self._table = torch.zeros((m, WIDTH), dtype=torch.int32, device=device)
        staged = None if self.resident else (rows, height, width, 3)
        self._slots = deque(_Slot(m, staged) for _ in range(2))

    def views(self, drawn: _Drawn) -> Tensor:
        """[V * n, 3, S, S] of these parameters, but for the launch where someone else does it."""
        self._send(drawn)
        if not self.launched_outside:
            self._out = self._new()
            self.launch()
        return self._out

    def launch(self) -> None:
        """Makes the views of what was sent last."""
        from kernels import augment_triton  # a machine without a GPU may lack triton

        augment_triton.launch(
            self._pixels, self._table, self._statistics, self._out, blur=self._blur, passes=self._passes
        )

    def _send(self, drawn: _Drawn) -> None:
        """Parameters, and images where they are not on the device; the host waits for nothing that is recent."""
        self._slots.rotate()
        slot, n = self._slots[0], len(drawn.wanted)
        slot.sent.synchronize()  # what was sent from there two batches ago
        source = np.tile(drawn.wanted if self.resident else np.arange(n), self._views)
        table_of(source, **drawn.params._asdict(), out=slot.table)
        self._table.copy_(slot.table, non_blocking=True)
        if slot.images is not None:
            assert drawn.images is not None
            np.copyto(slot.images.numpy(), drawn.images)
            self._pixels.copy_(slot.images, non_blocking=True)
        slot.sent.record()


class _Slot:
    """Host memory that the device reads by itself."""

    def __init__(self, m: int, images: tuple[int, ...] | None) -> None:
        self.table = torch.zeros((m, WIDTH), dtype=torch.int32, pin_memory=True)
        self.images = None if images is None else torch.zeros(images, dtype=torch.uint8, pin_memory=True)
        self.sent = torch.cuda.Event()
