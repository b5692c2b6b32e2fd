"""Datasets by the name they have in a configuration."""

from pathlib import Path
from typing import Literal

import numpy as np

from engine.data.cifar import cifar10, cifar100
from engine.data.dataset import DataError, ImageDataset
from engine.data.encoded import EncodedDataset
from engine.data.fashion_mnist import fashion_mnist
from engine.data.folder import open_folder
from engine.data.stl10 import stl10
from engine.data.tfrecord import open_tfrecord
from engine.data.tiny_imagenet import tiny_imagenet
from engine.data.webdataset import open_webdataset
from engine.data_config import DataConfig

Split = Literal["train", "bank", "test"]

# Side of the images as they are; for the user's own, the customary side to train at.
NATIVE_SIZE = {
    "cifar10": 32, "cifar100": 32, "stl10": 96, "fashion-mnist": 28, "tiny-imagenet": 64,
    "folder": 224, "webdataset": 224, "tfrecord": 224,
}  # fmt: skip

OWN = ("folder", "webdataset", "tfrecord")  # the user's own images; the others are published data sets

HELD_OUT_EVERY = 10  # of a data set without val: every tenth image of a class is a kNN query


def open_split(data: DataConfig, split: Split) -> ImageDataset | None:
    """One split of the configured data set; see `open_dataset`."""
    return open_dataset(data.dataset, data.root, split, manifest=data.manifest, shards=data.shards)


def open_dataset(
    dataset: str, root: str | Path, split: Split, *, manifest: Path | None = None, shards: int | None = None
) -> ImageDataset | None:
    """Opens one split, after a download where there is one to be had.

    Args:
        dataset: a key of NATIVE_SIZE.
        root: the folder of this dataset, or the folder that downloads go to.
        split: 'train' to pre-train on; 'bank', the labelled training images that kNN looks in; 'test', the labelled
            images that it asks for. Own images with classes but without labelled val or test are split for the two.
        manifest: the file that keeps what the scan of encoded images found; by default in `root`.
        shards: how many training shards there must be; by default as many as their names tell.

    Returns:
        The split; None for 'bank' and 'test' of data without labels.

    Raises:
        DataError: unknown name, or the data is missing, damaged or does not match.
    """
    if dataset not in NATIVE_SIZE or split not in ("train", "bank", "test"):
        raise DataError(
            f"dataset {dataset!r}, split {split!r}: give one of {', '.join(NATIVE_SIZE)}; train, bank or test"
        )
    root = Path(root).expanduser()
    if dataset == "stl10":
        return stl10(root, split)
    if dataset == "cifar10":
        return cifar10(root, split != "test")
    if dataset == "cifar100":
        return cifar100(root, split != "test")
    if dataset == "fashion-mnist":
        return fashion_mnist(root, split != "test")
    if dataset == "tiny-imagenet":
        return tiny_imagenet(root, split != "test", manifest=manifest)
    return _own(*open_own(dataset, root, manifest=manifest, shards=shards), split)


def open_own(
    dataset: str, root: str | Path, *, manifest: Path | None = None, shards: int | None = None
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """All images of a 'folder', 'webdataset' or 'tfrecord': (train, val); the others as of `open_dataset`."""
    if dataset == "webdataset":
        return open_webdataset(root, manifest=manifest, shards=shards)
    if dataset == "tfrecord":
        return open_tfrecord(root, manifest=manifest, shards=shards)
    return open_folder(root, manifest=manifest)


def _own(train: EncodedDataset, val: EncodedDataset | None, split: Split) -> EncodedDataset | None:
    if split == "train":
        return train
    if train.labels is None:
        return None
    if val is not None:
        return train if split == "bank" else val
    queries = _held_out(train.labels)
    if not queries.any():
        return None
    return train.subset(f"{train.name}-{split}", np.flatnonzero(queries == (split == "test")))


def _held_out(labels: np.ndarray) -> np.ndarray:
    """bool [N]: every tenth image of each class in its order, or the last where there are 2 to 9, none where 1."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = members[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        held[chosen if len(chosen) else members[1:][-1:]] = True
    return held
