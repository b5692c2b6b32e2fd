"""What whole steps are measured on: small images, photos, or views that lie ready and cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from bench.reference_data import Source, same_views
from engine.data.augment import AugmentPolicy
from engine.data.catalog import open_dataset
from engine.data.dataset import ArrayDataset, DataError, ImageDataset
from engine.data.encoded import FileDataset
from engine.data.order import Batch, BatchOrder
from engine.distributed import Ranks

REAL, SYNTHETIC = "real", "synthetic"
KINDS: tuple[str, ...] = (REAL, SYNTHETIC)
READY_LOADER = "resident"  # whose place ReadyViews takes: the trainer tells it which dtype the networks take first


class Images(NamedTuple):
    """The same images as the engine takes them and as plain code does."""

    dataset: ImageDataset
    source: Source


def small_images(root: Path, file: Path | None, side: int) -> Images:
    """CIFAR-10 below `root`, or the uint8 array [N, side, side, 3] of a file.

    Raises DataError: what is there is something else.
    """
    if file is None:
        dataset = open_dataset("cifar10", root, "train")
        assert isinstance(dataset, ArrayDataset)
        return Images(dataset, dataset.images)
    try:
        images = np.load(file, mmap_mode="r")  # refuses pickles
    except (OSError, ValueError) as error:
        raise DataError(f"argument --images: {file}: no array can be read ({error})") from None
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
        raise DataError(
            f"argument --images: {file} holds {images.dtype} {list(images.shape)}; give uint8 [N, {side}, {side}, 3]"
        )
    return Images(ArrayDataset("images", images, None), images)


def photos(root: Path | None) -> Images:
    """The image files below a folder, those that the scan found unusable left out.

    Raises DataError: no folder, or none with images in it.
    """
    if root is None:
        raise DataError("argument --root: none is given; photos need the folder that holds them")
    dataset = open_dataset("folder", root, "train")
    assert isinstance(dataset, FileDataset)
    return Images(dataset, [dataset.path(i) for i in range(len(dataset))])


class ReadyViews:
    """A loader of the engine without work: the same views of random images in every batch, ready on the device."""

    def __init__(
        self,
        dataset: ImageDataset,
        policy: AugmentPolicy,
        order: BatchOrder,
        *,
        views: int,
        ranks: Ranks,
        dtype: torch.dtype,
        **_: Any,  # what a loader that works needs
    ) -> None:
        made = next(same_views(size=policy.size, rows=order.rows, device=ranks.device))
        self._views = [view.to(dtype) for view in made[:views]]
        self._indices = torch.arange(order.rows)

    def fingerprint(self) -> str:
        """What makes the views, beside the configuration."""
        return "ready views"

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        for step in range(start, stop):
            yield Batch(step, self._views, self._indices)


@contextmanager
def trained_on(images: Images | None, batch: int) -> Iterator[None]:
    """Trainers that are built meanwhile take these images, None: ready views, and have none to evaluate with."""
    dataset = ArrayDataset("ready views", np.zeros((batch, 1, 1, 3), np.uint8), None) if images is None else images[0]

    def opened(_: object, split: str) -> ImageDataset | None:
        return dataset if split == "train" else None

    with ExitStack() as patches:
        patches.enter_context(patch("engine.trainer.open_split", opened))
        patches.enter_context(patch("engine.probe.open_split", opened))
        if images is None:
            patches.enter_context(patch.dict("engine.trainer.LOADERS", {READY_LOADER: ReadyViews}))
        yield
